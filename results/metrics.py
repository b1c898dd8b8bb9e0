"""The evaluations of all trainings of a workdir in one file, and back to a file each.

    python results/metrics.py pack WORKDIR FILE      replicate_*/**/metrics.csv -> metrics.csv.gz
    python results/metrics.py unpack FILE WORKDIR    the other way

and likewise for updates.csv, where FILE is updates.csv.gz.

The file is a CSV with the columns of metrics.csv behind replicate, level and arm, packed by gzip.
Rows are taken over as text, so that no digit changes and every metrics.csv comes back byte for
byte. `zcat` shows it; Python's `gzip.open(FILE, "rt")` and `csv` read it.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

WHICH = "replicate,level,arm,"
Texts = dict[tuple[int, int, str], str]  # (replicate, level, arm) -> text of a metrics.csv


def files(workdir: Path, name: str = "metrics.csv") -> Texts:
    """Returns every metrics.csv of a workdir, or such files, in the order of summary.csv."""
    found = {}
    for path in Path(workdir).glob(f"replicate_*/**/{name}"):
        replicate, level, *branch = path.relative_to(workdir).parts[:-1]
        arm = branch[0].removeprefix("branch_") if branch else "ticket"
        key = int(replicate.removeprefix("replicate_")), int(level.removeprefix("level_")), arm
        found[key] = path.read_bytes().decode()
    order = sorted(found, key=lambda key: (*key[:2], key[2] != "ticket", key[2]))
    return {key: found[key] for key in order}


def join(texts: Texts) -> str:
    """Returns the texts as one, each row behind the training that it is of.

    >>> print(join({(0, 0, "ticket"): "step,loss\\n0,\\n5,0.10\\n"}), end="")
    replicate,level,arm,step,loss
    0,0,ticket,0,
    0,0,ticket,5,0.10
    """
    headers = {text.partition("\n")[0] for text in texts.values()}
    if len(headers) != 1 or not all(text.endswith("\n") for text in texts.values()):
        raise ValueError(f"no metrics.csv, one that was cut off, or several headers: {headers}")
    lines = [WHICH + headers.pop()]
    for (replicate, level, arm), text in texts.items():
        lines += [f"{replicate},{level},{arm},{row}" for row in text[:-1].split("\n")[1:]]
    return "\n".join(lines) + "\n"


def divide(text: str) -> Texts:
    """Returns what `join` was given."""
    header, *rows = text[:-1].split("\n")
    parts: dict[tuple[int, int, str], list[str]] = {}
    for row in rows:
        replicate, level, arm, rest = row.split(",", 3)
        key = int(replicate), int(level), arm
        parts.setdefault(key, [header.removeprefix(WHICH)]).append(rest)
    return {key: "\n".join(lines) + "\n" for key, lines in parts.items()}


def _each(file: Path) -> str:
    """What the files are called that a packed one is made of."""
    return "updates.csv" if Path(file).name.startswith("updates.csv") else "metrics.csv"


def read(file: Path) -> Texts:
    """Returns every metrics.csv out of a packed file."""
    return divide(gzip.decompress(Path(file).read_bytes()).decode())


def pack(workdir: Path, file: Path) -> None:
    """Writes one file with the metrics of a workdir, and reads it back."""
    texts, content = files(workdir, _each(file)), io.BytesIO()
    # Without name and time, so that equal metrics are equal bytes.
    with gzip.GzipFile("", "wb", 9, content, mtime=0) as packed:
        packed.write(join(texts).encode())
    Path(file).write_bytes(content.getvalue())
    if read(file) != texts:
        raise ValueError(f"{file} does not give back what is in {workdir}")


def unpack(file: Path, workdir: Path) -> None:
    """Writes every metrics.csv to where it was."""
    for (replicate, level, arm), text in read(file).items():
        folder = Path(workdir, f"replicate_{replicate:02d}", f"level_{level:02d}")
        folder = folder if arm == "ticket" else folder / f"branch_{arm}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _each(file)).write_bytes(text.encode())


if __name__ == "__main__":
    commands = {"pack": pack, "unpack": unpack}
    if len(sys.argv) != 4 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
