"""Compaction: the channels of a network that take part in its training, and the network of these.

A mask leaves channels that nothing depends on. Without them the network is a smaller dense one
that computes the same, and trains the same: what is left out has gradient zero throughout.

A channel is left out if

1. no path of kept weights leads from it to an output; or
2. it is zero, whatever the inputs, and stays zero in training. That is so where it adds up no
   inputs (or only such channels) and no bias; and behind a ReLU where all that it adds up is a
   bias, or the beta of a batch normalisation of zeros, that is at most 0 and stays where it is
   while its gradient is zero: the derivative of ReLU is zero there, also at 0.

Constants of another kind are trained and stay. Nothing is judged from data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras, tf
from lth_tf.masks import Mask
from lth_tf.pruning import inside

_L = keras.layers
_POOLS = (
    _L.MaxPooling2D, _L.AveragePooling2D, _L.GlobalAveragePooling2D, _L.GlobalMaxPooling2D,
    _L.ZeroPadding2D,
)  # fmt: skip
_ZERO_AT_ZERO = ("relu", "linear", "tanh", "elu", "selu", "swish", "gelu", "softsign")
_GATHERED = 0.9  # share of inputs in use below which the first layer takes only those

Places = tuple[np.ndarray, ...]


@keras.saving.register_keras_serializable(package="lth_tf")
class Take(keras.layers.Layer):
    """Some of the last axis' entries: [..., n] -> [..., k].

    Args:
      indices: which, int[k].
    """

    def __init__(self, indices: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.indices = [int(i) for i in indices]

    @inside.unread
    def call(self, inputs: Any) -> Any:
        """Takes them."""
        return tf.gather(inputs, tf.constant(self.indices, tf.int32), axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**super().get_config(), "indices": self.indices}


@dataclasses.dataclass(frozen=True)
class _Node:
    """A layer within the graph of a network.

    Attributes:
      layer: it, not masked.
      feeds: names of the layers that it takes from.
      shape: of what it puts out.
      kind: 'input'; 'weighted', which mixes channels; 'flatten'; 'channelwise', whose every
        channel depends on the same one of each layer that it takes from, and is zero where all
        those are; 'norm', which is channelwise but for a zero; 'other', that nothing is known of.
      raw: whether nothing trained lies below.
    """

    layer: Any
    feeds: tuple[str, ...]
    shape: tuple[int | None, ...]
    kind: str
    raw: bool

    @property
    def name(self) -> str:
        return str(self.layer.name)

    @property
    def channels(self) -> int:
        return int(self.shape[-1] or 0)

    @property
    def positions(self) -> int:
        return math.prod(n or 1 for n in self.shape[1:-1])

    @property
    def rectifies(self) -> bool:
        return _activation(self.layer) == "relu"


class Net:
    """The graph of a network.

    Args:
      model: plain or pruned.

    Attributes:
      nodes: layer's name -> node, each after those it takes from.

    Raises:
      ValueError: channels cannot be told apart in it; says why, as half a sentence.
    """

    def __init__(self, model: Any):
        if not inside.is_graph_network(model):
            raise ValueError(f"model {model.name!r} is no graph of layers")
        self.model = model
        self.nodes: dict[str, _Node] = {}
        self._names = {id(v): name for name, v in pruning.weights(model).items()}
        found = [
            (pruning.inner_layer(layer), [pruning.inner_layer(f) for f in feeds], shape)
            for layer, feeds, shape in inside.calls_of(model)
        ]
        for layer, feeds, shape in found:
            if layer.name in self.nodes:
                raise ValueError(f"layer {layer.name!r} is called more than once")
            names = tuple(each.name for each in feeds)
            kind = _kind(layer, shape)
            raw = kind in ("input", "flatten") and all(self.nodes[n].raw for n in names)
            self.nodes[layer.name] = _Node(layer, names, shape, kind, raw)
        outputs = {name.removeprefix("masked_") for name in model.output_names}
        self._outputs = [n for n in self.nodes if n in outputs]
        takers = [name for node in self.nodes.values() for name in node.feeds]
        # What only one layer takes, and nobody else sees.
        self._once = {n for n in self.nodes if takers.count(n) == 1 and n not in outputs}

    def alive(self, mask: Mask, still: Mapping[str, np.ndarray]) -> Part:
        """Returns the part that takes part in training.

        Args:
          mask: kernel name -> 0/1 array; of others all weights count as kept.
          still: weight's name -> bool [channels]: which entries of a bias or a beta are at most
            0, and stay where they are while their gradient is zero; which of a moving mean are 0.
        """
        kept = {
            node.name: self._kept(node, mask)
            for node in self.nodes.values()
            if node.kind == "weighted"
        }
        zero = self._zeros(kept, still)
        keep: dict[str, np.ndarray] = {}
        for name, node in self.nodes.items():
            keep[name] = np.zeros(node.channels, bool)
            if node.kind in ("input", "other") or name in self._outputs:
                keep[name][:] = True
        while True:
            before = sum(int(k.sum()) for k in keep.values())
            for node in reversed(self.nodes.values()):
                if not keep[node.name].any():
                    keep[node.name][:1] = True
                self._ask(node, keep, kept, zero)
            if sum(int(k.sum()) for k in keep.values()) == before:
                break
        takes: dict[str, np.ndarray] = {}
        for name, node in self.nodes.items():
            if node.kind == "weighted" and len(node.shape) == 2 and self.nodes[node.feeds[0]].raw:
                used = _any(kept[name][:, :, keep[name]], (0, 2))
                if used.any() and used.mean() < _GATHERED:
                    takes[name] = used
        return Part(keep, takes)

    def _kept(self, node: _Node, mask: Mask) -> np.ndarray:
        """Which weights of a layer are kept: bool [positions, inputs, outputs]."""
        kernel = node.layer.kernel
        shape = tuple(kernel.shape)
        kept = mask.get(self._names[id(kernel)], np.ones(shape, np.uint8))
        return np.reshape(kept != 0, (-1, *shape[-2:]))

    def _zeros(
        self, kept: Mapping[str, np.ndarray], still: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Layer's name -> which of its channels are zero and stay zero."""
        zero: dict[str, np.ndarray] = {}
        waits: dict[str, np.ndarray] = {}  # ... are as soon as a ReLU follows
        for name, node in self.nodes.items():
            layer, none = node.layer, np.zeros(node.channels, bool)
            zero[name] = waits[name] = none
            if node.kind in ("weighted", "norm"):
                if node.kind == "weighted":
                    empty = ~_any(kept[name][:, ~zero[node.feeds[0]]], (0, 1))
                    shift = layer.bias if layer.use_bias else None
                else:
                    empty = zero[node.feeds[0]] & still[self._names[id(layer.moving_mean)]]
                    shift = layer.beta if layer.center else None
                if shift is not None:
                    empty = empty & still.get(self._names[id(shift)], none)
                if node.rectifies or (shift is None and _activation(layer) in _ZERO_AT_ZERO):
                    zero[name] = empty
                elif name in self._once and _activation(layer) == "linear":
                    waits[name] = empty
            elif node.kind == "flatten":
                zero[name] = np.tile(zero[node.feeds[0]], self.nodes[node.feeds[0]].positions)
            elif node.kind == "channelwise":
                each = [zero[f] | waits[f] if node.rectifies else zero[f] for f in node.feeds]
                zero[name] = ~_any(~np.stack(each), 0)
        return zero

    def _ask(
        self, node: _Node, keep: dict[str, np.ndarray], kept: Mapping[str, np.ndarray],
        zero: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        """Keeps what a layer needs of those that it takes from, and what that entails."""
        own = keep[node.name]
        if node.kind == "weighted":
            below = node.feeds[0]
            keep[below] |= _any(kept[node.name][:, :, own], (0, 2)) & ~zero[below]
        elif node.kind == "flatten":
            below = node.feeds[0]
            keep[below] |= _any(own.reshape(-1, len(keep[below])), 0)
            own |= np.tile(keep[below], self.nodes[below].positions)
        elif node.kind in ("channelwise", "norm"):
            both = _any(np.stack([own, *(keep[name] for name in node.feeds)]), 0)
            for name in (node.name, *node.feeds):
                keep[name] |= both
        else:
            for name in node.feeds:
                keep[name][:] = True

    def places(self, part: Part) -> dict[str, Places]:
        """Returns where the part's weights are in the network's: name -> indices for each axis."""
        found: dict[str, Places] = {}
        for name, v in pruning.weights(self.model).items():
            found[name] = tuple(np.arange(n) for n in v.shape)
        for node in self.nodes.values():
            own = np.flatnonzero(part.keep[node.name])
            if node.kind in ("weighted", "norm"):
                for variable in inside.own_weights(node.layer):
                    name = self._names[id(variable)]
                    found[name] = (*found[name][:-1], own)
            if node.kind == "weighted":
                name = self._names[id(node.layer.kernel)]
                found[name] = (*found[name][:-2], part.inputs(node), own)
        return found

    def work(self, part: Part | None = None) -> dict[str, float]:
        """Returns what a network or a part of it has to do for an example.

        Args:
          part: of it; None: all of it.

        Returns:
          'dense' and 'conv': multiply-adds of such layers; 'weights': trained numbers.
        """
        part = part or Part({n: np.ones(each.channels, bool) for n, each in self.nodes.items()})
        total = {"dense": 0.0, "conv": 0.0, "weights": 0.0}
        for node in self.nodes.values():
            if node.kind == "weighted":
                shape = tuple(node.layer.kernel.shape)
                inputs, own = len(part.inputs(node)), int(part.keep[node.name].sum())
                size = math.prod(shape[:-2]) * inputs * own
                total["conv" if len(shape) > 2 else "dense"] += size * node.positions
                total["weights"] += size
        return total

    def small(self, part: Part) -> Any:
        """Returns a plain model of the part, with the names of the whole and weights of its own."""
        outs: dict[str, Any] = {}
        for name, node in self.nodes.items():
            layer = node.layer
            if node.kind == "input":
                outs[name] = keras.Input(node.shape[1:], dtype=layer.dtype, name=name)
                continue
            config, own = layer.get_config(), part.keep[name]
            if node.kind == "weighted":
                config["filters" if "filters" in config else "units"] = int(own.sum())
                config |= {"kernel_initializer": "zeros", "bias_initializer": "zeros"}
            elif hasattr(layer, "narrowed"):
                config = layer.narrowed(own)
            inputs = [outs[each] for each in node.feeds]
            if name in part.takes:
                taken = np.flatnonzero(part.takes[name])
                inputs = [Take(taken, name=f"{name}_taken", dtype=layer.dtype_policy)(inputs[0])]
            outs[name] = type(layer).from_config(config)(inputs[0] if len(inputs) == 1 else inputs)
        first = [outs[name] for name, node in self.nodes.items() if node.kind == "input"]
        last = [outs[name] for name in self._outputs]
        last = last[0] if len(last) == 1 else last
        return keras.Model(first, last, name=self.model.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A part of a network.

    Attributes:
      keep: layer's name -> bool [channels]: what is left of the layer's output.
      takes: name of a layer that has the network's inputs -> bool [inputs]: of which some alone.
    """

    keep: dict[str, np.ndarray]
    takes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def inputs(self, node: _Node) -> np.ndarray:
        """Returns the indices of what a layer takes in."""
        return np.flatnonzero(self.takes.get(node.name, self.keep[node.feeds[0]]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and all(
            one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
            for one, two in ((self.keep, other.keep), (self.takes, other.takes))
        )


def _any(values: np.ndarray, axis: int | tuple[int, int]) -> np.ndarray:
    return np.asarray(values.any(axis))


def _activation(layer: Any) -> str:
    """The name of an activation of Keras or TensorFlow, 'linear' without one, '' of others."""
    if type(layer) is _L.ReLU:
        usual = {"max_value": None, "negative_slope": 0, "threshold": 0}
        return "relu" if usual.items() <= layer.get_config().items() else ""
    function = getattr(layer, "activation", keras.activations.linear)
    name = str(getattr(function, "__name__", ""))
    known = (getattr(keras.activations, name, None), getattr(tf.nn, name, None))
    return name if name and any(function is each for each in known) else ""


def _kind(layer: Any, shape: tuple[int | None, ...]) -> str:
    """The `kind` of a node."""
    if type(layer) is _L.InputLayer:
        return "input"
    if getattr(layer, "data_format", "channels_last") != "channels_last" or not shape[-1]:
        return "other"
    if type(layer) is _L.Dense or (type(layer) is _L.Conv2D and layer.groups == 1):
        return "weighted"
    if type(layer) is _L.Flatten:
        return "flatten" if None not in shape[1:] else "other"
    if type(layer) is _L.BatchNormalization:
        return "norm" if list(layer.axis) == [len(shape) - 1] else "other"
    elementwise = type(layer) in (_L.Activation, _L.ReLU) and _activation(layer) in _ZERO_AT_ZERO
    if elementwise or type(layer) in (*_POOLS, _L.Add) or hasattr(layer, "narrowed"):
        return "channelwise"
    return "other"


def left_out(shape: tuple[int, ...], places: Places) -> np.ndarray:
    """Returns which entries of a weight a part has not: bool, of the weight's shape."""
    out = np.ones(shape, bool)
    out[np.ix_(*places)] = False
    return out

