"""No file, however damaged or made up, crashes a reader or is taken for one that it is not.

LTH_TF_FUZZ=5000 python -m pytest -s tests/test_fuzz.py goes through as many, and prints the counts.
"""

import collections
import copy
import io
import json
import os
import pathlib
import random
import shutil
import types

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lth_tf import analysis, datasets, experiments, flags, pruning, storage
from lth_tf.analysis import summary
from lth_tf.datasets import cache, tfds
from lth_tf.errors import UserError
from lth_tf.experiments.workdirs import read_training
from lth_tf.spec import Spec
from lth_tf.sweeps import runs
from lth_tf.sweeps.grid import Run
from lth_tf.tickets import load_ticket, load_trained, save_trained
from lth_tf.training import Trainer, checkpoints, states

COUNT = int(os.environ.get("LTH_TF_FUZZ", "900"))
SEED = int(os.environ.get("LTH_TF_FUZZ_SEED", "0"))
OLD = pathlib.Path(__file__).parent / "formats" / "2"
DENSE, LEVEL = "replicate_00/level_00", "replicate_00/level_01"
TICKET = "ticket.safetensors"
STOP = 120
NASTY = [
    None, True, False, -1, 0, 1, 2, 7, -5, 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", "9" * 400, "../../x", "\0", "\ud800", "ticket", [], {}, [[]],
    [0, 1], {"a": []}, ["a", "a"], [None],
]  # fmt: skip


# What there is: a sweep of one run, whose workdir has a file of each kind.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is written, of today's format, and read again."""
    root = tmp_path_factory.mktemp("whole")
    work = root / "runs" / "run"
    shutil.copytree(OLD / "interrupted", work)
    spec = experiments.read_spec(work)
    experiments.write_spec(work, spec)
    dense, level = work / DENSE, work / LEVEL
    for path in work.rglob(TICKET):
        load_ticket(path).save(path)
    rows, _ = summary.read_metrics(dense / "metrics.csv")
    digest = summary.write_metrics(dense / "metrics.csv", "accuracy", rows)
    ticket, pruned = load_ticket(dense / TICKET), load_ticket(level / TICKET)
    save_trained(
        dense / "trained.safetensors", load_trained(dense / "trained.safetensors"), ticket, digest
    )
    state = checkpoints.latest(level, pytest.fail)
    (level / "checkpoint_000000040.safetensors").unlink()
    checkpoints.save(level, state, pruned)
    analysis.write_summary(work, summary.rebuilt(work))
    run = Run("runs/run", ("--levels=1",), spec)
    runs.record(root, run, "finished", exit_code=0, seconds=1.5)
    flag_file = pathlib.Path(flags.presets()["digits_lenet_imp"]).read_bytes()
    (root / "x.flags").write_bytes(b"# \xc3\xbc\n" + flag_file)
    arrays = {name: np.arange(24, dtype=np.uint8).reshape(6, 4) + i
              for i, name in enumerate(tfds.ARRAYS)}  # fmt: skip
    cache.write(root / "x.npz", arrays)
    trainer = Trainer(spec, datasets.load("digits"))
    return types.SimpleNamespace(
        root=root, spec=spec, rows=rows, ticket=ticket, pruned=pruned, state=state, run=run,
        arrays=arrays, trainer=trainer, summary=analysis.read_summary(work),
    )  # fmt: skip


def same(a, b):
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


# Each takes the folder of a sweep in which a file is damaged, reads it as a run would, and returns
# whether what it took is what was written (True), something else that is possible (None: another
# experiment's spec, say, or weights that somebody has put under a checksum that is right), or
# something that it must not have taken (False).


def ticket(root, whole):
    lab = types.SimpleNamespace(spec=whole.spec, trainer=whole.trainer)
    found = experiments.Laboratory._own(lab, root / "runs/run" / LEVEL / TICKET)
    if same(found.weights, whole.pruned.weights) and same(found.mask, whole.pruned.mask):
        if found.digest == whole.pruned.digest:
            return True
    whose = found.level, found.origin["replicate"], found.origin["arm"], found.origin["seed"]
    shapes = {n: w.shape for n, w in found.weights.items()}
    fits = shapes == {n: w.shape for n, w in whole.pruned.weights.items()}
    found.verify()
    return None if fits and whose == (1, 0, "ticket", whole.spec.seed) else False


