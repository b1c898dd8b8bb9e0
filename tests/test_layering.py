"""Imports point down only, each library has its one door, and `import lth_tf` is quick."""

import ast
import configparser
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A room is a module or a package of lth_tf; it knows rooms of the floors below, and no others.
FLOORS = [
    {"compat", "errors", "masks"},
    {"budgets", "edge", "pruning", "registry", "storage"},
    {"compaction", "dynamic", "execution", "schedules", "scopes", "tasks"},
    {"callbacks", "recipes"},
    {"spec"},
    {"datasets", "distribute", "models", "tickets"},
    {"doctor", "scorers", "training"},
    {"analysis"},
    {"experiments", "verdict"},
    {"bench", "exporters", "flags", "report"},
    {"command", "sweeps"},
    {"tools"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
GROUND = {
    "dynamic", "edge", "errors", "execution", "masks", "recipes", "registry", "schedules", "scopes",
    "spec", "storage",
}  # fmt: skip
HEAVY = {"tensorflow", "tf_keras", "keras", "tensorflow_model_optimization", "absl"}
PACKAGE = sorted((ROOT / "lth_tf").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def module(path):
    """The dotted name: lth_tf.models, lth_tf.tools.imp."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lth_tf" else ("lth_tf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in (*PACKAGE, *TOOLS)}


@functools.cache
def imports(path):
    """(dotted name of what is imported, line, whether inside a function), in a file."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                # `from lth_tf import masks` imports a module, `from lth_tf.masks import size` not.
                whole = inner in MODULES or node.module == "absl"
                found.append((inner if whole else node.module, node.lineno, lazy))
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(path.read_text()), False)
    return tuple(found)


def part(name):
    """'scopes' of lth_tf.scopes, 'callbacks' of lth_tf.callbacks.rewind, '' of lth_tf."""
    return f"{name}.".split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor_and_imports_from_those_below(name):
    if name == "lth_tf":
        return
    here = FLOOR[part(name)]
    for other, line, _ in imports(MODULES[name]):
        if other.split(".")[0] == "lth_tf":
            assert part(other), f"{name}:{line}: import from the modules, not from the package"
            below = FLOOR[part(other)] < here or part(other) == part(name)
            assert below, f"{name}:{line} imports {other}, which is not below it"


def test_no_floor_names_what_does_not_exist():
    assert set(FLOOR) <= {part(name) for name in MODULES}


def test_ground_floor_knows_no_tensorflow():
    for name, path in MODULES.items():
        if part(name) in GROUND:
            roots = {other.split(".")[0] for other, *_ in imports(path)}
            assert not roots & HEAVY, name


def test_keras_and_tfmot_come_through_compat_only():
    doors = set()
    for name, path in MODULES.items():
        for other, line, lazy in imports(path):
            if other.split(".")[0] in HEAVY - {"absl"}:
                doors.add(name)
                allowed = name == "lth_tf.compat" or (name == "lth_tf.doctor" and lazy)
                assert allowed, f"{name}:{line} imports {other}"
    assert "lth_tf.compat" in doors


def test_flags_are_read_in_flags_and_tools_only():
    doors = set()
    for name, path in MODULES.items():
        if any(other.startswith(("absl.flags", "absl.app")) for other, *_ in imports(path)):
            doors.add(name)
    assert "lth_tf.flags" in doors
    assert all(name == "lth_tf.flags" or part(name) == "tools" for name in doors)


def test_tools_are_thin():
    assert len(TOOLS) > 2
    for path in TOOLS:
        assert len(path.read_text().splitlines()) <= 50, path.name


def test_setup_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    there = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert sorted(listed) == sorted({*there, "lth_tf.tools", "lth_tf.presets"})


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_import_does_not_load_tensorflow():
    loaded = python("import sys, lth_tf; dir(lth_tf); print(*sys.modules)").split()
    assert "lth_tf" in loaded and "numpy" not in loaded
    assert not HEAVY & set(loaded)


def test_ground_floor_does_not_load_tensorflow():
    names = [name for name in MODULES if part(name) in GROUND]
    loaded = python(f"import sys, {', '.join(names)}; print(*sys.modules)").split()
    assert set(names) < set(loaded) and not HEAVY & set(loaded)
