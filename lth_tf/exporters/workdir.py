"""What there is to export in a workdir, and what came of it in bytes."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import edge, experiments
from lth_tf.errors import UserError
from lth_tf.tickets import Ticket, load_ticket, load_trained


def find(workdir: str | os.PathLike, replicate: int, level: int, branch: str | None = None) -> Path:
    """Returns the folder of a finished training.

    Args:
      workdir: where `experiments.imp` wrote.
      replicate, level: which.
      branch: a control run off that level's ticket; None is the ticket itself.

    Raises:
      UserError: no workdir, or no such training in it; names those that are finished.
    """
    work = edge.folder(workdir)
    if not (work / "spec.json").is_file():
        raise UserError(
            f"{str(work)!r} is not a workdir: it has no spec.json; give the folder that lth-imp "
            "wrote to"
        )
    inside = Path(f"replicate_{replicate:02d}", f"level_{level:02d}")
    inside = inside / f"branch_{branch}" if branch else inside
    done = [folder.relative_to(work) for folder in experiments.finished(work)]
    if inside in done:
        return work / inside
    unfinished = (work / inside).is_dir()
    raise UserError(
        f"{str(inside)!r} {'is not finished' if unfinished else 'does not exist'} in "
        f"{str(work)!r}; finished: {_listed(done, inside.parts[0])}"
        + ("; lth-imp on this workdir goes on where it was" if unfinished else "")
    )


def _listed(done: list[Path], replicate: str) -> str:
    """'level 0, 1, 2; branch reinit at level 1, 2' of a replicate, or which ones have any."""
    arms: dict[str, list[str]] = {}
    for folder in done:
        if folder.parts[0] == replicate:
            arm = " ".join(folder.parts[2:]).replace("branch_", "branch ")
            level = str(int(folder.parts[1].removeprefix("level_")))
            arms.setdefault(f"{arm} at level" if arm else "level", []).append(level)
    others = ", ".join(sorted({folder.parts[0] for folder in done}))
    if not arms:
        return f"only in {others}" if others else "nothing yet"
    return "; ".join(f"{arm} {', '.join(arms[arm])}" for arm in sorted(arms, reverse=True))


def read(folder: Path, what: str) -> tuple[Ticket, dict[str, np.ndarray] | None]:
    """Returns a folder's ticket and, if `what` is 'trained', the weights its training ended with.

    Raises:
      UserError: a file is absent or damaged.
    """
    ticket = load_ticket(folder / "ticket.safetensors")
    trained = load_trained(folder / "trained.safetensors", ticket) if what == "trained" else None
    return ticket, trained


class _Counter(io.BytesIO):
    """A file that keeps nothing but its size."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def sizes(path: Path) -> tuple[int, int]:
    """Returns the bytes of a file or of a folder's files: as they are, and as one tar.gz."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    counter = _Counter()
    with gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6) as packed:  # as `tar -z` does
        with tarfile.open(fileobj=packed, mode="w|") as archive:
            archive.add(path, arcname=path.name)
    return sum(p.stat().st_size for p in files), counter.size


def weighed(target: Path, ticket: Ticket, workdir: str | os.PathLike) -> str:
    """Returns where an export is, its density, and its bytes beside the dense weights'.

    Args:
      target: the exported folder.
      ticket: what was exported.
      workdir: of the experiment, where the dense weights may be.
    """
    dense = Path(workdir, f"replicate_{ticket.origin['replicate']:02d}", "level_00")
    lines = [f"{target}", f"density {ticket.density:.4f}"]
    for what, path in (("export", target), ("dense weights", dense / "trained.safetensors")):
        if path.exists():
            raw, packed = sizes(path)
            lines.append(f"{what}: {raw:,} bytes, {packed:,} as tar.gz")
    return "\n".join(lines)
