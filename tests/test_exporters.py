"""exporters: what leaves is the same network, zero where the mask is, finished or absent."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from lth_tf import exporters, masks, pruning, storage
from lth_tf.compat import keras, tf
from lth_tf.datasets import Dataset, scaling
from lth_tf.errors import UserError
from lth_tf.exporters import EXPORTERS
from lth_tf.models import MODELS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import initial_weights

CASES = {
    "lenet": (Spec(model="lenet_20_10", dataset="digits"), (8, 8, 1)),
    "conv2": (Spec(model="conv2", dataset="cifar10"), (8, 8, 3)),
    "float64": (
        Spec(model="lenet_20_10", dataset="digits", precision="float64", normalization="l2"),
        (8, 8, 1),
    ),
    "mixed": (
        Spec(
            model="conv2_dropout",
            dataset="cifar10",
            precision="mixed_bfloat16",
            normalization="unit",
        ),
        (8, 8, 3),
    ),
}
CLASSES, DENSITY = 6, 0.3
MOMENTS = {1: ((0.3,), (0.4,)), 3: ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))}
RAW = {
    channels: np.random.default_rng(5).integers(0, 256, (4, 8, 8, channels), np.uint8)
    for channels in MOMENTS
}

both = pytest.mark.parametrize("case", CASES)
every = pytest.mark.parametrize("format", EXPORTERS)


def dataset(channels: int) -> Dataset:
    mean, std = MOMENTS[channels]
    images, labels = np.zeros((1, 8, 8, channels), np.uint8), np.zeros(1, np.int32)
    return Dataset("toy", images, labels, images, labels, CLASSES, mean, std)


def made(case: str) -> tuple[Ticket, dict[str, np.ndarray], Dataset]:
    """A ticket with a random mask, weights as if trained (biases too), and a data set."""
    spec, shape = CASES[case]
    rng = np.random.default_rng(7)
    start, kernels = initial_weights(spec, shape, CLASSES, 3)
    mask = {n: (rng.random(start[n].shape) < DENSITY).astype(np.uint8) for n in kernels}
    trained = {
        n: (w + 0.1 * rng.standard_normal(w.shape)).astype(w.dtype) if w.ndim else w
        for n, w in start.items()
    }
    origin = {
        "seed": 3,
        "replicate": 0,
        "arm": "ticket",
        "input_shape": list(shape),
        "classes": CLASSES,
        "dataset": spec.dataset,
        "initial_sha256": storage.digest(start),
    }
    ticket = Ticket(mask, masks.apply(mask, start), 2, 0, origin, spec)
    return ticket, masks.apply(mask, trained), dataset(shape[2])


def expected(ticket: Ticket, weights: dict, data: Dataset, raw: np.ndarray) -> tuple:
    """Normalised float32 images and the logits of a model that is built here."""
    wide = ticket.spec.precision == "float64"
    keras.mixed_precision.set_global_policy("float64" if wide else "float32")
    try:
        model = MODELS[ticket.spec.model](raw.shape[1:], CLASSES, 99)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for name, variable in pruning.weights(model).items():
        variable.assign(weights[name])
    dtype = tf.float64 if wide else tf.float32
    x = scaling.scale(raw, ticket.spec.normalization, data.mean, data.std, dtype)
    return tf.cast(x, tf.float32).numpy(), model(x, training=False).numpy()


def read_saved_model(folder: pathlib.Path) -> exporters.Reread:
    loaded = tf.saved_model.load(str(folder))
    assert sorted(loaded.signatures) == ["serving_default", "serving_uint8"]

    def call(signature):
        def logits(images):
            answer = loaded.signatures[signature](images=tf.constant(images))
            assert list(answer) == ["logits"]
            return answer["logits"].numpy()

        return logits

    weights = {name: v.numpy() for name, v in loaded.weights.items()}
    return exporters.Reread(weights, call("serving_default"), call("serving_uint8"))


READERS = {"saved_model": read_saved_model}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    """Every case in every format: <folder>/<format>_<case>."""
    folder = tmp_path_factory.mktemp("exported")
    for case in CASES:
        ticket, trained, data = made(case)
        for format in EXPORTERS:
            exporters.export(ticket, trained, data, folder / f"{format}_{case}", format)
    return folder


# What was written.


def test_every_format_has_a_reader_here():
    assert READERS.keys() == EXPORTERS.keys()


@every
@both
def test_round_trip(exported, format, case):
    ticket, trained, data = made(case)
    found = READERS[format](exported / f"{format}_{case}")
    dtype = np.float64 if case == "float64" else np.float32
    assert found.weights.keys() == trained.keys()
    for name, w in trained.items():
        assert found.weights[name].dtype == (dtype if w.ndim else w.dtype)
        assert found.weights[name].tobytes() == w.tobytes()
    for name, m in ticket.mask.items():
        assert ((found.weights[name] != 0) == (m != 0)).all()
        assert not np.signbit(found.weights[name][m == 0]).any()
        assert np.mean(found.weights[name] != 0) == masks.density({name: m})
    raw = RAW[len(data.mean)]
    x, logits = expected(ticket, trained, data, raw)
    for part in (slice(0, 1), slice(None)):
        for answer in (found.logits(x[part]), found.logits_uint8(raw[part])):
            assert answer.dtype == np.float32 and answer.shape == (len(raw[part]), CLASSES)
            np.testing.assert_allclose(answer, logits[part], rtol=1e-5, atol=1e-5)


@every
def test_logits_are_the_formula(exported, format):
    """LeNet by hand, in float64."""
    ticket, trained, data = made("lenet")
    raw = RAW[1]
    x = ((raw / 255 - data.mean) / data.std).reshape(len(raw), -1)
    for layer in ("fc1", "fc2", "output"):
        x = x @ trained[f"{layer}/kernel"].astype(np.float64) + trained[f"{layer}/bias"]
        x = np.maximum(x, 0) if layer != "output" else x
    found = READERS[format](exported / f"{format}_lenet")
    np.testing.assert_allclose(found.logits_uint8(raw), x, rtol=1e-5, atol=1e-5)


@every
def test_ticket_json_says_what_it_is(exported, format, tmp_path):
    ticket, trained, data = made("conv2")
    text = (exported / f"{format}_conv2" / "ticket.json").read_text()
    about = json.loads(text)
    assert about["weights"] == "trained" and about["level"] == 2
    assert about["density"] == ticket.density
    assert about["densities"] == {n: masks.density({n: m}) for n, m in ticket.mask.items()}
    assert Spec.from_dict(about["spec"]) == ticket.spec
    assert about["origin"] == ticket.origin
    assert str(exported) not in text
    exporters.export(ticket, trained, data, tmp_path / "again", format)
    assert (tmp_path / "again" / "ticket.json").read_text() == text


@every
def test_start_weights(tmp_path, format):
    """Without trained weights the ticket itself is exported: mask x start weights."""
    ticket, _, data = made("lenet")
    exporters.export(ticket, None, data, tmp_path / "new" / "out", format)
    found = READERS[format](tmp_path / "new" / "out")
    assert all(found.weights[n].tobytes() == w.tobytes() for n, w in ticket.weights.items())
    assert json.loads((tmp_path / "new" / "out" / "ticket.json").read_text())["weights"] == "ticket"
    assert os.listdir(tmp_path / "new") == ["out"]


def test_negative_zeros_and_nothing_else_are_mended(tmp_path):
    ticket, trained, data = made("lenet")
    kernel, pruned = trained["fc1/kernel"], ticket.mask["fc1/kernel"] == 0
    kernel[pruned] = -0.0
    exporters.export(ticket, trained, data, tmp_path / "out")
    found = read_saved_model(tmp_path / "out").weights["fc1/kernel"]
    assert not found[pruned].tobytes().strip(b"\0")


PLAIN = """
import sys
import numpy as np
import tensorflow as tf
folder, *cases = sys.argv[1:]
for case in cases:
    loaded = tf.saved_model.load(f"{folder}/saved_model_{case}")
    given = np.load(f"{folder}/{case}.npz")
    for signature, images in (("serving_default", "x"), ("serving_uint8", "raw")):
        function = loaded.signatures[signature]
        answer = function(images=tf.constant(given[images]))["logits"].numpy()
        np.testing.assert_allclose(answer, given["logits"], rtol=1e-5, atol=1e-5)
    for name in [key for key in given if "/" in key]:
        assert ((loaded.weights[name].numpy() != 0) == (given[name] != 0)).all(), name
