"""An engine for CPUs that trains the kept weights alone, in compiled code (lth_tf[sparse]).

A step of a network of dense layers is a few multiply-adds for each kept weight and example, so
that its time falls with the density; in TensorFlow it is that of all weights. The formulas are in
`kernels`; here is what goes in and what comes out.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras, tf
from lth_tf.datasets import cache
from lth_tf.masks import Mask
from lth_tf.pruning.inside import is_chain, rate_of
from lth_tf.pruning.slots import slots_for
from lth_tf.tasks import TASKS
from lth_tf.training.feeds import Resident, batch_indices
from lth_tf.training.graph import Setup, by_momentum

INSTALL = "pip install lth_tf[sparse]"
ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")  # in the order of their numbers in `kernels`
# Optimizer -> which rule of `kernels`, and how many slots it has.
RULES = {"sgd": (0, 1), "momentum": (0, 1), "nesterov": (1, 1), "adam": (2, 2), "adamw": (2, 2)}
# The layers that a network may have, and what these do not do besides.
_PLAIN: dict[type, dict[str, Any]] = {
    keras.layers.Dense: {
        "trainable": True, "kernel_regularizer": None, "bias_regularizer": None,
        "activity_regularizer": None, "kernel_constraint": None, "bias_constraint": None,
    },
    keras.layers.Activation: {},
    keras.layers.ReLU: {"max_value": None, "negative_slope": 0, "threshold": 0},
    keras.layers.Flatten: {"data_format": "channels_last"},
}  # fmt: skip
_GRAIN = 16  # examples of a row come in multiples of this
_ROOM = 64  # examples that are evaluated at a time


def unfit(setup: Setup) -> str | None:
    """Returns why an engine of this kind cannot train something, as half a sentence, or None."""
    spec = setup.spec
    if importlib.util.find_spec("numba") is None:
        return f"numba is not installed: {INSTALL}"
    if setup.strategy.num_replicas_in_sync > 1:
        return "several replicas share a batch"
    if not isinstance(setup.feed, Resident):
        return "its data set is streamed"
    if setup.task is not TASKS["classification"]:
        return "its task is not classification"
    for name, fits in (
        ("optimizer", (*RULES,)),
        ("precision", ("float32", "float64")),
        ("augmentation", ("none",)),
        ("normalization", ("standard", "unit")),
    ):
        if getattr(spec, name) not in fits:
            return f"{name} is {getattr(spec, name)}, not {' or '.join(fits)}"
    if by_momentum(spec):
        return f"method {spec.method} needs the gradient of pruned weights at every step"
    if spec.label_smoothing:
        return "labels are smoothed (label_smoothing)"
    try:
        _layers(setup)
    except ValueError as error:
        return str(error)
    return None


def _layers(setup: Setup) -> list[tuple[Any, int]]:
    """The dense layers of a chain, with the number of the activation behind each.

    Raises:
      ValueError: there is something else; says what.
    """
    found: list[tuple[Any, int]] = []
    if not is_chain(setup.model):
        raise ValueError(f"model {setup.model.name!r} is no chain of layers")
    for layer in setup.model.layers:
        inner = pruning.inner_layer(layer)
        kind, what = type(inner), f"layer {inner.name!r} is a {type(inner).__name__}"
        if kind is keras.layers.InputLayer:
            continue
        if kind not in _PLAIN or (kind is keras.layers.Flatten and found):
            raise ValueError(what)
        if inner.dtype != setup.spec.precision:
            raise ValueError(f"{what} of {inner.dtype}")
        config = inner.get_config()
        for option, usual in _PLAIN[kind].items():
            if config[option] != usual:
                raise ValueError(f"{what} whose {option} is not {usual}")
        if kind is keras.layers.Flatten:
            continue
        name = "relu" if kind is keras.layers.ReLU else _activation(inner.activation)
        if name not in ACTIVATIONS:
            raise ValueError(f"{what} with activation {name}")
        if kind is keras.layers.Dense:
            found.append((inner, ACTIVATIONS.index(name)))
        elif not found or found[-1][1]:
            raise ValueError(f"layer {inner.name!r} is an activation of nothing dense")
        else:
            found[-1] = found[-1][0], ACTIVATIONS.index(name)
    if not found or found[-1][1]:
        last = setup.model.layers[-1].name
        raise ValueError(f"layer {last!r} puts out something else than logits")
    return found


def _activation(function: Any) -> str:
    """The name of a function, of one's own with where it is from."""
    name = getattr(function, "__name__", type(function).__name__)
    known = function in (getattr(keras.activations, name, None), getattr(tf.nn, name, None))
    return name if known else f"{getattr(function, '__module__', None)}.{name}"


@functools.cache
def _kernels() -> Any:
    """The module of compiled functions."""
    import numba

    settings = vars(numba.config)
    before = settings["CACHE_DIR"]
    settings["CACHE_DIR"] = str(_folder(numba.__version__))
    try:
        from lth_tf.training import kernels
    finally:
        settings["CACHE_DIR"] = before
    return kernels


