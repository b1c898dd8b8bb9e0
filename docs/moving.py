"""What recorded runs say of masks that move: tables of Markdown, and a figure."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recorded import RESULTS, markdown, sparsity, spread

from lth_tf.analysis import points, read_summary
from lth_tf.analysis.summary import read_csv
from lth_tf.experiments import read_spec
from lth_tf.tasks import task_of

FLOW = {
    "static": ("flow_static_none", "flow_static_fan_in"),
    "SET": ("flow_set_none", "flow_set_fan_in"),
    "RigL": ("flow_rigl_none", "flow_rigl_fan_in"),
}
PAPER = {  # Evci et al. 2022, table 1: LeNet-5 on MNIST
    "static": ("63", "97.6"), "SET": ("97.99", ""), "RigL": ("96.62", "98.41"),
}  # fmt: skip


def evaluations(run: str, file: str = "metrics.csv.gz") -> list[dict[str, str]]:
    """Returns the rows of a packed file."""
    with gzip.open(RESULTS / run / file, "rt") as stream:
        return list(csv.DictReader(stream))


def ends(run: str, level: int | None = None, arm: str = "ticket") -> np.ndarray:
    """Returns the metric at the end of each replicate, in % where that is what it is shown in."""
    found = [p for p in points(read_summary(RESULTS / run)) if p.arm == arm]
    level = max(p.level for p in found) if level is None else level
    (point,) = [p for p in found if p.level == level]
    return point.metric_end * task_of(point.metric).unit[0]


def flows(run: str, step: int, level: int = 1, arm: str = "ticket") -> np.ndarray:
    """Returns the gradient flow of the fixed batch at a step, of each replicate."""
    rows = evaluations(run)
    return np.array([
        float(r["gradient_flow_fixed"])
        for r in rows if (int(r["level"]), r["arm"], int(r["step"])) == (level, arm, step)
    ])  # fmt: skip


def raised(run: str) -> np.ndarray:
    """Returns what an update multiplies the flow by: the median of each replicate's updates."""
    found: dict[str, list[float]] = {}
    for row in evaluations(run, "updates.csv.gz"):
        if int(row["changed"]):
            ratio = float(row["gradient_flow_after"]) / float(row["gradient_flow_before"])
            found.setdefault(row["replicate"], []).append(ratio)
    return np.array([np.median(each) for each in found.values()])


def flow_table() -> str:
    """LeNet-5 at 95 %: accuracies, gradient flow at the start, and what updates do to it."""
    rows = [
        ["dense", spread(ends("flow_static_none", 0)), "", *_flow("flow_static_none", 0), ""],
        ["small dense (3-3-27-20)", spread(ends("flow_small_dense", 0)), "",
         *_flow("flow_small_dense", 0), ""],
    ]  # fmt: skip
    for method, runs in FLOW.items():
        for i, (name, run) in enumerate(zip(("", ", sparse init"), runs, strict=True)):
            moves = spread(raised(run)) if method != "static" else ""
            rows.append([method + name, spread(ends(run)), PAPER[method][i], *_flow(run, 1), moves])
    rows.append(["gradual pruning", spread(ends("flow_gmp")), "", *_flow("flow_gmp", 1), ""])
    last = max(p.level for p in points(read_summary(RESULTS / "flow_imp")))
    tickets = ("ticket", "lottery ticket", "98.26"), ("reinit", "its mask, re-initialised", "")
    for arm, name, paper in tickets:
        shown = spread(ends("flow_imp", last, arm))
        rows.append([name, shown, paper, *_flow("flow_imp", last, arm), ""])
    header = ["LeNet-5, MNIST, 95 %", "accuracy", "paper", "flow at the start", "after 1,000 steps",
              "an update times"]  # fmt: skip
    return markdown(header, rows)


def _flow(run: str, level: int, arm: str = "ticket") -> list[str]:
    return [f"{np.median(flows(run, step, level, arm)):.2g}" for step in (0, 1000)]


