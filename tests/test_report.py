"""What is shown to a person."""

import dataclasses
import io
import re

import matplotlib.figure
import numpy as np
import pytest
import rich.console

from lth_tf import masks, report
from lth_tf.analysis import Point, Winning
from lth_tf.analysis.comparison import Comparison
from lth_tf.bench.loops import train_table
from lth_tf.bench.scores import score_table
from lth_tf.experiments import plan
from lth_tf.experiments.branches import BRANCHES
from lth_tf.report.comparison import comparison_figure, comparison_table
from lth_tf.report.figure import COLOURS
from lth_tf.report.tables import ARMS
from lth_tf.scopes import SCOPES
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
PICKED = [r for r in ROWS if r["level"] > 0]  # lth-oneshot trains no dense network by itself
ALL = [
    row(arm, r, level, 0.5**level, 50 + 7 * level, 0.9 - i / 50, 0.95 - i / 50)
    for r in range(2)
    for level in (1, 2)
    for i, arm in enumerate(("ticket", "reinit", "shuffle", "invert", "absolute"))
]


def test_plan_shows_every_kernel_and_the_work():
    spec = Spec(model="lenet_20_10", levels=1, train_steps=100, prune_fraction_output=0.0,
                prune_fraction=0.5, dataset="digits", replicates=3)  # fmt: skip
    text = text_of(*report.plan_tables(plan(spec, (8, 8, 1), 10), spec))
    for piece in ("fc1/kernel", "64 x 20", "1,280", "640", "protected", "6 trainings", "600 steps"):
        assert piece in text, piece


def plan_of(**changes):
    """A plan, and what is shown of it without lines and spaces."""
    spec = Spec(**{"recipe": "one_shot", "model": "lenet_20_10", "dataset": "digits",
                "train_steps": 100, **changes})  # fmt: skip
    planned = plan(spec, (8, 8, 1), 10)
    text = text_of(*report.plan_tables(planned, spec))
    return planned, " ".join(re.sub("[^ -~±]", " ", text).split())


@pytest.mark.parametrize(
    "changes, pieces",
    [
        (
            {"scope": "global"},
            ["kept at the last level", "by rank", "316 (20.00%)", "by grasp in 1 round(s), scope "
             "global; densities 50.000%, 20.000%", "2 trainings: 1 replicate(s) of 2 level(s) and "
             "0 control(s); 200 steps"],
        ),
        (
            {"scorer": "synflow", "replicates": 2, "dense": True, "density": (0.001, 0.5)},
            ["by synflow in 100 round(s), scope layerwise; densities 50.000%, 0.100%",
             "6 trainings: 2 replicate(s) of 3 level(s) and 0 control(s); 600 steps"],
        ),
        (
            {"scorer": "snip", "rounds": 5, "controls": ("shuffle", "reinit")},
            ["by snip in 5 round(s)", "6 trainings: 1 replicate(s) of 2 level(s) and 4 control(s)"],
        ),
        (
            {"scope": "global", "protect": ("output*",)},
            ["output/kernel 10 x 10 100 all", "fc1/kernel 64 x 20 1,280 by rank", "316 (20.00%)"],
        ),
    ],
)  # fmt: skip
def test_plan_of_tickets_picked_before_training(changes, pieces):
    planned, text = plan_of(**{"density": (0.5, 0.2), **changes})
    assert "removed per level" not in text and not planned.rates
    for piece in pieces:
        assert piece in text, piece


@pytest.mark.parametrize("scope", ["layerwise", "global", "uniform", "erk"])
def test_plan_tells_the_number_of_weights_that_the_scope_will_keep(scope):
    # Where rounding in each kernel gives one more; uniform keeps the first kernel, of 1,280.
    for density in (0.9, 0.85) if scope == "uniform" else (0.135, 0.185, 0.9):
        planned, text = plan_of(scope=scope, density=(density,))
        scores = {n: np.ones(s) for n, s in planned.shapes.items()}
        kept = masks.kept(SCOPES[scope](scores, density, min_per_layer=0))
        assert f"all 1,580 {kept:,} ({kept / 1580:.2%})" in text