def _folder(version: str) -> Path:
    """Where numba keeps what it has compiled: in the cache, or for this process only.

    One for each version of numba and of that file, for numba does not see what it has inlined.
    """
    code = Path(__file__).with_name("kernels.py").read_bytes()
    found = cache.folder() / f"numba-{hashlib.sha256(code + version.encode()).hexdigest()[:16]}"
    with contextlib.suppress(OSError):
        found.mkdir(parents=True, exist_ok=True)
        if os.access(found, os.W_OK | os.X_OK):
            return found
    alone = tempfile.mkdtemp(prefix="lth_tf-numba-")  # without one numba raises
    atexit.register(shutil.rmtree, alone, ignore_errors=True)
    return Path(alone)


class Sparse:
    """An engine; for its methods see `graph.Graph`.

    Args:
      setup: what trains, of which `unfit` says nothing.
      threads: by how many a batch is shared; results are the same for the same number.
    """

    apart, blocks = True, False

    def __init__(self, setup: Setup, threads: int = 1):
        self.setup, self.threads, self._kernels = setup, threads, _kernels()
        self.dtype = np.dtype("float64" if setup.spec.precision == "float64" else "float32")
        self.layers = _layers(setup)
        self._parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._names = {id(v): name for name, v in pruning.kernels(setup.model).items()}

    def begin(self, mask: Mask) -> None:
        """Takes over from the variables of model and optimizer."""
        self.masks = [mask[self._names[id(layer.kernel)]] != 0 for layer, _ in self.layers]
        self.net, self._size, units = self._linked()
        room = -(-self.setup.spec.batch_size // self.threads)
        self._work = (
            *self._rows(units, room),
            np.zeros((self.threads, self._size), self.dtype),
            np.zeros(self.threads),
        )
        many = RULES[self.setup.spec.optimizer][1]
        self._state = tuple(
            self._packed(i) if i <= many else np.zeros(self._size, self.dtype) for i in range(3)
        )
        self._iterations = int(self.setup.optimizer.iterations.numpy())

    def _linked(self) -> tuple[tuple, int, int]:
        """The network as `kernels` wants it, how many numbers it trains, and its units."""
        used = np.flatnonzero(self.masks[0].any(1))
        zero = np.zeros(1, np.int64)
        ptr, out_ptr = [zero], [zero]
        source: list[np.ndarray] = []
        out_edge: list[np.ndarray] = []
        out_unit: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        biases: list[np.ndarray] = []
        below = edges = 0
        for i, (m, (_, kind)) in enumerate(zip(self.masks, self.layers, strict=True)):
            m = m if i else m[used]
            unit, from_ = np.nonzero(m.T)
            ptr.append(edges + np.cumsum(m.sum(0)))
            source.append(below + from_)
            if i:
                number = np.zeros(m.T.shape, np.int64)
                number[m.T] = edges + np.arange(len(unit))
                out_ptr.append(out_ptr[-1][-1] + np.cumsum(m.sum(1)))
                out_edge.append(number.T[m])
                out_unit.append(below + len(m) + np.nonzero(m)[1])
            kinds.append(np.full(m.shape[1], kind))
            below, edges = below + len(m), edges + len(unit)
        at = edges
        for layer, _ in self.layers:
            biases.append(at + np.arange(layer.units) if layer.use_bias else -np.ones(layer.units))
            at += layer.units * layer.use_bias
        scale, shift = self._scaling()
        outputs = self.masks[-1].shape[1]

        def whole(arrays: list, dtype: Any) -> np.ndarray:
            return np.concatenate([np.zeros(0), *arrays]).astype(dtype)

        net = (
            whole(ptr, np.int64), np.arange(edges, dtype=np.uint32), whole(source, np.uint32),
            whole(out_ptr, np.int64), whole(out_edge, np.uint32), whole(out_unit, np.uint32),
            used.astype(np.uint64), scale[used].astype(self.dtype), shift[used].astype(self.dtype),
            whole(kinds, np.int64), whole(biases, np.int64), outputs,
        )  # fmt: skip
        return net, at, below + outputs

    def _scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """What an input is multiplied by, and what is added, of each of them: see `scaling`."""
        data, spec = self.setup.feed.dataset, self.setup.spec
        size, last = int(np.prod(data.input_shape)), data.input_shape[-1]
        image = data.train_inputs.dtype == np.uint8
        scale, shift = np.full(last, 1 / 255 if image else 1.0), np.zeros(last)
        if spec.normalization == "standard" and (image or data.train_inputs.dtype.kind == "f"):
            std = np.broadcast_to(np.asarray(data.std, float), last)
            scale, shift = scale / std, -np.asarray(data.mean, float) / std
        repeats = size // last
        return np.tile(scale, repeats), np.tile(np.broadcast_to(shift, last), repeats)

    def _rows(self, units: int, room: int) -> list[np.ndarray]:
        """Two arrays of rows of that many units, a share for each thread."""
        shape = (self.threads, units, -(-room // _GRAIN) * _GRAIN)
        return [np.zeros(shape, self.dtype) for _ in range(2)]

    def _packed(self, i: int) -> np.ndarray:
        """Of each kept weight, then of each bias, the value (i = 0) or the i-th slot."""
        optimizer = self.setup.optimizer
        kernels = [
            _of(layer.kernel, optimizer, i).numpy().T[m.T]
            for m, (layer, _) in zip(self.masks, self.layers, strict=True)
        ]
        biases = [
            _of(layer.bias, optimizer, i).numpy() for layer, _ in self.layers if layer.use_bias
        ]
        return np.concatenate([*kernels, *biases]).astype(self.dtype)

    def sync(self) -> None:
        """Puts what training changed into the variables of model and optimizer."""
        optimizer = self.setup.optimizer
        many = RULES[self.setup.spec.optimizer][1]
        for i, values in enumerate(self._state[: many + 1]):
            at = 0
            for m, (layer, _) in zip(self.masks, self.layers, strict=True):
                whole = np.zeros(m.T.shape, self.dtype)
                whole[m.T] = values[at : at + int(m.sum())]
                at += int(m.sum())
                _of(layer.kernel, optimizer, i).assign(whole.T)
            for layer, _ in self.layers:
                if layer.use_bias:
                    _of(layer.bias, optimizer, i).assign(values[at : at + layer.units])
                    at += layer.units
        optimizer.iterations.assign(self._iterations)

    def _part(self, name: str) -> tuple[np.ndarray, np.ndarray, int]:
        """The numbers of a part's inputs, all in a row; its labels; how many an input has."""
        if name not in self._parts:
            inputs, labels = (each.numpy() for each in self.setup.feed.part(name))
            if inputs.dtype.kind == "f":
                inputs = inputs.astype(self.dtype)
            self._parts[name] = inputs.reshape(-1), labels
        return *self._parts[name], len(self._parts[name][0]) // len(self._parts[name][1])

    def advance(self, step: int, end: int, seed: int, total: float) -> tuple[float, int]:
        """Does the steps step .. end - 1, as `Graph.advance`.

        Args:
          step, end, seed, total: see there.
        """
        spec, feed = self.setup.spec, self.setup.feed
        inputs, labels, size = self._part("train")
        chosen = batch_indices(seed, step, end - step, feed.sizes["train"], spec.batch_size)
        losses = np.zeros(end - step)
        rule, l2 = RULES[spec.optimizer][0], spec.weight_decay
        decoupled = spec.optimizer == "adamw"
        one = 0.9 if rule == 2 else 0.0 if spec.optimizer == "sgd" else spec.momentum
        by = np.array(
            [
                one, 1 - one, 1 - 0.999, spec.adam_epsilon,
                0 if decoupled else l2, l2 if decoupled else 0,
            ],
            self.dtype,  # after the subtraction, as Keras does it: 1 - float32(0.999) is 1e-5 off
        )  # fmt: skip
        self._kernels.TRAIN[self.threads > 1](
            inputs, chosen.astype(np.uint64) * np.uint64(size), labels[chosen],
            self._rates(end - step), rule, by, self.net, self._state, self._work, losses,
        )  # fmt: skip
        self._iterations += end - step
        self.setup.optimizer.iterations.assign(self._iterations)
        bad = np.flatnonzero(~np.isfinite(losses))
        for loss in losses.tolist():  # one after the other, see `Graph.advance`
            total += loss
        return total, int(bad[0]) if len(bad) else -1

    def _rates(self, steps: int) -> np.ndarray:
        """For each step the learning rate as Adam corrects it, and as it is."""
        optimizer = self.setup.optimizer
        now = self._iterations + np.arange(steps)
        rate = rate_of(optimizer)
        plain = np.asarray(rate(tf.constant(now)) if callable(rate) else rate.numpy(), np.float64)
        plain = np.broadcast_to(plain, (steps,)).astype(self.dtype)
        power = (now + 1).astype(self.dtype)
        first, second = (1 - self.dtype.type(beta) ** power for beta in (0.9, 0.999))
        return np.stack([plain * np.sqrt(second) / first, plain], 1)

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns the sums of losses and of hits on a part."""
        inputs, labels, size = self._part(part)
        a, d = self._rows(len(self.net[9]) + len(self.net[6]), _ROOM)
        sums, hits = np.zeros(self.threads), np.zeros(self.threads, np.int64)
        starts = np.arange(len(labels), dtype=np.uint64) * np.uint64(size)
        self._kernels.EVALUATE[self.threads > 1](
            inputs, starts, labels, self.net, self._state[0], a, d, sums, hits
        )
        return float(sums.sum()), float(hits.sum())


def _of(variable: Any, optimizer: Any, i: int) -> Any:
    """The variable itself (0), or its first or second slot."""
    return slots_for(optimizer, variable)[i - 1] if i else variable
