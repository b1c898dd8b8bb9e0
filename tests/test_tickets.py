"""tickets: a saved ticket comes back bit for bit, says where it came from and nothing else."""

import dataclasses
import importlib.metadata
import json
import os
import socket

import numpy as np
import pytest
import safetensors

import lth_tf
from lth_tf import masks, pruning, storage, tickets
from lth_tf.errors import UserError
from lth_tf.models import MODELS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket, load_ticket, load_trained, save_trained
from lth_tf.training import initial_weights

ORIGIN = {
    "seed": 3,
    "replicate": 1,
    "arm": "ticket",
    "input_shape": [8, 8, 1],
    "classes": 10,
    "initial_sha256": "0" * 64,
}


@pytest.fixture
def ticket():
    """Weights of all kinds: float32 and float64 kernels, BatchNorm, a count."""
    rng = np.random.default_rng(0)
    mask = {
        "conv1/kernel": (rng.random((3, 3, 1, 5)) < 0.5).astype(np.uint8),
        "fc1/kernel": (rng.random((7, 3)) < 0.3).astype(np.uint8),
    }
    weights = {
        "conv1/kernel": rng.normal(size=(3, 3, 1, 5)).astype(np.float32),
        "conv1/bias": np.array([0.0, -0.0, 1e-45, np.pi, -1], np.float32),
        "norm/gamma": rng.normal(size=5).astype(np.float32),
        "norm/moving_variance": rng.random(5).astype(np.float32),
        "drop/count": np.array(2**53 + 1, np.int64),
        "fc1/kernel": rng.normal(size=(7, 3)),
        "fc1/bias": np.full(3, 1 / 3),
    }
    spec = Spec(model="conv2", rewind_step=0.1, lr_schedule="steps", lr_drops=(5, 9))
    return Ticket(mask, masks.apply(mask, weights), 4, 5000, ORIGIN, spec)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ticket.safetensors"


def assert_same_arrays(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


# Round trips.


def test_round_trip(ticket, path):
    ticket.save(path)
    back = load_ticket(path)
    assert_same_arrays(back.mask, ticket.mask)
    assert_same_arrays(back.weights, ticket.weights)
    assert (back.level, back.rewind_step) == (4, 5000)
    assert back.origin == ORIGIN and back.spec == ticket.spec
    assert back.density == ticket.density == masks.density(ticket.mask)
    back.save(path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_path_may_be_a_string(ticket, path):
    ticket.save(str(path))
    assert load_ticket(str(path)).level == 4


@pytest.mark.parametrize("model", ["lenet_5_4", "conv2_dropout"])
def test_weights_of_a_model_go_back_into_it(model, path):
    spec = Spec(model=model)
    values, names = initial_weights(spec, (8, 8, 1), 10, seed=1)
    rng = np.random.default_rng(0)
    mask = {name: (rng.random(values[name].shape) < 0.5).astype(np.uint8) for name in names}
    Ticket(mask, masks.apply(mask, values), 1, 0, ORIGIN, spec).save(path)
    back = load_ticket(path)
    other = pruning.prune(MODELS[model]((8, 8, 1), 10, seed=2))
    pruning.assign(other, back.weights)
    pruning.set_mask(other, back.mask)
    assert_same_arrays(
        {name: v.numpy() for name, v in pruning.weights(other).items()}, masks.apply(mask, values)
    )
    assert_same_arrays(pruning.get_mask(other), mask)


def test_importable_from_the_package(ticket, path):
    assert lth_tf.load_ticket is load_ticket and lth_tf.Ticket is Ticket


# What is in the file.


def test_equal_tickets_are_equal_bytes(ticket, path, tmp_path, monkeypatch):
    ticket.save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setattr("time.time", lambda: 0.0)
    copy = dataclasses.replace(ticket, mask={n: m.copy() for n, m in ticket.mask.items()})
    copy.save("other")
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_metadata(ticket, path):
    ticket.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert list(file.metadata()) == ["lth_tf"]
        metadata = json.loads(file.metadata()["lth_tf"])
    assert len(metadata.pop("sha256")) == 64
    assert metadata == {
        "format": "ticket",
        "format_number": storage.FORMAT,
        "kernels": list(ticket.mask),
        "weights": list(ticket.weights),
        "level": 4,
        "rewind_step": 5000,
        "density": ticket.density,
        "origin": ORIGIN,
        "spec": ticket.spec.as_dict(),
        "versions": {name: importlib.metadata.version(name) for name in tickets.LIBRARIES},
    }
    content = path.read_bytes()
    for secret in (str(path.parent.parent), os.getcwd(), socket.gethostname()):
        assert secret.encode() not in content


def test_masks_take_a_bit_per_weight(ticket, path):
    ticket.save(path)
    arrays, _ = storage.read_tensors(path)
    assert arrays["mask/conv1/kernel"].nbytes == 6 and arrays["mask/fc1/kernel"].nbytes == 3


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("lth_tf.tickets.ticket.LIBRARIES", ("numpy", "no-such-library"))
    assert tickets.versions() == {"numpy": np.__version__, "no-such-library": "not installed"}


# Refusals.


@pytest.mark.parametrize("value", [1e-30, np.nan])
def test_weight_outside_the_mask(ticket, path, value):
    kernel = ticket.weights["fc1/kernel"]
    kernel[tuple(np.argwhere(ticket.mask["fc1/kernel"] == 0)[0])] = value
    with pytest.raises(pruning.InvariantError, match="'fc1/kernel' exceed its mask"):
        ticket.save(path)
    assert not path.exists()


def test_frozen(ticket):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ticket.level = 3


def test_load_refuses_other_files(ticket, path):
    with pytest.raises(UserError, match="there is no file"):
        load_ticket(path)
    save_trained(path, ticket.weights, ticket)
    with pytest.raises(UserError, match="holds 'trained', not a ticket"):
        load_ticket(path)
    storage.write_tensors(path, {}, {})
    with pytest.raises(UserError, match="holds 'something else', not a ticket"):
        load_ticket(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_ticket(path)


# Trained weights.


def test_trained_round_trip(ticket, path):
    ticket.weights["conv1/kernel"][:] = np.nan  # whatever training ended with
    save_trained(path, ticket.weights, ticket)
    assert_same_arrays(load_trained(path), ticket.weights)
    ticket = dataclasses.replace(ticket, weights=masks.apply(ticket.mask, ticket.weights))
    ticket.weights["conv1/kernel"][np.isnan(ticket.weights["conv1/kernel"])] = 1
    ticket.save(path)
    with pytest.raises(UserError, match="does not hold trained weights"):
        load_trained(path)
