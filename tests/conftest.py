"""Four logical CPUs, so that distribution is tested everywhere."""

import gc
import os

import pytest

# Half of XLA's time: no test is about how well it optimises. For processes of tests, too.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    """Not on import: the process that hands tests out to others has no use for TensorFlow."""
    from lth_tf.compat import tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )
    gc.set_threshold(50_000, 20, 100)  # graphs are made of many objects that stay


# They begin first, so that none of them is left to one process at the end.
LONGEST = (
    "distribution", "scorers", "experiment", "conformance", "training", "pruning", "models",
    "stream", "tools", "sweep", "moves", "checkpoints", "faults", "datasets", "additions",
)  # fmt: skip


# What takes long and is told by shorter tests, too: `LTH_TF_SLOW_TESTS=1 make test` runs it.
SLOW = int(os.environ.get("LTH_TF_SLOW_TESTS", "0"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with LTH_TF_SLOW_TESTS")
    config.addinivalue_line("markers", "sampled(n): n of its cases, without LTH_TF_SLOW_TESTS")


def _left_out(items):
    """What is slow, and of a test that is sampled all cases but so many, evenly spread."""
    cases = {}
    for item in items:
        if item.get_closest_marker("slow"):
            yield item
        elif marker := item.get_closest_marker("sampled"):
            cases.setdefault((item.path, item.originalname, marker.args[0]), []).append(item)
    for (*_, n), each in cases.items():
        taken = {round(i * (len(each) - 1) / max(n - 1, 1)) for i in range(n)}
        yield from (item for i, item in enumerate(each) if i not in taken)


def pytest_collection_modifyitems(config, items):
    if not SLOW and not any("::" in given for given in config.args):
        out = list(_left_out(items))
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def _thin_norm(input_shape, classes, seed, *, init="glorot_normal"):
    from lth_tf.compat import keras
    from lth_tf.models import parts

    inits = parts.initialisers(init, seed)
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Conv2D(4, 3, kernel_initializer=next(inits), name="conv"),
            parts.norm("norm"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"),
        ],
        name="thin_norm",
    )


@pytest.fixture
def thin_norm(monkeypatch):
    """The name of a small network with batch normalisation, which there is within a test."""
    from lth_tf.models import MODELS

    monkeypatch.setitem(MODELS._entries, "thin_norm", _thin_norm)
    return "thin_norm"
