"""What recorded runs say: tables of Markdown, and the numbers in the sentences around them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf.analysis import points, read_summary, winning
from lth_tf.analysis.summary import read_csv

RESULTS = Path(__file__).resolve().parent.parent / "results"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Returns a table, all but the first `left` columns to the right."""
    lines = [header, [*["---"] * left, *["--:"] * (len(header) - left)], *rows]
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(line)} |") for line in lines)


def spread(values: np.ndarray, form: str = "{:.2f}") -> str:
    """Returns 'mean ± sample standard deviation', of one value only that."""
    text = form.format(values.mean())
    return text if len(values) == 1 else f"{text} ± {form.format(values.std(ddof=1))}"


# The ticket paper's LeNet on MNIST.


def lenet(run: str) -> dict[tuple[str, int], Any]:
    """Returns (arm, level) -> `analysis.Point` of a recorded run."""
    return {(p.arm, p.level): p for p in points(read_summary(RESULTS / run))}


def lenet_table(run: str) -> str:
    """Dense, tickets and re-initialised ones, at the levels where these were trained."""
    found = lenet(run)
    rows = []
    for level in sorted({level for arm, level in found if arm == "reinit"} | {0}):
        row = [f"{found['ticket', level].density:.1%}"]
        for arm in ("ticket", "reinit"):
            p = found.get((arm, level))
            row += ["", "", ""] if p is None else [
                spread(p.early_stop_step, "{:,.0f}"),
                spread(p.metric_early * 100),
                spread(p.metric_end * 100),
            ]  # fmt: skip
        rows.append(row)
    step, there, end = "early-stop step", "accuracy there", "at the end"
    header = ["density", f"ticket: {step}", there, end, f"re-initialised: {step}", there, end]
    return markdown(header, rows, left=0)


class Lenet:
    """What the means of a run over its replicates say beside the paper's section 2."""

    def __init__(self, run: str):
        self.found = lenet(run)
        self.dense = self.found["ticket", 0]
        self.winning = winning(read_summary(RESULTS / run))
        self.levels = [level for arm, level in self.found if arm == "ticket" and level]

    def steps(self, level: int, arm: str = "ticket") -> float:
        """The mean early-stop step."""
        return self.found[arm, level].early_stop_step.mean()

    def early(self, level: int, arm: str = "ticket") -> float:
        """Accuracy at early stop in percentage points above dense."""
        mine, dense = self.found[arm, level].metric_early, self.dense.metric_early
        return round((mine.mean() - dense.mean()) * 100, 6)

    def density(self, level: int) -> str:
        """In %."""
        return f"{self.found['ticket', level].density * 100:.1f}"

    def end(self) -> float:
        """The most that tickets are above dense at the end, in percentage points."""
        best = max(self.found["ticket", level].metric_end.mean() for level in self.levels)
        return (best - self.dense.metric_end.mean()) * 100

    def below(self) -> str:
        """Between which levels re-initialised ones fall below dense at early stop, for good."""
        tried = sorted(level for arm, level in self.found if arm == "reinit")
        last = max(level for level in tried if self.early(level, "reinit") >= 0)
        after = min(level for level in tried if level > last)
        return f"between {self.density(last)} and {self.density(after)} %"

    def faster(self, level: int) -> float:
        """How many times as many steps re-initialised ones need."""
        return self.steps(level, "reinit") / self.steps(level)

    def earlier(self, level: int) -> float:
        """The fraction of dense's steps that tickets need less."""
        return 1 - self.steps(level) / self.steps(0)

    def ahead(self, level: int) -> float:
        """Accuracy of tickets at early stop above re-initialised ones'."""
        return self.early(level) - self.early(level, "reinit")