def trained(root, whole):
    folder = root / "runs/run" / DENSE
    weights, _ = read_training(folder, whole.ticket)
    wanted = whole.ticket.weights
    if same(weights, load_trained(whole.root / "runs/run" / DENSE / "trained.safetensors")):
        return True
    return None if {n: w.shape for n, w in weights.items()} == {
        n: w.shape for n, w in wanted.items()
    } else False  # fmt: skip


def checkpoint(root, whole):
    said = []
    found = checkpoints.latest(root / "runs/run" / LEVEL, said.append, whole.pruned, STOP)
    if found is None:
        raise UserError(said[0])
    alike = (found.step, found.since, found.total) == (
        whole.state.step, whole.state.since, whole.state.total
    )  # fmt: skip
    if alike and same(found.variables, whole.state.variables) and found.rows == whole.state.rows:
        return True
    states.restore(found, whole.trainer.model, whole.trainer.optimizer, whole.trainer.strategy)
    pruning.check(whole.trainer.model, whole.trainer.optimizer)
    return None if 20 < found.step < STOP and found.rows[-1]["step"] <= found.step else False


def spec_json(root, whole):
    found = experiments.read_spec(root / "runs/run")
    if found == whole.spec:
        return True
    said = json.loads((root / "runs/run/spec.json").read_text())
    said.pop("format_number", None)
    told = found.as_dict()
    return None if all(value == told[name] for name, value in said.items()) else False


def metrics_csv(root, whole):
    _, rows = read_training(root / "runs/run" / DENSE, whole.ticket)
    cut = [[{**row, "seconds": 0} for row in each] for each in (rows, whole.rows)]
    return cut[0] == cut[1]


def summary_csv(root, whole):
    rows = analysis.read_summary(root / "runs/run")
    return True if rows == whole.summary else None if not rows else False


def run_json(root, whole):
    said = []
    runs.write_index(root)  # as another process may, before it is mended
    runs.mend(root, whole.run, said.append)
    runs.require_own(root, [whole.run])
    runs.write_index(root)
    found = runs.read(root, whole.run)
    if found["name"] != "run" or Spec.from_dict(found["spec"]) != whole.spec:
        return False
    if said:
        raise UserError(said[0])
    return True if found == runs.load(whole.root, whole.run.folder) else None


def flag_file(root, whole):
    found = flags.parse([f"--flagfile={root / 'x.flags'}"], "imp")
    text = (root / "x.flags").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.split("\n")]
    words = [line for line in lines if line.startswith("-")]
    return None if found == flags.parse(words, "imp") else False


def cache_npz(root, whole):
    found = cache.read(root / "x.npz", tfds.ARRAYS)
    if found is None:
        raise UserError("decoded again")
    return same(found, whole.arrays)


KINDS = {
    ticket: f"runs/run/{LEVEL}/{TICKET}",
    trained: f"runs/run/{DENSE}/trained.safetensors",
    checkpoint: f"runs/run/{LEVEL}/checkpoint_000000080.safetensors",
    spec_json: "runs/run/spec.json",
    metrics_csv: f"runs/run/{DENSE}/metrics.csv",
    summary_csv: "runs/run/summary.csv",
    run_json: "runs/run/run.json",
    flag_file: "x.flags",
    cache_npz: "x.npz",
}


# Damage.


def damaged(data, rng, others):
    """The bytes of a file, damaged without a thought."""
    data, size = bytearray(data), max(len(data), 1)
    at, to = sorted((rng.randrange(size), rng.randrange(size)))
    how = rng.randrange(10)
    if how == 0:
        return bytes(data[:at])
    if how == 1:
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif how == 2:
        data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif how == 3:
        del data[at:to]
    elif how == 4:
        data[at:at] = data[at:to]
    elif how == 5:
        data[at:to] = bytes(to - at)
    elif how == 6:
        data = bytearray(rng.choice([b"", b"\n", rng.randbytes(200), b"\xff\xfe\0", b"[" * 70_000]))
    elif how == 7:
        data = bytearray(rng.choice(others))
    elif how == 8:
        data[at] = rng.choice(b'0123456789-eE.,"{}[]\n\0 ')
    else:
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        if digits:
            data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    return bytes(data)