def test_plan_counts_what_every_kernel_keeps_at_least():
    _, text = plan_of(density=(0.1,), min_per_layer=30)
    assert "fc2/kernel 20 x 10 200 30 " in text and "188 (11.90%)" in text


def test_plan_of_imp_names_protected_kernels():
    _, text = plan_of(recipe="imp", levels=1, protect=("fc1*",), scope="global")
    assert "fc1/kernel 64 x 20 1,280 protected all" in text
    assert "fc2/kernel 20 x 10 200 0.2 by rank" in text and "1,520 (96.20%)" in text


def test_table_without_a_dense_arm():
    text = text_of(report.results_table(PICKED))
    assert "dense" not in text and "over 2 replicate(s)" in text
    assert "25.00%" in text and "re-initialised" in text and "91.00%" in text
    assert "50.00%" not in text  # no control there
    without = text_of(report.results_table([r for r in PICKED if r["arm"] == "ticket"]))
    assert "50.00%" in without and "25.00%" in without and "dense" not in without


def test_table_with_all_arms_calls_each_by_its_name():
    for rows in (ALL, [*ALL, *(r for r in ROWS if r["level"] == 0)]):
        text = text_of(report.results_table(rows))
        for name in ("ticket", "re-initialised", "shuffled", "inverted", "by absolute score"):
            assert text.count(name) == 2, name
        assert text.count("dense") == (rows is not ALL)
        assert "90.00%" in text and "82.00%" in text


def test_every_branch_has_a_name_and_a_colour():
    assert {"ticket", *BRANCHES} == set(ARMS) == set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS) and len(set(ARMS.values())) == len(ARMS)


def test_table_has_dense_and_the_levels_with_controls():
    text = text_of(report.results_table(ROWS))
    assert "100 ± 14" in text and "97.50% ± 0.71" in text
    assert "re-initialised" in text and "91.00%" in text
    assert "50.00%" not in text  # no control there
    without = text_of(report.results_table([r for r in ROWS if r["arm"] == "ticket"]))
    assert "50.00%" in without


@pytest.mark.parametrize(
    "early, end, pieces",
    [
        (((0.2, 3), (0.05, 2)), ((0.02, 3),), [
            "winning at 2 of the 6 densities with a control, 20.00% (3 of 3 replicates agree) and "
            "5.00% (2 of 3): they", "do not, at 1 of them, 2.00% (3 of 3 replicates agree)."]),
        ((), ((0.1, 1), (0.05, 2), (0.02, 3)), [
            "winning at none of the 6 densities with a control: nowhere",
            "at 3 of them, 10.00% (1 of 3 replicates agree), 5.00% (2 of 3) and 2.00% (3 of 3)."]),
        (((0.05, 2),), (), [
            "winning at 1 of the 6 densities with a control, 5.00% (2 of 3 replicates agree): they",
            "At the end of training there is no density at which tickets match"]),
        ((), (), ["No winning ticket: at no density with a control"]),
    ],
)  # fmt: skip
def test_sentence(early, end, pieces):
    text = report.sentence(Winning(early, end, 3, 6))
    assert all(piece in text for piece in pieces), text
    assert "down to" not in text


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rows", [ROWS, PICKED, ALL, ALL[:1]], ids=["dense", "none", "all", "one"])
def test_figure_is_drawn_and_repeats(tmp_path, rows):
    report.figure(rows, tmp_path / "a.png", "title")
    report.figure(rows, tmp_path / "b.png", "title")
    a, b = (tmp_path / "a.png").read_bytes(), (tmp_path / "b.png").read_bytes()
    assert a.startswith(b"\x89PNG") and len(a) > 10_000 and a == b


def legend(rows, tmp_path, monkeypatch):
    """What the figure's first panel names, read off the drawing that is saved."""
    names = []

    class Kept(matplotlib.figure.Figure):
        def savefig(self, *args, **kwargs):
            names.extend(text.get_text() for text in self.axes[0].get_legend().get_texts())
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    report.figure(rows, tmp_path / "figure.png", "title")
    return names


