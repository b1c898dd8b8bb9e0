"""registry: reads like a dict, and a miss names what was asked, what exists and the nearest."""

import pytest

from lth_tf.errors import UserError
from lth_tf.registry import Registry, nearest


@pytest.fixture
def colours():
    def family(name):
        return name.upper() if name.startswith("grey_") else None

    registry = Registry("colour", family, ("grey_N",))
    registry.register("red")("#f00")
    registry.register("blue")("#00f")
    return registry


def test_reads_like_a_dict(colours):
    assert colours["red"] == "#f00"
    assert list(colours) == ["red", "blue"] and len(colours) == 2
    assert dict(colours) == {"red": "#f00", "blue": "#00f"}
    assert "red" in colours and "green" not in colours and 3 not in colours
    assert colours.get("red") == "#f00"
    assert colours.get("green") is None and colours.get("green", 1) == 1


def test_register_returns_what_it_enters_and_refuses_a_second():
    registry = Registry("thing")

    @registry.register("f")
    def f():
        return 1

    assert f() == 1 and registry["f"] is f
    with pytest.raises(ValueError, match="thing 'f' is registered twice"):
        registry.register("f")(f)
    assert registry["f"] is f


def test_miss_is_an_answer(colours):
    with pytest.raises(UserError) as caught:
        colours["bleu"]
    assert str(caught.value) == (
        "unknown colour 'bleu'; there are: red, blue, grey_N. Did you mean 'blue'?"
    )
    with pytest.raises(UserError) as caught:
        colours["xyzzy"]
    assert str(caught.value) == "unknown colour 'xyzzy'; there are: red, blue, grey_N."


def test_families_resolve_and_are_not_listed(colours):
    assert colours["grey_5"] == colours.get("grey_5") == "GREY_5" and "grey_5" in colours
    assert "grey_5" not in list(colours)
    with pytest.raises(UserError, match="Did you mean 'grey_N'"):
        colours["gray_5"]


def test_own_entry_comes_before_the_family(colours):
    colours.register("grey_1")("first")
    assert colours["grey_1"] == "first" and colours["grey_2"] == "GREY_2"


def test_nearest():
    assert nearest("globel", ["layerwise", "global"]) == " Did you mean 'global'?"
    assert nearest("q", ["layerwise", "global"]) == ""