def table_of(runs: Mapping[str, Sequence[str]], densities: Sequence[float], dense: str = "") -> str:
    """A row for each method, a column for each density: the metric at the end, training FLOPs.

    Args:
      runs: name -> the runs that have its tickets; without any it has no row.
      densities: of the columns.
      dense: the run that has the dense network.
    """
    rows = []
    if dense:
        whole = _near(points(read_summary(RESULTS / dense)), 1.0)
        rows.append([f"dense, {_value(whole)}", *[""] * len(densities)])
    for name, those in runs.items():
        found = [p for run in those for p in points(read_summary(RESULTS / run))]
        near = [_near(found, d) for d in densities]
        if found:
            rows.append([name, *(_cell(p) if p else "" for p in near)])
    return markdown(["sparsity", *map(sparsity, densities)], rows)


def _near(found: Iterable[Any], density: float) -> Any:
    """The point of tickets (level 0: of the dense network) at about a density, if there is one."""
    close = (p for p in found if p.arm == "ticket" and abs(p.density / density - 1) < 0.03)
    return next(close, None)


def _value(point: Any) -> str:
    factor = task_of(point.metric).unit[0]
    return spread(point.metric_end * factor, "{:.2f}" if factor == 100 else "{:.3f}")


def _cell(point: Any) -> str:
    shown = _value(point)
    cost = point.flops.get("training_flops")
    return shown if cost is None else f"{shown} ({cost:.2f})"


METHODS = {"static": "static", "SET": "set", "RigL": "rigl", "SNFS": "snfs", "GraNet": "granet",
           "GMP": "gmp", "GraSP": "grasp", "IMP": "imp"}  # fmt: skip


def recorded_as(*forms: str) -> dict[str, list[str]]:
    """Returns of each method the runs that are there.

    Args:
      *forms: their names, with {} for the method: 'gru_{}'.
    """
    named = {name: [form.format(method) for form in forms] for name, method in METHODS.items()}
    return {n: [run for run in runs if (RESULTS / run).is_dir()] for n, runs in named.items()}