def test_figure_names_what_it_shows(tmp_path, monkeypatch):
    assert legend(ROWS, tmp_path, monkeypatch) == ["dense", "ticket", "re-initialised"]
    assert legend(PICKED, tmp_path, monkeypatch) == ["ticket", "re-initialised"]
    assert legend(ALL, tmp_path, monkeypatch) == [
        "ticket", "by absolute score", "inverted", "re-initialised", "shuffled",
    ]  # fmt: skip


# Both.


def finished(rows, workdir, spec):
    console = rich.console.Console(file=io.StringIO(), width=60)
    report.finish(console, rows, workdir, spec)
    return console.file.getvalue()


def test_finish_says_that_tickets_win_only_where_it_was_compared(tmp_path):
    imp, one_shot = Spec(model="lenet_20_10"), Spec(recipe="one_shot", model="lenet_20_10")
    assert "Tickets are winning" in finished(ROWS, tmp_path, imp)
    assert "Tickets are winning" in finished(ROWS, tmp_path, one_shot)  # with --dense
    tuned = Spec(model="lenet_20_10", retrain="finetune")
    for rows, spec in ((PICKED, one_shot), (ROWS, tuned)):
        assert "inning" not in finished(rows, tmp_path, spec)


@pytest.mark.parametrize("rows", [[], PICKED])
def test_finish_prints_paths_as_they_are_and_in_one_line(tmp_path, rows):
    work = tmp_path / "a_rather_long_name_of_a_folder" / "[bold]run[0]"
    work.mkdir(parents=True)
    text = finished(rows, work, Spec(recipe="one_shot"))
    lines = text.splitlines()
    tickets = f"tickets: {work}/replicate_*/level_*/ticket.safetensors"
    assert any(line.startswith(tickets) for line in lines)
    assert (f"{work}/summary.csv" in lines) == (f"{work}/figure.png" in lines) == bool(rows)
    assert (work / "figure.png").exists() == bool(rows)


# Methods side by side.


def test_comparison_shows_each_method_and_arm_at_each_density(tmp_path):
    def point(arm, density, accuracies, level=1):
        values = np.array(accuracies)
        return Point(arm, level, density, tuple(range(len(values))), values * 0, values, values)

    found = Comparison(
        Spec(dataset="digits"),
        point("ticket", 1.0, [0.9, 0.92], level=0),
        {
            "grasp": [point("ticket", 0.1, [0.8, 0.82]), point("ticket", 0.01, [0.1])],
            "imp": [point("ticket", 0.1, [0.85]), point("shuffle", 0.1005, [0.7])],
        },
        [0.1, 0.01],
    )
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(comparison_table(found))
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    first = lines.index(["method", "arm", "0.1", "0.01"])
    assert lines[first + 2 :] == [
        ["dense", "91.00", "±1.41", "91.00", "±1.41"],
        ["grasp", "ticket", "81.00", "±1.41", "10.00"],
        ["imp", "ticket", "85.00"],
        ["shuffled", "70.00"],
    ]
    comparison_figure(found, tmp_path / "a.png")
    comparison_figure(found, tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:4] == b"\x89PNG" and content == (tmp_path / "b.png").read_bytes()
    without = dataclasses.replace(found, dense=None, methods={"imp": found.methods["imp"]})
    comparison_figure(without, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != content


def test_bench_tables_show_what_was_measured():
    console = rich.console.Console(width=100, file=io.StringIO())
    names = ["nothing", "gradient", "grasp"]
    console.print(
        score_table(
            {
                "model": "vgg19", "samples": 100,
                "seconds_by_name": {"gradient": 2.0, "grasp": 7.0},
                "ratio_seconds": {"gradient": 1.0, "grasp": 3.5},
                "peak_memory_mb": dict(zip(names, (1000.0, 2000.0, 3500.0), strict=True)),
                "above_model_mb": dict(zip(names, (0.0, 1000.0, 2500.0), strict=True)),
            }
        )
    )  # fmt: skip
    console.print(
        train_table(
            {
                "model": "conv4", "dataset": "cifar10", "ratio_fit": 1.25,
                "steps_per_second": {"lth_tf": 7.25, "fit": 1234.0},
            }
        )
    )  # fmt: skip
    text = console.file.getvalue()
    for words in ("3.50x", "2,500", "2.50x", "7.2", "1,234", "1.25x"):
        assert words in text
