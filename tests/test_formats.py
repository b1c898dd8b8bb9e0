"""What earlier versions wrote is read, and gone on with; what later ones wrote is refused."""

import json
import pathlib
import shutil

import pytest
import safetensors.numpy

from lth_tf import datasets, experiments, pruning, storage
from lth_tf.analysis import read_summary
from lth_tf.analysis.summary import read_csv
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.tickets import load_ticket, load_trained
from lth_tf.training import Trainer, checkpoints

FORMATS = pathlib.Path(__file__).parent / "formats"
OLDER = sorted(p.name for p in FORMATS.iterdir() if p.is_dir())
LEVEL = "replicate_00/level_01"


def test_there_is_a_folder_for_each_older_format():
    assert OLDER == [str(number) for number in range(1, storage.FORMAT)]


@pytest.mark.parametrize("number", OLDER)
def test_every_kind_of_file_is_read(number):
    work = FORMATS / number / "interrupted"
    spec = experiments.read_spec(work)
    assert spec.model == "lenet_4_3" and spec.levels == 1
    ticket = load_ticket(work / LEVEL / "ticket.safetensors")
    assert ticket.density == pytest.approx(0.5, abs=0.01) and ticket.spec == spec
    trained = load_trained(work / "replicate_00/level_00/trained.safetensors")
    assert trained.keys() == ticket.weights.keys()
    state = checkpoints.latest(work / LEVEL, pytest.fail)
    assert state.step == 80 and {f"weights/{n}" for n in trained} < state.variables.keys()