def relearned_table() -> str:
    """Where the solutions of LeNet-5 at 95 % lie to the networks that tickets were pruned from."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_csv(RESULTS / "flow_relearned" / "relearning.csv"):
        found.setdefault(row["group"], []).append(row)
    columns = {
        "angle_start_pruned": "angle of the start", "angle_end_pruned": "angle of the end",
        "distance_end_pruned": "distance of the end", "barrier_end_pruned": "loss barrier",
    }  # fmt: skip
    rows = [
        [name, *(spread(np.array([r[c] for r in each])) for c in columns),
         spread(np.array([100 * r["disagreement_pruned"] for r in each]))]
        for name, each in found.items()
    ]  # fmt: skip
    header = ["to the pruned network", *columns.values(), "predictions that differ, %"]
    return markdown(header, rows)


def fashion_table() -> str:
    """LeNet-5 on Fashion-MNIST, 1,000 steps: beside the recorded runs before training."""
    runs = recorded_as("moving_fashion_{}", "fashion_{}")
    return table_of(runs, (0.1, 0.05, 0.02, 0.01), "fashion_imp")


_LAST = {"sparse": 1, "grasp": 1, "imp": 5}  # sweep of the grid -> its level at 95 %


def grid() -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Method -> learning rate -> rows of finished runs at 95 %; the dense network's, too."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for sweep, last in _LAST.items():
        for row in read_csv(RESULTS / "moving_grid" / f"{sweep}.csv"):
            if row["status"] != "finished" or row["level"] not in (0, last):
                continue
            method = sweep if row["level"] else "dense"
            method = row["method"] if method == "sparse" else method
            rate = float(row["run"].split("learning_rate")[1].split("-")[0])
            found.setdefault(method, {}).setdefault(rate, []).append(row)
    return found


def chosen(rates: dict[float, list[dict[str, Any]]]) -> float:
    """Returns the rate with the smallest validation loss, of those whose run finished."""
    return min(rates, key=lambda r: np.mean([row["validation_loss_min"] for row in rates[r]]))


def grid_table() -> str:
    """The learning rates that all methods had to choose from, by their validation loss."""
    found, rates = grid(), (0.02, 0.05, 0.1, 0.2)
    rows = []
    for name, method in {"dense": "dense", **METHODS}.items():
        best, cells = chosen(found[method]), []
        for rate in rates:
            values = [100 * row["test_accuracy_end"] for row in found[method].get(rate, [])]
            shown = spread(np.array(values)) if values else "failed"
            cells.append(f"**{shown}**" if rate == best else shown)
        rows.append([name, *cells])
    return markdown(["rate", *map(str, rates)], rows)


def five_table() -> str:
    """LeNet-5 on Fashion-MNIST with five times the steps, each method at its learning rate."""
    runs = recorded_as("moving_five_{}", "moving_fivemore_{}")
    runs["RigL, rate 0.1"] = ["moving_slower_rigl"]
    return table_of(runs, (0.1, 0.05, 0.02, 0.01), "moving_five_dense")


def equal_table() -> str:
    """LeNet-5 on Fashion-MNIST at 95 %: what each method does with the same training FLOPs."""
    # static and SET have them after five times the steps
    runs = {name: those[0] for name, those in recorded_as("moving_five_{}").items()}
    runs |= {name: those[0] for name, those in recorded_as("moving_equal_{}").items() if those}
    rows = []
    for name, run in {"dense": "moving_equal_dense", **runs}.items():
        found, steps = points(read_summary(RESULTS / run)), read_spec(RESULTS / run).train_steps
        end = _near(found, 1.0 if name == "dense" else 0.05)
        paid = found if name == "IMP" else [end]  # its last ticket needs all trainings before
        cost = steps * sum(p.flops["training_flops"] for p in paid)
        rows.append([name, f"{steps:,}", f"{cost:,.0f}", _value(end)])
    return markdown(["95 %", "steps", "FLOPs, in dense steps", "accuracy"], rows)


def gru_table() -> str:
    """A GRU on tiny_shakespeare: bits per character."""
    return table_of(recorded_as("gru_{}"), (0.25, 0.1), "gru_static")


def cifar_table() -> str:
    """LeNet-5 with more channels on a JPEG re-encoding of CIFAR-10, at 95 %."""
    return table_of(recorded_as("moving_cifar_{}"), (0.05,), "moving_cifar_static")


def sweep_table() -> str:
    """RigL's interval and fraction: accuracy at the end at 98 %."""
    rows = [r for r in read_csv(RESULTS / "moving_sweep" / "index.csv") if r["level"] == 1]
    found: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        _, every, fraction, *_ = row["run"].replace("update_every", "-").replace(
            "drop_fraction", "").split("-")  # fmt: skip
        found.setdefault((int(every), float(fraction)), []).append(100 * row["test_accuracy_end"])
    intervals = sorted({every for every, _ in found})
    fractions = sorted({fraction for _, fraction in found})
    return markdown(
        ["updates every", *(f"fraction {f:g}" for f in fractions)],
        [[f"{e} steps", *(spread(np.array(found[e, f])) for f in fractions)] for e in intervals],
    )


def draw_flow(path: Path) -> None:
    """Writes the figure of the flow of gradients over training."""
    import matplotlib.figure

    from lth_tf.report.figure import save

    drawing = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    colours = {"static": "#0072B2", "SET": "#009E73", "RigL": "#D55E00"}
    for method, runs in FLOW.items():
        for ax, run in zip((left, right), runs, strict=True):
            _curve(ax, run, 1, "ticket", method, colours[method])
    last = max(p.level for p in points(read_summary(RESULTS / "flow_imp")))
    _curve(left, "flow_static_none", 0, "ticket", "dense", "0.4")
    _curve(left, "flow_imp", last, "ticket", "lottery ticket", "#000000")
    for ax, title in ((left, "initialised as a dense network"), (right, "sparse initialisation")):
        ax.set_title(title, fontsize="medium")
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    left.set_ylabel("gradient flow (first batch)")
    save(drawing, path)


def _curve(ax: Any, run: str, level: int, arm: str, label: str, colour: str) -> None:
    rows = [r for r in evaluations(run) if (int(r["level"]), r["arm"]) == (level, arm)]
    steps = sorted({int(r["step"]) for r in rows})
    each = [
        np.array([float(r["gradient_flow_fixed"]) for r in rows if int(r["step"]) == s])
        for s in steps
    ]
    ax.plot(steps, [np.median(v) for v in each], color=colour, label=label, lw=1.2)
    ax.fill_between(
        steps, [v.min() for v in each], [v.max() for v in each], color=colour, alpha=0.15, lw=0
    )
