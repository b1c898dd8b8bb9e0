"""The tables of the docs that follow from something else: recorded runs, and the code itself.

    make tables                         prints them all as Markdown
    make tables TABLES_ARGS=--write     puts them into the docs, and names sentences that are wrong

A page has a table between `<!-- table: NAME -->` and `<!-- end -->`. Its numbers come from
results/*/summary.csv and comparison.csv. What the text around says in numbers is looked for, not
written; see recorded.py. tests/test_docs.py holds the pages to both.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import moving
import recorded
from recorded import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n\n).*?(<!-- end -->)", re.DOTALL)


# What the docs say of the code.

FIRST_HOUR = [
    (["masks.py", "scopes.py"], "masks and scores as dicts of arrays; who competes with whom"),
    (
        ["scorers/baselines.py", "scorers/snip.py", "scorers/grasp.py", "scorers/synflow.py"],
        "a formula each",
    ),
    (
        ["pruning/masked.py", "pruning/models.py"],
        "`MaskedLayer`; `prune`, `set_mask`, the invariant",
    ),
    (["callbacks/rewind.py"], "the one door by which weights enter a model"),
    (["tickets/ticket.py"], "mask + start weights, and the file"),
    (["recipes/record.py", "recipes/imp.py", "recipes/one_shot.py"], "the recipes"),
]
SECOND_HOUR = [
    (["budgets.py"], "exact numbers of weights, and which these are"),
    (["spec.py", "schedules.py"], "one experiment as a value; densities and rates over time"),
    (["scorers/network.py"], "a model as a function of its kernels, and what is differentiated"),
    (
        ["training/feeds.py", "training/trainer.py", "training/graph.py"],
        "batches that need no replay; the loop, and what computes it",
    ),
    (["training/checkpoints.py"], "a state as a file"),
    (
        ["experiments/plans.py", "experiments/picking.py", "experiments/laboratory.py"],
        "what will be done, tickets picked before training, the workdir",
    ),
    (["experiments/branches.py"], "controls run off a ticket"),
]


def lines(paths: Iterable[str]) -> int:
    """Returns how many lines files of lth_tf/ have, as `wc -l` counts."""
    return sum((ROOT / "lth_tf" / path).read_text().count("\n") for path in paths)


def reading_table(chapters: list[tuple[list[str], str]]) -> str:
    """Files in the order to read them, with their lines."""
    rows = [
        [", ".join(f"`{path}`" for path in paths), what, f"{lines(paths):,}"]
        for paths, what in chapters
    ]
    total = lines(path for paths, _ in chapters for path in paths)
    return markdown(["file", "what it is", "lines"], [*rows, ["all", "", f"{total:,}"]], left=2)


def floors() -> list[set[str]]:
    """Returns FLOORS of tests/test_layering.py, from the ground up."""
    for node in ast.parse((ROOT / "tests" / "test_layering.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    raise LookupError("tests/test_layering.py has no FLOORS")


def floors_table() -> str:
    """The rooms from the top down, each with the first line of its docstring."""
    rows = []
    for number, names in reversed(list(enumerate(floors()))):
        for i, name in enumerate(sorted(names)):
            path = ROOT / ("tools" if name == "tools" else f"lth_tf/{name.replace('.', '/')}")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            what = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            shown = name if path.name != "__init__.py" else f"{name}/"
            rows.append([f"{number}" if i == 0 else "", f"`{shown}`", what])
    return markdown(["floor", "room", "what it is"], rows, left=3)


TABLES: dict[str, Callable[[], str]] = {
    "lenet-15k": lambda: recorded.lenet_table("mnist_lenet_imp_15k"),
    "lenet-50k": lambda: recorded.lenet_table("mnist_lenet_imp"),
    "lenet-paper": recorded.paper_table,
    "fashion": recorded.fashion_table,
    "cifar10": recorded.cifar_table,
    "flow": moving.flow_table,
    "relearned": moving.relearned_table,
    "fashion-moving": moving.fashion_table,
    "rates": moving.grid_table,
    "five-times": moving.five_table,
    "equal-flops": moving.equal_table,
    "gru": moving.gru_table,
    "cifar10-moving": moving.cifar_table,
    "rigl-sweep": moving.sweep_table,
    "floors": floors_table,
    "first-hour": lambda: reading_table(FIRST_HOUR),
    "second-hour": lambda: reading_table(SECOND_HOUR),
}


def missing() -> list[str]:
    """Returns what files should say and do not."""
    found = [
        f"docs/measured.md says what is not so: {name}"
        for name, so in recorded.claims().items()
        if not so
    ]
    for name, wanted in recorded.facts().items():
        text = " ".join((ROOT / name).read_text().replace("\n#", "\n").split())
        found += [f"{name} does not say: {each}" for each in wanted if each not in text]
    return found


def filled(text: str) -> str:
    """Returns a page with its tables as they should be."""
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n\n{m[3]}", text)


def main(write: bool) -> int:
    """Prints the tables or writes them; returns 1 if a page lacks what it has to say."""
    for name, table in TABLES.items():
        if not write:
            print(f"<!-- table: {name} -->\n\n{table()}\n\n<!-- end -->\n")
    for page in PAGES if write else ():
        page.write_text(filled(page.read_text()))
    for problem in (found := missing()):
        print(problem, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
