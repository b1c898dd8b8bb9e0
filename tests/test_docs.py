"""The pages: what they link to is there, what they show runs, what they measured is so."""

import ast
import configparser
import dataclasses
import pathlib
import re
import shlex

import numpy as np
import pytest
import recorded
import tables

import lth_tf.flags
from lth_tf import datasets, experiments
from lth_tf.bench import MEASUREMENTS
from lth_tf.exporters import EXPORTERS
from lth_tf.flags import REGISTRIES
from lth_tf.models import MODELS
from lth_tf.recipes import RECIPES
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "results/README.md"]
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 200


def test_readme_shows_lines_of_the_whole_output():
    def shown(page):
        listing = max(INDENTED.findall(PAGES[page]), key=lambda text: text.count("│"))
        return [line.strip() for line in listing.splitlines()]

    short, whole = shown("README.md"), shown("docs/guide.md")
    assert len(short) > 20 and set(short) <= set(whole) and len(short) < len(whole)


# --- Links ---


def anchors(text):
    """What GitHub makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = sum(1 for a in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", a))
        found.add(f"{slug}-{same}" if same else slug)
    return found


def links(text):
    """Targets of links and images, code aside."""
    plain = re.sub(r"`[^`]*`", "", INDENTED.sub("", FENCED.sub("", text)))
    return re.findall(r"\]\(([^)\s]+)\)", plain)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert links(PAGES[page]), page
    for link in links(PAGES[page]):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page}: no heading for {link}"


# What a page has a reader write.
TO_BE_WRITTEN = {"lth_tf/scorers/fisher.py"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """`callbacks/rewind.py` is one below lth_tf/, `tests/test_docs.py` one below the root."""
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|flags))`", PAGES[page])
    for path in set(named) - TO_BE_WRITTEN:
        there = any((folder / path).exists() for folder in (ROOT, ROOT / "lth_tf"))
        assert there, f"{page} names {path}"


# --- Tables ---


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_a_header_and_rows_that_fit(page):
    text = FENCED.sub("", PAGES[page])
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        assert len(rows) > 2 and all(re.fullmatch(r" *-+:? *", cell) for cell in rows[1]), block
        assert {len(row) for row in rows} == {len(rows[0])}, block


LINES = {"first-hour", "second-hour"}  # numbers of lines, which every change moves a little


def marked():
    return [
        pytest.param(page, match[2], match[0], id=match[2])
        for page, text in PAGES.items()
        for match in tables.MARKED.finditer(text)
    ]


@pytest.mark.parametrize("page, name, shown", marked())
def test_tables_are_what_they_are_computed_from(page, name, shown):
    now = tables.filled(shown)
    if name not in LINES:
        assert shown == now, f"{page}: make tables TABLES_ARGS=--write"
        return
    numbers = re.compile(r"([\d,]+) \|$", re.MULTILINE)
    assert numbers.sub("", shown) == numbers.sub("", now), f"{page}: see `make tables`"
    for said, there in zip(numbers.findall(shown), numbers.findall(now), strict=True):
        said, there = int(said.replace(",", "")), int(there.replace(",", ""))
        assert abs(said - there) <= 15 + there / 10, f"{page}: make tables TABLES_ARGS=--write"


def test_every_table_is_shown_once():
    assert sorted(case.values[1] for case in marked()) == sorted(tables.TABLES)
    assert sum(text.count("<!-- end -->") for text in PAGES.values()) == len(tables.TABLES)


def test_sentences_say_what_was_measured():
    assert not tables.missing()
    assert all(recorded.claims().values()) and len(recorded.facts()["docs/measured.md"]) > 10


def test_the_core_is_read_in_an_hour():
    assert tables.lines(path for paths, _ in tables.FIRST_HOUR for path in paths) <= 2000


# --- Python ---


BLOCKS = [
    pytest.param(code, id=f"{page}:{text[: match.start()].count(chr(10)) + 1}")
    for page, text in PAGES.items()
    for match in FENCED.finditer(text)
    for language, code in [match.groups()]
    if language == "python"
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the workdir that the pages read from."""
    folder = tmp_path_factory.mktemp("home")
    spec = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, batch_size=60,
        train_steps=4, eval_every=2, levels=7, compile="off",
    )  # fmt: skip
    digits = datasets.load("digits")
    experiments.imp(spec, folder / "runs" / "mnist", digits)
    moves = {"recipe": "sparse", "levels": Spec().levels, "update_every": 2, "density": (0.2,)}
    sparse = dataclasses.replace(spec, **moves)
    experiments.run(sparse, folder / "runs" / "mnist_rigl", digits)
    return folder


@pytest.fixture
def given(home, monkeypatch):
    """What the pages take for given: a reader's model and data, and a folder to be in."""
    monkeypatch.chdir(home)
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_said", dict(registry._said))
    model = MODELS["lenet_300_100"]((8, 8, 1), 10, seed=0)
    digits = datasets.load("digits")
    chosen = np.concatenate([np.flatnonzero(digits.train_labels == c)[:10] for c in range(10)])
    x, y = (digits.train_inputs[chosen] / 255).astype(np.float32), digits.train_labels[chosen]
    return {"model": model, "x": x, "y": y, "batches": [(x, y)]}


