"""What the benches of scale and of checkpoints report; lth-bench itself is in test_tools."""

import dataclasses
import io

import pytest
import rich.console

from lth_tf import datasets
from lth_tf.bench import contenders as bench
from lth_tf.errors import UserError
from lth_tf.report.tables import bench_table
from lth_tf.spec import Spec


def test_bench_of_scale_and_of_checkpoints():
    two = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, checkpoint_every=10,
        eval_every=20, compile="off",
    )  # fmt: skip
    data = datasets.load("digits")
    result = bench.scale(two, data, 20, 1)
    ways = "1", "2 plain", "2 packed"
    names = [f"{way}, density {d:g}" for d in (1, 0.2, 0.05) for way in ways]
    assert list(result["steps_per_second"]) == list(result["bytes_per_step"]) == names
    plain = 4 * (64 * 20 + 20 * 10 + 100 + 20 + 10 + 10 + 1)
    assert all(n == plain for name, n in result["bytes_per_step"].items() if "plain" in name)
    assert 1 <= min(result["payload"].values()) <= max(result["payload"].values()) <= 1.1
    kept = bench.checkpoints(two, data, 45, 2)
    assert kept["checkpoints"] == 4 and 0 < kept["share"] < 1 and kept["megabytes"] > 0.01
    for table in (result, kept):
        rich.console.Console(file=io.StringIO()).print(bench_table(table))
    with pytest.raises(UserError, match="no checkpoint within 5 steps"):
        bench.checkpoints(two, data, 5, 1)
    for measure in (bench.train, bench.scale):
        with pytest.raises(UserError, match="leave --distribute and --devices out"):
            measure(dataclasses.replace(two, distribute="mirrored"), data, 1, 1)
