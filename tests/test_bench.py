"""What the benches of scale and of checkpoints report, and how one is added to lth-bench."""

import dataclasses
import importlib.util
import inspect
import io
import json
import time

import pytest
import rich.console
from rich.table import Table
from test_tools import run as run_tool

from lth_tf import datasets, experiments
from lth_tf.bench import MEASUREMENTS, Measurement, measure
from lth_tf.bench.checkpoints import checkpoints, checkpoints_table
from lth_tf.bench.levels import levels, levels_figure, levels_table
from lth_tf.bench.loops import train
from lth_tf.bench.moves import sparse, sparse_table
from lth_tf.bench.parts import PARTS, Clock, parts, parts_table
from lth_tf.bench.replicas import scale, scale_table
from lth_tf.dynamic import METHODS
from lth_tf.errors import UserError
from lth_tf.spec import Spec


@pytest.mark.slow
def test_bench_of_scale_and_of_checkpoints():
    two = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, checkpoint_every=10,
        eval_every=20, compile="off",
    )  # fmt: skip
    data = datasets.load("digits")
    result = scale(two, data, 20, 1)
    ways = "1", "2 plain", "2 packed"
    names = [f"{way}, density {d:g}" for d in (1, 0.2, 0.05) for way in ways]
    assert list(result["steps_per_second"]) == list(result["bytes_per_step"]) == names
    plain = 4 * (64 * 20 + 20 * 10 + 100 + 20 + 10 + 10 + 1)
    assert all(n == plain for name, n in result["bytes_per_step"].items() if "plain" in name)
    assert 1 <= min(result["payload"].values()) <= max(result["payload"].values()) <= 1.1
    saved = checkpoints(two, data, 45, 2)
    assert saved["checkpoints"] == 4 and 0 < saved["share"] < 1 and saved["megabytes"] > 0.01
    for table in (scale_table(result), checkpoints_table(saved)):
        rich.console.Console(file=io.StringIO()).print(table)
    with pytest.raises(UserError, match="no checkpoint within 5 steps"):
        checkpoints(two, data, 5, 1)
    for measurement in (train, scale):
        with pytest.raises(UserError, match="leave --distribute and --devices out"):
            measurement(dataclasses.replace(two, distribute="mirrored"), data, 1, 1)


def test_a_measurement_is_one_entry(monkeypatch, capsys):
    """lth-bench offers it, gives it what its parameters name, and shows it by its own table."""

    def measured(dataset, spec, rounds):
        seen.append(spec)
        return {"classes": dataset.classes, "rounds": rounds}

    def table(result):
        return Table(f"{result['classes']} classes, {result['rounds']} times")

    seen = []
    entry = Measurement(measured, table, recipe="one_shot", before=seen.append)
    monkeypatch.setitem(MEASUREMENTS, "classes", entry)
    words = ["classes", "--dataset=digits", "--rounds=3", "--density=0.125"]
    code, out, err = run_tool(monkeypatch, capsys, *words, name="bench")
    assert code == 0 and "10 classes, 3 times" in out, err
    assert seen[0] == seen[1] and (seen[0].recipe, seen[0].density) == ("one_shot", (0.125,))
    code, out, _ = run_tool(monkeypatch, capsys, *words, "--json", name="bench")
    assert code == 0 and json.loads(out) == {"classes": 10, "rounds": 3}
    code, _, err = run_tool(monkeypatch, capsys, "klasses", name="bench")
    assert code == 1 and f"there are: {', '.join(MEASUREMENTS)}" in err


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_asks_for_what_there_is_to_give(name):
    asked = set(inspect.signature(MEASUREMENTS[name].run).parameters)
    assert asked <= {"spec", "dataset", "data_dir", "steps", "rounds", "tickets"}