def paper_table() -> str:
    """Beside the paper's numbers, the mean of five replicates of 50,000 steps."""
    short, long = Lenet("mnist_lenet_imp_15k"), Lenet("mnist_lenet_imp")
    each = short, long
    rows = [
        ["early stop of tickets at 21.1 %, against dense", "38 % earlier"]
        + [f"{x.earlier(7) * 100:.0f} % earlier" for x in each],
        ["accuracy at early stop at 13.5 %, against dense", "more than +0.3"]
        + [f"{x.early(9):+.2f}" for x in each],
        ["the same at 3.6 %", "equal"] + [f"{x.early(15):+.2f}" for x in each],
        [
            "accuracy after 50,000 steps, against dense",
            "up to +0.35",
            "",
            f"up to {long.end():+.2f}",
        ],
        ["tickets against re-initialised at 21.1 %", "2.51 times faster, +0.5"]
        + [f"{x.faster(7):.1f} times faster, {x.ahead(7):+.2f}" for x in each],
        ["re-initialised stay below dense at early stop", "from 21.1 % on"]
        + [x.below() for x in each],
    ]
    return markdown(["", "paper", "here, 15,000 steps", "here, 50,000 steps"], rows, left=4)


# Pruning before training.

NAMES = {
    "imp": "IMP", "synflow": "SynFlow", "snip": "SNIP", "grasp": "GraSP",
    "magnitude": "magnitude at initialisation", "random": "random",
}  # fmt: skip
ARMS = {"ticket": "", "shuffle": ", shuffled", "absolute": ", by absolute score"}


class Compared:
    """A recorded comparison.csv: accuracies at the end in %."""

    def __init__(self, folder: str, densities: Sequence[float]):
        self.rows, self.densities = read_csv(RESULTS / folder / "comparison.csv"), densities
        self.dense = next(row for row in self.rows if row["method"] == "dense")

    def row(self, method: str, arm: str, density: float) -> dict[str, Any] | None:
        """The row of (nearly) that density."""
        for row in self.rows:
            same = (row["method"], row["arm"]) == (method, arm)
            if same and abs(row["density"] / density - 1) < 0.02:
                return row
        return None

    def accuracy(self, method: str, density: float, arm: str = "ticket") -> float:
        """The mean."""
        row = self.row(method, arm, density)
        assert row is not None, (method, arm, density)
        return row["test_accuracy_end"] * 100

    def cell(self, method: str, arm: str, density: float) -> str:
        """The mean ± the deviation; nothing where nothing was trained."""
        row = self.row(method, arm, density)
        return "" if row is None else percent(row)

    def lost(self, method: str, density: float) -> float:
        """What shuffling within layers costs, in percentage points."""
        return self.accuracy(method, density) - self.accuracy(method, density, "shuffle")


def percent(row: dict[str, Any]) -> str:
    """Returns a row's accuracy: '87.95 ± 0.13', of one replicate '66.29'."""
    text, deviation = f"{row['test_accuracy_end'] * 100:.2f}", row["test_accuracy_end_deviation"]
    return text if deviation is None else f"{text} ± {deviation * 100:.2f}"


FASHION = Compared("fashion_compared", (0.1, 0.05, 0.02, 0.01))
CIFAR = Compared("cifar10_compared", (0.05, 0.02))


def fashion_table() -> str:
    """LeNet-5 on Fashion-MNIST: a row for each method and arm."""
    rows = [[f"dense, {percent(FASHION.dense)}", *[""] * 4]]
    arms = dict.fromkeys((row["method"], row["arm"]) for row in FASHION.rows[1:])
    for method, arm in sorted(arms, key=lambda a: ([*NAMES].index(a[0]), [*ARMS].index(a[1]))):
        name = NAMES[method] if arm == "ticket" else NAMES[method].split()[0] + ARMS[arm]
        if (method, arm) == ("imp", "ticket"):
            levels = " and ".join(", ".join(map(str, imp_levels())).rsplit(", ", 1))
            name += f" (trains {levels} networks before)"
        rows.append([name, *(FASHION.cell(method, arm, d) for d in FASHION.densities)])
    return markdown(["sparsity", *map(sparsity, FASHION.densities)], rows)


def imp_levels() -> list[int]:
    """Returns the levels of the iterative run that have the densities of the table."""
    found = points(read_summary(RESULTS / "fashion_imp"))
    return [
        next(p.level for p in found if p.arm == "ticket" and abs(p.density / d - 1) < 0.02)
        for d in FASHION.densities
    ]


