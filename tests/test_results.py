"""The recorded runs: packed metrics give back the single files, summaries follow from them."""

import csv
import gzip
import hashlib
import pathlib

import metrics
import pytest

from lth_tf import experiments
from lth_tf.analysis import comparison
from lth_tf.analysis.summary import read_csv, write_csv
from lth_tf.recipes import RECIPES
from lth_tf.tasks import metric_of

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
MOVING = ("flow_", "moving_", "gru_")  # recorded later
RUNS = sorted(path.parent.name for path in RESULTS.glob("*/summary.csv"))
FIRST = [run for run in RUNS if not run.startswith(MOVING)]
# sha256 of the lines that sha256sum printed of all metrics.csv, before they were packed.
SINGLE_FILES = "10ec0a85db4c60d3b9cdc465bc01abaf70f8cbd75c971f791ccf7b21a2bec1a2"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_the_single_files_come_back(tmp_path):
    for run in FIRST:
        metrics.unpack(RESULTS / run / "metrics.csv.gz", tmp_path / run)
    paths = sorted(f"./{p.relative_to(tmp_path)}" for p in tmp_path.rglob("metrics.csv"))
    assert len(paths) == 341
    lines = "".join(f"{sha256((tmp_path / p).read_bytes())}  {p}\n" for p in paths)
    assert sha256(lines.encode()) == SINGLE_FILES
    assert SINGLE_FILES in (RESULTS / "README.md").read_text()


@pytest.mark.parametrize("run", RUNS)
def test_packed_again_they_say_the_same(run, tmp_path):
    file = RESULTS / run / "metrics.csv.gz"
    metrics.unpack(file, tmp_path)
    metrics.pack(tmp_path, tmp_path / "a.gz")
    metrics.pack(tmp_path, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == gzip.decompress(file.read_bytes())


@pytest.mark.parametrize("run", RUNS)
def test_summaries_follow_from_the_metrics(run):
    """Early stop and end, written down anew: the lowest validation loss, the last evaluation."""
    trainings = metrics.read(RESULTS / run / "metrics.csv.gz")
    summary = read_csv(RESULTS / run / "summary.csv")
    assert [(r["replicate"], r["level"], r["arm"]) for r in summary] == list(trainings)
    spec = experiments.read_spec(RESULTS / run)
    settled = RECIPES[spec.recipe].settled(spec)  # the step from which on the density is that told
    name = metric_of(summary[0])
    for row, text in zip(summary, trainings.values(), strict=True):
        found = list(csv.DictReader(text.splitlines()))
        first = settled if row["level"] else 0
        count = [r for r in found if int(r["step"]) >= first]
        best = min(count, key=lambda r: float(r["validation_loss"]))
        assert row["early_stop_step"] == int(best["step"])
        assert row["validation_loss_min"] == float(best["validation_loss"])
        assert row[f"test_{name}_early"] == float(best[f"test_{name}"])
        assert row[f"test_{name}_end"] == float(found[-1][f"test_{name}"])
        assert row["steps"] == int(found[-1]["step"]) - int(found[0]["step"])
        assert row["seconds"] == float(found[-1]["seconds"])


@pytest.mark.parametrize(
    "of, methods",
    [
        ("fashion", ("imp", "grasp", "snip", "synflow", "magnitude", "random")),
        ("cifar10", ("grasp", "snip", "synflow", "magnitude", "random")),
    ],
)
def test_comparisons_follow_from_the_summaries(of, methods, tmp_path):
    workdirs = [RESULTS / f"{of}_{method}" for method in methods]
    found = comparison.compare([(w, experiments.read_spec(w)) for w in workdirs])
    rows = comparison.rows(found)
    write_csv(tmp_path / "comparison.csv", list(rows[0]), rows)
    recorded = (RESULTS / f"{of}_compared" / "comparison.csv").read_text()
    assert (tmp_path / "comparison.csv").read_text() == recorded


def test_what_cannot_be_packed_is_refused(tmp_path):
    folder = tmp_path / "replicate_00" / "level_00"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no metrics.csv"):
        metrics.pack(tmp_path, tmp_path / "metrics.csv.gz")
    (folder / "metrics.csv").write_text("step,loss\n0,\n10,0.5")
    with pytest.raises(ValueError, match="cut off"):
        metrics.pack(tmp_path, tmp_path / "metrics.csv.gz")
