"""Whether two trainings of a ticket in different orders end in one valley."""

import dataclasses

import numpy as np
import pytest
import rich.console

from lth_tf import datasets, experiments
from lth_tf.analysis.summary import read_csv
from lth_tf.errors import UserError
from lth_tf.experiments import stability
from lth_tf.report.stability import stability_figure, stability_table
from lth_tf.spec import Spec
from tests.test_tools import run

DIGITS = datasets.load("digits")
SPEC = Spec(
    model="lenet_8_6", dataset="digits", validation_size=100, batch_size=20, train_steps=40,
    eval_every=20, learning_rate=0.01, distribute="none", compile="off", levels=1, scope="global",
    prune_fraction=0.5, controls=("other_order",), replicates=2, rewind_step=10, checkpoint_every=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stability") / "imp"
    experiments.run(SPEC, folder, DIGITS)
    return folder


def test_pairs_are_tickets_and_their_trainings_in_another_order(work):
    spec, found = stability.pairs([work])
    assert spec == SPEC and [(p.rewind_step, p.level, p.replicate) for p in found] == [
        (10, 1, 0), (10, 1, 1)
    ]  # fmt: skip
    for pair in found:
        assert any(not np.array_equal(w, pair.other[n]) for n, w in pair.one.items())


def test_instability_is_the_rise_above_the_ends(work):
    spec, found = stability.pairs([work])
    rows, lines = stability.instability(spec, found, DIGITS, examples=200, points=5)
    assert len(rows) == 2 and len(lines) == 10
    for row in rows:
        mine = [r for r in lines if r["replicate"] == row["replicate"]]
        assert [r["share"] for r in mine] == [0, 0.25, 0.5, 0.75, 1]
        for column in ("train_error", "test_error", "train_loss", "test_loss"):
            values = [r[column] for r in mine]
            rise = max(values) - (values[0] + values[-1]) / 2
            assert row[f"{column}_instability"] == pytest.approx(rise)
    for replicate, folder in enumerate(sorted(work.glob("replicate_*"))):
        ends = [r for r in lines if r["replicate"] == replicate]
        for path, end in (("", ends[0]), ("branch_other_order", ends[-1])):
            last = read_csv(folder / "level_01" / path / "metrics.csv")[-1]
            assert end["test_error"] == pytest.approx(1 - last["test_accuracy"])
            assert end["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_table_and_figure_say_what_is_stable(tmp_path):
    about = {"level": 1, "density": 0.5}
    rows = [
        {**about, "rewind_step": k, "replicate": r, **{
            f"{n}_instability": 0.5 / (1 + k) for n in ("test_error", "train_error", "test_loss")
        }} for k in (0, 100) for r in (0, 1)
    ]  # fmt: skip
    lines = [
        {**about, "rewind_step": k, "replicate": r, "share": s, "test_error": s * (1 - s)}
        for k in (0, 100) for r in (0, 1) for s in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    console = rich.console.Console(width=120, record=True)
    console.print(stability_table(rows, SPEC))
    found = [line.split() for line in console.export_text().splitlines() if "stable" in line]
    assert [(line[0], line[-2:]) for line in found] == [
        ("0", ["not", "stable"]), ("100", ["2", "stable"])
    ]  # fmt: skip
    console.print(stability_table(rows, SPEC, fraction=False))
    assert "stable" not in console.export_text()
    stability_figure(rows, lines, SPEC, tmp_path / "a.png")
    stability_figure(rows, lines, SPEC, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_command_writes_it_down(work, tmp_path, monkeypatch, capsys):
    words = [f"--workdir={work}", f"--output={tmp_path}", "--examples=50", "--points=3"]
    code, out, err = run(monkeypatch, capsys, *words, name="stability")
    assert code == 0 and str(tmp_path / "stability.png") in out, err
    assert len(read_csv(tmp_path / "stability.csv")) == 2
    assert len(read_csv(tmp_path / "stability_lines.csv")) == 6


def test_what_cannot_be_looked_at_is_said(work, tmp_path):
    with pytest.raises(UserError, match="no workdirs given"):
        stability.pairs([])
    experiments.write_spec(tmp_path, SPEC)
    with pytest.raises(UserError, match="was trained in two orders: run lth-branch"):
        stability.pairs([tmp_path])
    other = tmp_path / "other"
    other.mkdir()
    experiments.write_spec(other, dataclasses.replace(SPEC, train_steps=41))
    with pytest.raises(UserError, match="differ in train_steps"):
        stability.pairs([work, other])
    with pytest.raises(UserError, match="points 2 and examples 9"):
        stability.instability(SPEC, [], DIGITS, examples=9, points=2)