def altered(value, rng):
    """A JSON value with one node made another one."""
    value = copy.deepcopy(value)
    nodes = []

    def visit(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in items:
            nodes.append((node, key))
            if isinstance(inner, (dict, list)):
                visit(inner)

    visit(value)
    node, key = rng.choice(nodes)
    how = rng.randrange(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[rng.choice(["levls", "", "x" * 300])] = node.pop(key)
    elif how == 2:
        other, name = rng.choice(nodes)
        node[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else 1
    else:
        node[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def crafted_tensors(data, rng, _):
    """A file whose checksum is right, and whose content was made up."""
    metadata = json.loads(safetensors_metadata(data))
    arrays = {name: np.array(a) for name, a in safetensors.numpy.load(data).items()}
    metadata.pop("sha256")
    how, name = rng.randrange(8), rng.choice(sorted(arrays))
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[name] = arrays[name].reshape(-1)[: rng.randrange(4)]
    elif how == 2:
        arrays[name] = arrays[name].astype(rng.choice(["int64", "float16", "uint8", "float64"]))
    elif how == 3:
        arrays[rng.choice(["x", "mask/x", "weights/x"])] = arrays[name]
    elif how == 4:
        arrays[name] = np.full_like(arrays[name], rng.choice([0, 1, 255]) % 256)
    else:
        metadata = altered(metadata, rng)
    try:
        text = json.dumps({**metadata, "sha256": storage._checksum(arrays, metadata)})
        return safetensors.numpy.save(arrays, {storage.METADATA_KEY: text})
    except (ValueError, TypeError, UnicodeError):
        return data[:-1]


def safetensors_metadata(data):
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"][storage.METADATA_KEY]


def crafted_json(data, rng, _):
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = altered(value, rng) or {"x": 1}
    text = json.dumps(value)
    if rng.random() < 0.1:
        text = text[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}"
    return text.encode()


def crafted_csv(data, rng, _):
    rows = [line.split(",") for line in data.decode().split("\n")[:-1]]
    how, row = rng.randrange(7), rng.randrange(len(rows))
    column = rng.randrange(len(rows[row]))
    if how == 0:
        rows.insert(rng.randrange(len(rows) + 1), list(rows[row]))
    elif how == 1:
        del rows[row]
    elif how == 2:
        other = rng.randrange(len(rows))
        rows[row], rows[other] = rows[other], rows[row]
    elif how == 3:
        for each in rows:
            del each[column]
    else:
        texts = ["", "nan", "inf", "-1", "1e400", "1_0", "9" * 400, "9" * 5000, "x", "\0", '"',
                 "a" * 200_000, "\u0663", " 1", "0x1", "1e3", "10", "0"]  # fmt: skip
        rows[row][column] = rng.choice(texts)
    return "".join(",".join(each) + "\n" for each in rows).encode()


def crafted_flags(data, rng, _):
    lines = data.decode().split("\n")
    words = ["--seed=" + "9" * 400, "--=", "-", "--", "--flagfile=", "--flagfile=x.flags", "--no",
             "--learning_rate=nan", "--lr_drops=1,,2", "--preset=mnist_lenet_imp", "--levels",
             "--levels=1e3", "--densty=1", "--flagfile=/", "--undefok=levels", "--histograms=",
             "--scope=\u0663", "stray", "--model=lenet_0", "--seed=-1"]  # fmt: skip
    lines.insert(rng.randrange(len(lines)), rng.choice(words))
    return "\n".join(lines).encode()


def crafted_npz(data, rng, _):
    with np.load(io.BytesIO(data)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    names = sorted(arrays)
    one, other = rng.choice(names), rng.choice(names)
    how = rng.randrange(4)
    if how == 0:
        arrays[one], arrays[other] = arrays[other], arrays[one]
    elif how == 1:
        del arrays[one]
    elif how == 2:
        arrays[one] = arrays[one].reshape(-1)[:1].astype(rng.choice(["U8", "S3", "O"]))
    else:
        arrays[one] = np.array([{"a": 1}], object)
    content = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(content, **arrays)
    return content.getvalue()


SEALED = ticket, trained, checkpoint, metrics_csv, cache_npz  # by a checksum
CRAFT = {
    ticket: crafted_tensors, trained: crafted_tensors, checkpoint: crafted_tensors,
    spec_json: crafted_json, run_json: crafted_json, metrics_csv: crafted_csv,
    summary_csv: crafted_csv, flag_file: crafted_flags, cache_npz: crafted_npz,
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_file_crashes_a_reader_or_is_taken_for_another(kind, whole, tmp_path):
    root, rng = tmp_path / "root", random.Random(f"{SEED} {kind.__name__}")
    shutil.copytree(whole.root, root)
    sources = [(whole.root / name).read_bytes() for name in KINDS.values()]
    path, own = root / KINDS[kind], (whole.root / KINDS[kind]).read_bytes()
    counts, bad = collections.Counter(), []
    for number in range(-(-COUNT // len(KINDS))):
        damage = CRAFT[kind] if rng.random() < 0.5 else damaged
        data = damage(own, rng, sources)
        path.write_bytes(data)
        try:
            outcome = {True: "the same", None: "possible", False: "wrong"}[kind(root, whole)]
        except UserError as error:
            outcome = "refused"
            # Of a flag file the whole flag is shown.
            if "\n" in str(error) or (len(str(error)) > 2000 and kind is not flag_file):
                bad.append((number, damage.__name__, str(error)[:2000]))
        except Exception as error:
            outcome = "crash"
            bad.append((number, damage.__name__, f"{type(error).__name__}: {error}"[:300]))
        if outcome == "possible" and damage is damaged and kind in SEALED:
            outcome = "wrong"
        if outcome == "wrong" and data != own:
            bad.append((number, damage.__name__, f"taken: {data[:300]!r}"))
        counts[outcome] += 1
    print(f"\n{kind.__name__}: {dict(counts)}")
    path.write_bytes(own)
    assert kind(root, whole) is not False  # what is whole is read
    assert not bad, bad[:5]


# Single ones.


@pytest.mark.parametrize(
    "content, message",
    [
        ("--levels=1\n# \xfc\n".encode("latin-1"), "x.flags' cannot be read .*utf-8"),
        (b"--flagfile=x.flags\n", "x.flags' names itself"),
        (b"--flagfile=nowhere.flags\n", "there is no flag file 'nowhere.flags', which .* names"),
        (b"\0\xff", "cannot be read"),
    ],
)
def test_flag_files_that_are_no_text(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("x.flags").write_bytes(content)
    with pytest.raises(UserError, match=message):
        flags.expand(["lth", "--flagfile=x.flags"])


def test_a_spec_with_endless_numbers(tmp_path):
    experiments.write_spec(tmp_path, Spec())
    values = json.loads((tmp_path / "spec.json").read_text())
    for name in ("seed", "learning_rate", "lr_drops", "train_steps"):
        for endless in (10**400, -(10**400), 10**5000):
            value = [endless] if name == "lr_drops" else endless
            shown = "9" * 5000 if abs(endless) > 10**500 else json.dumps(value)
            text = json.dumps({**values, name: "@"}).replace('"@"', shown)
            (tmp_path / "spec.json").write_text(text)
            with pytest.raises(UserError, match="spec.json' cannot be read .*; delete it"):
                experiments.read_spec(tmp_path)


def test_metrics_that_are_empty(tmp_path):
    for text in ("", "\n", ",".join(states.columns("accuracy")) + "\n"):
        (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(UserError, match="metrics.csv' is damaged .*the training is done again"):
            summary.read_metrics(tmp_path / "metrics.csv")