# Blocks of the worked scorer that build on the file before them.
SCORER = re.compile(r"SCORERS\.register\(|\"fisher\"")


@pytest.mark.parametrize("code", BLOCKS)
def test_blocks_of_python_run(code, given):
    if SCORER.search(code):
        file = next(c.values[0] for c in BLOCKS if "def fisher(" in c.values[0])
        exec(compile(file, "the file of the page", "exec"), given)
        given["SCORERS"] = REGISTRIES["scorers"]
        if "SCORERS.register(" not in code:
            REGISTRIES["scorers"].register("fisher")(given["fisher"])
    exec(compile(code, "a block of the page", "exec"), given)


def test_blocks_show_what_they_should():
    shown = "\n".join(case.values[0] for case in BLOCKS)
    for name in ("Rewind", "Density", "one_shot_mask", "lth_tf.score(", "load_ticket", "fisher"):
        assert name in shown


# --- Commands ---

TOOLS = {"launch_local": "launch_local"} | {
    line.split(" = ")[0]: line.split("tools.")[1].split(":")[0]
    for config in [configparser.ConfigParser()]
    if config.read(ROOT / "setup.cfg")
    for line in config["options.entry_points"]["console_scripts"].strip().splitlines()
}
RECIPE_OF = {record.tool: name for name, record in RECIPES.items()}
COMMAND = re.compile(rf"(?:python -m lth_tf\.tools\.)?({'|'.join(TOOLS)})(?= |$)([^;#`]*)")


def commands(text):
    """(tool, words) of every command in a page's code."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", INDENTED.sub("", FENCED.sub("", text)))
    blocks = [code for language, code in FENCED.findall(text) if language != "python"]
    listings = "".join([*INDENTED.findall(text), *blocks]).replace("\\\n", " ")
    for line in [*(" ".join(span.split()) for span in spans), *listings.splitlines()]:
        if found := COMMAND.search(line):
            words = shlex.split(found[2].replace("...", ""))
            if any(word.startswith("--") for word in words) or found[1] == "lth-ticket":
                yield found[1], words


def own_flags(tool):
    """Names of the flags that a tool defines itself."""
    found = set()
    file = "experiment" if tool in RECIPE_OF else TOOLS[tool]
    for node in ast.walk(ast.parse((ROOT / "tools" / f"{file}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            found.add(ast.literal_eval(node.args[0]))
        elif isinstance(node, ast.Call) and "define_execution" in ast.unparse(node.func):
            found |= {"engine", "compact_training", "threads", ast.literal_eval(node.args[0])}
    assert found
    return found


def require_flags(tool, words):
    """Raises unless the tool would take these flags; placeholders stand for any value."""
    words, rest = words.copy(), []
    if "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1 :]
    if tool == "launch_local":
        require_flags(rest[0], rest[1:])
    recipe = RECIPE_OF.get(tool)
    if tool == "lth-bench":
        recipe = MEASUREMENTS[words.pop(0)].recipe
    if tool == "lth-ticket":  # a command, and files
        words = [word for word in words if word.startswith("--")]
    own, given = own_flags(tool), []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name in own | {"help"}:
            require_value(name, value)
        elif re.fullmatch(r"\$\w+|[A-Z]+", value):  # $s, S, MODEL
            assert name in {field.name for field in dataclasses.fields(Spec)}, word
        else:
            given.append(word)
    if tool == "lth-sweep":
        presets = re.findall(r"--presets=([\w]+)", " ".join(words))
        given += [*(f"--preset={name}" for name in presets), *rest]
        recipe = lth_tf.flags.recipe_of(given) or "imp"
    if recipe:
        lth_tf.flags.parse(given, recipe)
    else:
        assert not given, f"{tool} has no {given}"


def require_value(name, value):
    if name == "branch" and value.islower():
        assert all(each in REGISTRIES["branches"] for each in value.split(",")), value
    if name == "format":
        assert value in EXPORTERS, value


@pytest.fixture
def fisher():
    """The worked scorer, in the registry."""
    given = {}
    exec(next(c.values[0] for c in BLOCKS if "def fisher(" in c.values[0]), given)
    SCORERS.register("fisher")(given["fisher"])
    yield
    SCORERS.remove("fisher")


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, fisher):
    for tool, words in commands(PAGES[page]):
        try:
            require_flags(tool, list(words))
        except Exception as error:
            raise AssertionError(f"{page}: {tool} {shlex.join(words)}: {error}") from error


SLURM = {"signal", "gpus-per-task"}


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    known = {field.name for field in dataclasses.fields(Spec)} | SLURM
    known |= {"preset", "flagfile", "compression", "help", "fisher_power"}
    known = known.union(*map(own_flags, TOOLS), lth_tf.flags.scorer_flags())
    for span in re.findall(r"`(--[a-z][^`]*)`", FENCED.sub("", PAGES[page])):
        name = re.match(r"--([\w-]+)", span)[1]
        assert name in known, f"{page} names --{name}"


def test_the_readme_has_every_command_with_an_example():
    found = {tool for tool, _ in commands(PAGES["README.md"])}
    assert found == set(TOOLS)
    assert sum(len(list(commands(text))) for text in PAGES.values()) > 50