@pytest.mark.parametrize("number", OLDER)
def test_an_interrupted_workdir_goes_on(number, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(FORMATS / number / "interrupted", work)
    before = {p: p.read_bytes() for p in work.rglob("level_00/*.safetensors")}
    steps = []

    class Said:
        """Shows nothing, and keeps what is said."""

        def __init__(self, plan):
            self.say = steps.append

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __getattr__(self, name):
            return lambda *_: None

    rows = experiments.imp(experiments.read_spec(work), work, datasets.load("digits"), Said)
    assert any("level 1 ticket: goes on at step 80 of 120" in text for text in steps)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    whole = read_csv(FORMATS / number / "whole" / "metrics.csv")
    found = read_csv(work / LEVEL / "metrics.csv")
    assert [r["step"] for r in found] == [r["step"] for r in whole] == [20, 40, 80, 120]
    for row, wanted in zip(found, whole, strict=True):
        for column in ("loss", "validation_loss", "test_loss"):
            assert (row[column] is None) == (wanted[column] is None)
            if row[column] is not None:
                assert row[column] == pytest.approx(wanted[column], rel=1e-4)
    recorded = read_summary(FORMATS / number / "whole")
    assert [(r["arm"], r["level"]) for r in rows] == [(r["arm"], r["level"]) for r in recorded]


def sealed(path, target, **changes):
    """The same file with other metadata, whole by its checksum."""
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["lth_tf"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("sha256")
    metadata |= changes
    metadata["sha256"] = storage._checksum(arrays, metadata)
    target.write_bytes(safetensors.numpy.save(arrays, {"lth_tf": json.dumps(metadata)}))


REFUSED = f"has format {storage.FORMAT + 1}, .* knows those up to {storage.FORMAT}: a later version"


@pytest.mark.parametrize(
    "name, read",
    [("ticket", load_ticket), ("trained", load_trained), ("checkpoint_000000080", None)],
)
def test_what_a_later_version_wrote_is_refused_and_left_alone(name, read, tmp_path):
    source = FORMATS / OLDER[-1] / "interrupted" / LEVEL
    source = source if name != "trained" else source.with_name("level_00")
    path = tmp_path / f"{name}.safetensors"
    sealed(source / path.name, path, format_number=storage.FORMAT + 1)
    with pytest.raises(UserError, match=REFUSED):
        read(path) if read else checkpoints.latest(tmp_path, pytest.fail)
    assert path.exists()


def test_a_later_spec_is_refused(tmp_path):
    experiments.write_spec(tmp_path, Spec())
    assert experiments.read_spec(tmp_path) == Spec()
    text = (tmp_path / "spec.json").read_text()
    assert json.loads(text) == {**Spec().as_dict(), "format_number": storage.FORMAT}
    newer = text.replace(f'"format_number": {storage.FORMAT}', '"format_number": 99')
    (tmp_path / "spec.json").write_text(newer)
    with pytest.raises(UserError, match="has format 99, .* a later version"):
        experiments.read_spec(tmp_path)


def test_a_checkpoint_of_now_has_the_mask(tmp_path):
    work = FORMATS / OLDER[-1] / "interrupted"
    spec, ticket = experiments.read_spec(work), load_ticket(work / LEVEL / "ticket.safetensors")
    states = []
    trainer = Trainer(spec, datasets.load("digits"))
    trainer.train(ticket.weights, ticket.mask, 20, 60, keep=states.append)
    checkpoints.save(tmp_path, states[0])
    found = checkpoints.latest(tmp_path, pytest.fail)
    assert found.step == 40 and found.mask.keys() == ticket.mask.keys()
    assert all((found.mask[n] == m).all() for n, m in ticket.mask.items())
    assert pruning.get_mask(trainer.model).keys() == found.mask.keys()


@pytest.mark.parametrize("number", OLDER)
@pytest.mark.parametrize("changes", [{"step": -5}, {"step": 10**9}, {"step": 120}, {"since": 81},
                                     {"rows": []}, {"seconds": None}])  # fmt: skip
def test_a_checkpoint_that_no_training_has_is_a_damaged_one(number, changes, tmp_path):
    source, here = FORMATS / number / "interrupted" / LEVEL, tmp_path / LEVEL
    shutil.copytree(source, here)
    ticket, said = load_ticket(here / "ticket.safetensors"), []
    newest = here / "checkpoint_000000080.safetensors"
    sealed(newest, newest, **changes)
    if changes.get("step", 0) > 80:
        newest.rename(here / f"checkpoint_{changes['step']:09d}.safetensors")
    assert checkpoints.latest(here, said.append, ticket, 120).step == 40
    assert len(said) == 1 and "a checkpoint is damaged, going on from the one before" in said[0]


def test_deep_json_in_a_checkpoint_leaves_the_one_before(tmp_path):
    here = tmp_path / LEVEL
    shutil.copytree(FORMATS / OLDER[-1] / "interrupted" / LEVEL, here)
    deep = safetensors.numpy.save({}, {"lth_tf": "[" * 100_000})
    (here / "checkpoint_000000080.safetensors").write_bytes(deep)
    said = []
    assert checkpoints.latest(here, said.append).step == 40 and len(said) == 1


@pytest.mark.parametrize("number", OLDER)
@pytest.mark.parametrize("name", ["ticket", "trained"])
def test_whose_an_older_file_is_is_checked_too(number, name, tmp_path):
    shutil.copytree(FORMATS / number / "interrupted", tmp_path / "work")
    name, level = f"{name}.safetensors", tmp_path / "work" / LEVEL
    shutil.copy(level.with_name("level_00") / name, level / name)
    with pytest.raises(storage.OtherFile, match=f"{name}' is whole, but not .*level is 0, not 1"):
        (load_ticket if name.startswith("ticket") else load_trained)(level / name)


def test_tickets_of_one_folder_are_told_apart(tmp_path):
    shutil.copytree(FORMATS / OLDER[-1] / "interrupted", tmp_path / "work")
    level = (tmp_path / "work" / LEVEL).with_name("level_00")
    shutil.copy(level / "rewind.safetensors", level / "ticket.safetensors")
    with pytest.raises(storage.OtherFile, match="rewind_step is 20, not 0"):
        load_ticket(level / "ticket.safetensors")
