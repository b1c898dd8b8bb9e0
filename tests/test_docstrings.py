"""Public functions of three parameters or more say what these are."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {str(path.relative_to(ROOT / "lth_tf")): path for path in (ROOT / "lth_tf").rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
# Rooms that are being rebuilt; none when they are done.
UNFINISHED: set[str] = set()


def functions(tree):
    """(name, function, where its arguments are told) of all that is public in a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    # A class says in its own docstring what __init__ takes.
                    if each.name == "__init__":
                        yield node.name, each, node
                    elif not each.name.startswith("_"):
                        yield f"{node.name}.{each.name}", each, each
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, node


def parameters(function):
    """Names of the parameters, those aside that are handed on as they are (*args, **kwargs)."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def told(node):
    """Names that the docstring has under Args (or, of a class, Attributes)."""
    found = set()
    text = ast.get_docstring(node) or ""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?)+)", text, re.MULTILINE):
        for names in re.findall(r"^  ([\w*][\w*, ]*):", section, re.MULTILINE):
            found |= {name.strip(" *") for name in names.split(",")}
    return found


def registries():
    """Name of a registry -> docstring of the module that has it."""
    found = {}
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Reg"):
                found[node.target.id] = ast.get_docstring(tree)
    return found


def registered(function):
    """The registry that a function is entered in by decoration, if any."""
    for each in function.decorator_list:
        if found := re.fullmatch(r"(?:(\w+)\.)?register\(.+\)", ast.unparse(each)):
            return found[1] or "MODELS"  # by models.register
    return None


PUBLIC = [
    pytest.param(function, node, id=f"{file}:{name}")
    for file, tree in sorted(TREES.items())
    if pathlib.Path(file).parts[0].removesuffix(".py") not in UNFINISHED
    for name, function, node in functions(tree)
    if len(parameters(function)) > 2
]


@pytest.mark.parametrize("function, node", PUBLIC)
def test_arguments_are_told(function, node):
    lacking = [name for name in parameters(function) if name not in told(node)]
    if lacking and (registry := registered(function)):
        # Entries of a registry share one signature, which its module tells once for all.
        text = registries()[registry]
        lacking = [name for name in lacking if f"`{name}`" not in text]
    assert not lacking, f"its docstring does not say what {', '.join(lacking)} are"


def test_what_is_told_is_a_parameter():
    for file, tree in TREES.items():
        for name, function, node in functions(tree):
            given = function.args
            there = {a.arg for a in (given.vararg, given.kwarg) if a} | {*parameters(function)}
            extra = told(node) - there if isinstance(node, ast.FunctionDef) else set()
            assert not extra, f"{file}: {name} has no {', '.join(extra)}"


def test_there_is_something_to_look_at():
    assert len(PUBLIC) > 40 and {"SCOPES", "MODELS", "BRANCHES"} <= set(registries())
    assert UNFINISHED <= {pathlib.Path(file).parts[0] for file in FILES}