def sparsity(density: float) -> str:
    """Returns '95 %' for 0.05."""
    return f"{(1 - density) * 100:.0f} %"


def cifar_table() -> str:
    """VGG-11 on a JPEG re-encoding of CIFAR-10: a row for each method, the best first."""
    header, rows = ["sparsity"], [[f"dense (JPEG), {percent(CIFAR.dense)}", *[""] * 4]]
    for d in CIFAR.densities:
        header += [sparsity(d), f"{sparsity(d)}, shuffled"]
    methods = [m for m in NAMES if CIFAR.row(m, "ticket", 0.05)]
    for method in sorted(methods, key=lambda m: -CIFAR.accuracy(m, 0.05)):
        row = [f"{NAMES[method].split()[0]} (JPEG)"]
        for d in CIFAR.densities:
            row += [CIFAR.cell(method, "ticket", d), CIFAR.cell(method, "shuffle", d)]
        rows.append(row)
    return markdown(header, rows)


BEFORE = [method for method in NAMES if method != "imp"]  # they prune before training


def everywhere(first: str, second: str) -> bool:
    """Says whether a method is the better one on Fashion-MNIST at every density."""
    return all(FASHION.accuracy(first, d) > FASHION.accuracy(second, d) for d in FASHION.densities)


def claims() -> dict[str, bool]:
    """Returns what docs/measured.md says without numbers -> whether it is so."""
    return {
        "iterative pruning beats all methods before training": all(
            everywhere("imp", m) for m in BEFORE
        ),
        "iterative pruning loses most by shuffling": all(
            FASHION.lost("imp", d) > FASHION.lost(m, d) for m in BEFORE for d in FASHION.densities
        ),
        "GraSP is the worst of GraSP, SNIP and SynFlow on LeNet-5": all(
            everywhere(m, "grasp") for m in ("snip", "synflow")
        ),
    }


def facts() -> dict[str, list[str]]:
    """Returns file -> what it has to say, in these words and numbers, line breaks aside."""
    dense = {of: f"dense {of.dense['test_accuracy_end'] * 100:.1f} %" for of in (FASHION, CIFAR)}
    return {
        "docs/measured.md": [*lenet_facts(), *fashion_facts(), *cifar_facts()],
        "flags/fashion_lenet5_oneshot.flags": [
            dense[FASHION],
            *(f"{m} {series(FASHION, m, FASHION.densities)}" for m in ("synflow", "snip", "grasp")),
            f"magnitude {series(FASHION, 'magnitude', (0.1, 0.05))}, then chance",
            f"random {series(FASHION, 'random', (0.1, 0.05))}, then chance",
        ],
        "flags/fashion_lenet5_imp.flags": [
            dense[FASHION],
            " and ".join(series(FASHION, "imp", FASHION.densities).rsplit(", ", 1)) + " %",
        ],
        "flags/cifar10_vgg11_oneshot.flags": [
            dense[CIFAR], *(f"{m} {series(CIFAR, m, CIFAR.densities)}" for m in BEFORE)
        ],
    }  # fmt: skip


def lenet_facts() -> list[str]:
    """What is said of the ticket paper's LeNet."""
    short, long = Lenet("mnist_lenet_imp_15k"), Lenet("mnist_lenet_imp")
    (early, agree), (end, agree_too) = (
        (series_of(f"{d * 100:.2f}" for d, _ in wins), series_of(f"{n}" for _, n in wins))
        for wins in (short.winning.early, short.winning.end)
    )
    once = [
        series_of(f"{d * 100:.2f}" for d, _ in wins)
        for wins in (long.winning.early, long.winning.end)
    ]
    fast = [level for level in range(1, 6) if long.steps(level) <= long.steps(0)]
    slow = [level for level in range(1, 6) if level not in fast]
    last = next(level for level in short.levels if short.steps(level) >= short.steps(0)) - 1
    minutes = [
        f"{sum(row['seconds'] for row in read_summary(RESULTS / run)) / 60:.0f}"
        for run in ("mnist_lenet_imp_15k", "mnist_lenet_imp")
    ]
    return [
        f"{' and '.join(minutes)} minutes of training",
        f"winning at {early} % density ({agree} of 3 replicates agree), of seven densities, and "
        f"match the dense network at the end, where re-initialised ones do not, at {end} % "
        f"({agree_too} of 3)",
        f"At 50,000 steps, one replicate, it is {once[0]} % and {once[1]} %, of ten:",
        f"they are {-long.early(1, 'reinit'):.2f} and {-long.early(3, 'reinit'):.2f} points below "
        f"it at {listed(long, [1, 3])} %, too, and not below it at {listed(long, [5, 7, 9])} %",
        f"the tickets at {listed(long, slow)} % are slower than the dense network and those at "
        f"{listed(long, fast)} % faster",
        f"the means are faster than dense from 80 to {short.density(last)} %",
    ]


