"""The examples in docstrings say what is so."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [
    str(path.relative_to(ROOT))
    for folder in ("lth_tf", "docs", "results")  # a tool defines flags when it is imported
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("file", FILES)
def test_examples(file):
    parts = list(pathlib.Path(file).with_suffix("").parts)
    parts = parts if parts[0] == "lth_tf" else parts[1:]
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_there_are_files_with_examples():
    assert len(FILES) > 10
