"""What is shown to a person."""

import io

import pytest
import rich.console

from lth_tf import report
from lth_tf.analysis import Winning
from lth_tf.experiment import plan
from lth_tf.spec import Spec


def text_of(*things):
    console = rich.console.Console(file=io.StringIO(), width=140)
    for thing in things:
        console.print(thing, highlight=False)
    return console.file.getvalue()


def row(arm, replicate, level, density, step, early, end):
    return {
        "arm": arm, "replicate": replicate, "level": level, "density": density,
        "early_stop_step": step, "validation_loss_min": 0.1, "test_accuracy_early": early,
        "test_accuracy_end": end, "steps": 100, "seconds": 1.0,
    }  # fmt: skip


ROWS = [
    row("ticket", 0, 0, 1.0, 90, 0.97, 0.98),
    row("ticket", 1, 0, 1.0, 110, 0.98, 0.97),
    row("ticket", 0, 1, 0.5, 50, 0.98, 0.98),
    row("ticket", 1, 1, 0.5, 70, 0.98, 0.98),
    row("ticket", 0, 2, 0.25, 50, 0.98, 0.98),
    row("reinit", 0, 2, 0.25, 99, 0.90, 0.91),
]


def test_plan_shows_every_kernel_and_the_work():
    spec = Spec(model="lenet_20_10", levels=1, train_steps=100, prune_fraction_output=0.0,
                prune_fraction=0.5, dataset="digits", replicates=3)  # fmt: skip
    text = text_of(*report.plan_tables(plan(spec, (8, 8, 1), 10), spec))
    for piece in ("fc1/kernel", "64 x 20", "1,280", "640", "protected", "6 trainings", "600 steps"):
        assert piece in text, piece


def test_table_has_dense_and_the_levels_with_controls():
    text = text_of(report.results_table(ROWS))
    assert "100 ± 14" in text and "97.50% ± 0.71" in text
    assert "re-initialised" in text and "91.00%" in text
    assert "50.00%" not in text  # no control there
    without = text_of(report.results_table([r for r in ROWS if r["arm"] == "ticket"]))
    assert "50.00%" in without


@pytest.mark.parametrize(
    "found, pieces",
    [
        (Winning((0.05, 2), (0.02, 3), 3), ["winning down to 5.00% density (2 of 3", "2.00% den"]),
        (Winning(None, (0.02, 3), 3), ["2.00% density (3 of 3 replicates agree)"]),
        (Winning((0.05, 2), None, 3), ["5.00% density (2 of 3 replicates agree)"]),
        (Winning(None, None, 3), ["No winning ticket"]),
    ],
)
def test_sentence(found, pieces):
    text = report.sentence(found)
    assert all(piece in text for piece in pieces)
    if found.early or found.end:
        assert ("at no density" in text) == (None in (found.early, found.end))


def test_figure_is_drawn_and_repeats(tmp_path):
    report.figure(ROWS, tmp_path / "a.png", "title")
    report.figure(ROWS, tmp_path / "b.png", "title")
    a, b = (tmp_path / "a.png").read_bytes(), (tmp_path / "b.png").read_bytes()
    assert a.startswith(b"\x89PNG") and len(a) > 10_000 and a == b