@pytest.mark.slow
def test_bench_of_levels(tmp_path, monkeypatch):
    monkeypatch.setattr("lth_tf.bench.levels.DENSITIES", (1.0, 0.2, 0.036))
    small = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, eval_every=3, compile="off"
    )
    result = levels(small, datasets.load("digits"), 6, 1)
    engines = ["tensorflow", "compact", *["sparse"] * bool(importlib.util.find_spec("numba"))]
    assert list(result["engines"]) == engines
    for found in result["engines"].values():
        assert [float(d) for d in found] == pytest.approx([1, 0.2, 0.036], abs=1e-3)
        assert all(one["seconds"] > 0 and one["ratio"] > 0 for one in found.values())
    assert result["engines"]["tensorflow"]["1.0"]["ratio"] == 1
    texts = io.StringIO()
    rich.console.Console(file=texts).print(levels_table(result))
    assert "20.0%" in texts.getvalue() and all(engine in texts.getvalue() for engine in engines)
    levels_figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        levels_figure(result, tmp_path / "none" / "f.png")
    monkeypatch.setattr("lth_tf.bench.levels.DENSITIES", (1.0,))
    conv = dataclasses.replace(small, model="conv2")
    assert list(levels(conv, datasets.load("digits"), 1, 1)["engines"]) == ["tensorflow", "compact"]


@pytest.mark.slow
def test_bench_of_methods_that_move_masks():
    small = Spec(
        recipe="sparse", dataset="digits", model="lenet_20_10", validation_size=100, compile="off",
        eval_every=10, density=(0.2,), update_every=4, scope="erk",
    )  # fmt: skip
    result = sparse(small, datasets.load("digits"), 10, 1)
    found = result["engines"]
    assert list(found["tensorflow"]) == list(METHODS) and "snfs" not in found.get("sparse", {})
    for each in found.values():
        assert each["static"]["speed"] == 1 and each["static"]["update_ms"] is None
        assert all(one["speed"] > 0 and one["update_ms"] > 0 for m, one in each.items()
                   if m != "static")  # fmt: skip
        assert all(one["peak_memory_mb"] > 100 for one in each.values())
    texts = io.StringIO()
    rich.console.Console(file=texts).print(sparse_table(result))
    assert "granet" in texts.getvalue()


@pytest.mark.slow
def test_bench_of_levels_of_tickets(tmp_path):
    small = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, eval_every=3, compile="off",
        train_steps=6, levels=2, prune_fraction=0.5, precision="float64",
    )  # fmt: skip
    digits = datasets.load("digits")
    with pytest.raises(UserError, match="has no tickets"):
        levels(small, digits, 2, 1, tmp_path)
    experiments.imp(small, tmp_path, digits)
    result = levels(small, digits, 2, 1, tmp_path)
    for found in result["engines"].values():
        assert len(found) == 3 and list(found)[0] == "1.0"
    with pytest.raises(UserError, match="the mask of .* has shape"):
        levels(dataclasses.replace(small, model="lenet_20_11"), digits, 2, 1, tmp_path)
    with pytest.raises(UserError, match="--tickets: it is lth-bench levels"):
        measure(MEASUREMENTS["train"], small, None, 2, 1, tmp_path)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_bench_of_a_run_counts_each_moment_once(compiled):
    small = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, eval_every=5, levels=2,
        controls=("reinit",), compile=compiled,
    )  # fmt: skip
    began = time.perf_counter()
    result = parts(small, datasets.load("digits"), 20)
    seconds, whole = result["seconds"], time.perf_counter() - began
    assert list(seconds) == list(PARTS) and all(value >= 0 for value in seconds.values())
    assert all(seconds[part] > 0 for part in ("import", "network", "compile", "write", "rest"))
    assert 0.5 * whole < sum(seconds.values()) <= whole
    texts = io.StringIO()
    rich.console.Console(file=texts).print(parts_table(result))
    assert all(part in texts.getvalue() for part in PARTS)


def test_a_clock_counts_for_the_innermost_part():
    clock = Clock()
    with clock.part("train"):
        with clock.part("write"):
            time.sleep(0.05)
        inside = dict(clock.seconds)
    assert inside["write"] >= 0.05 > clock.seconds["train"]


def test_what_has_no_figure_says_so(monkeypatch, capsys):
    code, _, err = run_tool(monkeypatch, capsys, "start", "--figure=f.png", name="bench")
    assert code == 1 and "there is nothing to draw of lth-bench start" in err