ours = {"lth_tf", "tf_keras", "tensorflow_model_optimization"}
assert not ours & {name.split(".")[0] for name in sys.modules}
print("loaded", *cases)
"""


def test_plain_tensorflow_loads_it(exported):
    for case in CASES:
        ticket, trained, data = made(case)
        raw = RAW[len(data.mean)]
        x, logits = expected(ticket, trained, data, raw)
        np.savez(exported / f"{case}.npz", x=x, raw=raw, logits=logits, **ticket.mask)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(exported), *CASES],
        capture_output=True,
        text=True,
        cwd=exported,
        env={k: v for k, v in os.environ.items() if not k.startswith("TF_")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["loaded", *CASES]


def test_saved_model_holds_no_device_and_no_optimizer(exported):
    """It was made beside two logical CPUs; it must run anywhere."""
    for case in CASES:
        folder = exported / f"saved_model_{case}"
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        assert files == [
            "fingerprint.pb",
            "saved_model.pb",
            "ticket.json",
            "variables/variables.data-00000-of-00001",
            "variables/variables.index",
        ]
        saved = (folder / "saved_model.pb").read_bytes()
        assert b"CPU:1" not in saved and b"/job:" not in saved
        _, trained, _ = made(case)
        stored = {n for n, _ in tf.train.list_variables(str(folder / "variables" / "variables"))}
        assert len(stored) == len(trained) + 1, stored  # and the object graph


# What must not be written.


def spoil_disk(monkeypatch):
    def load(folder, *args, _load=tf.saved_model.load, **kwargs):
        path = pathlib.Path(folder, "variables", "variables.data-00000-of-00001")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return _load(folder, *args, **kwargs)

    monkeypatch.setattr(tf.saved_model, "load", load)


def spoil_weights(monkeypatch, name, change):
    """Changes a variable while it is written, and only then."""

    def save(served, *args, _save=tf.saved_model.save, **kwargs):
        variable = served.weights[name]
        before = variable.numpy()
        after = before.copy()
        change(after)
        variable.assign(after)
        _save(served, *args, **kwargs)
        variable.assign(before)

    monkeypatch.setattr(tf.saved_model, "save", save)


def spoil_pruned(monkeypatch, value):
    mask = made("lenet")[0].mask["fc2/kernel"]
    i, j = np.argwhere(mask == 0)[5]
    spoil_weights(monkeypatch, "fc2/kernel", lambda w: w.__setitem__((i, j), value))


def spoil_kept(monkeypatch):
    mask = made("lenet")[0].mask["fc2/kernel"]
    i, j = np.argwhere(mask == 1)[5]
    spoil_weights(monkeypatch, "fc2/kernel", lambda w: w.__setitem__((i, j), w[i, j] * 1.000001))


def spoil_function(monkeypatch, name):
    """The one signature gets what the other one should."""

    def save(served, *args, signatures, _save=tf.saved_model.save, **kwargs):
        @tf.function(input_signature=signatures[name].input_signature)
        def wrong(images):
            return {"logits": served.logits(tf.cast(images, tf.float32) / 255)["logits"]}

        served.wrong = wrong
        _save(served, *args, signatures={**signatures, name: wrong}, **kwargs)

    monkeypatch.setattr(tf.saved_model, "save", save)


def interrupt(monkeypatch):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tf.saved_model, "load", load)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (spoil_disk, tf.errors.DataLossError, "Checksum does not match"),
        (lambda m: spoil_pruned(m, 1e-30), pruning.InvariantError, "'fc2/kernel' is not 0.0"),
        (lambda m: spoil_pruned(m, -0.0), pruning.InvariantError, "'fc2/kernel' is not 0.0"),
        (spoil_kept, pruning.InvariantError, "'fc2/kernel' is not what"),
        (lambda m: spoil_function(m, "serving_default"), pruning.InvariantError, "other logits"),
        (lambda m: spoil_function(m, "serving_uint8"), pruning.InvariantError, "other logits"),
        (interrupt, KeyboardInterrupt, "^$"),
    ],
    ids=["disk", "pruned", "negative zero", "kept", "serving_default", "serving_uint8", "ctrl-c"],
)
def test_a_failed_check_leaves_nothing(tmp_path, monkeypatch, spoil, error, message):
    spoil(monkeypatch)
    ticket, trained, data = made("lenet")
    with pytest.raises(error, match=message):
        exporters.export(ticket, trained, data, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path):
    ticket, trained, data = made("conv2")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"out' \(File too large\): the disk is full"):
            exporters.export(ticket, trained, data, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_existing_target_is_refused(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    ticket, trained, data = made("lenet")
    with pytest.raises(UserError, match="out' exists; delete it or choose another"):
        exporters.export(ticket, trained, data, target)
    assert os.listdir(tmp_path) == ["out"]
    assert kind != "file" or target.read_text() == "mine"


def test_a_parent_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    ticket, trained, data = made("lenet")
    with pytest.raises(UserError, match="a file is in the way"):
        exporters.export(ticket, trained, data, tmp_path / "file" / "out")


def test_weights_beyond_the_mask_are_refused(tmp_path):
    ticket, trained, data = made("lenet")
    i, j = np.argwhere(ticket.mask["output/kernel"] == 0)[0]
    trained["output/kernel"][i, j] = 1e-8
    with pytest.raises(pruning.InvariantError, match="output/kernel"):
        exporters.export(ticket, trained, data, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_weights_of_another_network_are_refused(tmp_path):
    ticket, trained, data = made("lenet")
    del trained["fc1/bias"]
    with pytest.raises(UserError, match="lacks.*fc1/bias"):
        exporters.export(ticket, trained, data, tmp_path / "out")
    with pytest.raises(UserError, match="unknown export format.*there are: saved_model.*mean"):
        exporters.export(ticket, None, data, tmp_path / "out", "savedmodel")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "logits' dtype", "nan"])
def test_check_sees(what):
    """What no exporter here can be brought to do; one to come might."""
    ticket, trained, data = made("lenet")
    model = exporters.network(ticket, trained)

    def scale(raw, dtype):
        return scaling.scale(raw, "standard", data.mean, data.std, dtype)

    served, weights = exporters.Served(model, scale), dict(trained)
    good = exporters.Reread(
        weights,
        lambda x: served.logits(x)["logits"].numpy(),
        lambda x: served.logits_uint8(x)["logits"].numpy(),
    )
    exporters.check(good, model, scale, ticket.mask)
    bad = {
        "missing": lambda: good._replace(
            weights={n: w for n, w in weights.items() if n != "fc1/bias"}
        ),
        "shape": lambda: good._replace(weights={**weights, "fc1/kernel": weights["fc1/kernel"].T}),
        "dtype": lambda: good._replace(
            weights={**weights, "fc1/kernel": weights["fc1/kernel"].astype(np.float16)}
        ),
        "logits' dtype": lambda: good._replace(logits=lambda x: good.logits(x).astype(np.float64)),
        "nan": lambda: good._replace(
            logits_uint8=lambda x: good.logits_uint8(x) * np.float32("nan")
        ),
    }[what]()
    with pytest.raises(pruning.InvariantError):
        exporters.check(bad, model, scale, ticket.mask)