def series_of(words: Iterable[str]) -> str:
    """Returns '3, 4 and 5'."""
    return " and ".join(", ".join(words).rsplit(", ", 1))


def fashion_facts() -> list[str]:
    """What is said of LeNet-5 on Fashion-MNIST."""
    at = FASHION.accuracy
    leads = {d: [at(m, d) - at("random", d) for m in NAMES if m != "random"] for d in (0.1, 0.05)}
    cut = {f"{at(m, d):.2f}" for m in ("magnitude", "random") for d in (0.02, 0.01)}
    left = min(at(m, d) for m in NAMES if m not in ("magnitude", "random") for d in (0.02, 0.01))
    behind = [at("snip", d) - at("grasp", d) for d in (0.1, 0.01)]
    lost = [f"{FASHION.lost('imp', d):.1f}" for d in FASHION.densities]
    signed = [at("grasp", d, "absolute") - at("grasp", d) for d in FASHION.densities]
    dealt = [FASHION.lost(m, 0.01) for m in ("snip", "synflow", "grasp")]
    return [
        f"beats random pruning at 90 % by {between(leads[0.1])} points and at 95 % by "
        f"{between(leads[0.05])}.",
        f"both are at chance, {' or '.join(cut)} %. The others are at "
        f"{math.floor(left * 10) / 10:.1f} % or above",
        f"from below SNIP, {behind[0]:.1f} points at 90 %, and has nearly caught up with it at "
        f"99 %, {behind[1]:.1f} points",
        f"by shuffling: {' and '.join(', '.join(lost).rsplit(', ', 1))} points",
        f"on LeNet-5 by {between(signed)} points",
        f"shuffling does cost them: {between(dealt)} points at 99 %",
        f"at 90 % it is {-FASHION.lost('grasp', 0.1):.1f} points worse than its own shuffled mask "
        f"and {behind[0]:.1f} points worse than SNIP",
    ]


def cifar_facts() -> list[str]:
    """What is said of VGG-11 on a JPEG re-encoding of CIFAR-10."""
    gained = [-CIFAR.lost(m, d) for m in BEFORE if m != "random" for d in CIFAR.densities]
    over = {
        m: [CIFAR.accuracy("magnitude", d) - CIFAR.accuracy(m, d) for d in CIFAR.densities]
        for m in ("snip", "grasp")
    }
    return [
        f"the shuffled masks are better by {between(gained)} points",
        f"better than SNIP by {over['snip'][0]:.1f} and {over['snip'][1]:.1f} points and than "
        f"GraSP by {over['grasp'][0]:.1f} and {over['grasp'][1]:.1f}",
    ]


def between(values: Iterable[float]) -> str:
    """Returns '0.1 to 2.6'."""
    found = list(values)
    return f"{min(found):.1f} to {max(found):.1f}"


def listed(run: Lenet, levels: Sequence[int]) -> str:
    """Returns '80, 41 and 33': densities in %."""
    return " and ".join(", ".join(f"{float(run.density(i)):.0f}" for i in levels).rsplit(", ", 1))


def series(of: Compared, method: str, densities: Sequence[float]) -> str:
    """Returns a method's accuracies: '88.8, 87.9, 86.9, 85.6'."""
    # Halves up, as a reader of 47.45 would: in binary it is a little less.
    return ", ".join(f"{of.accuracy(method, d) + 1e-9:.1f}" for d in densities)
