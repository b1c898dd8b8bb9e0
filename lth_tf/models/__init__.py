"""Networks by name: MODELS[name](input_shape, classes, seed) -> a built, plain Keras model.

Models end in logits. Their weights are a function of (seed, init) alone: each layer
draws from a seed of its own, so that equal seeds give equal weights in every process.

A builder's arguments are `input_shape`, of one input without the batch; `classes`, the number of
logits; `seed`; and by name `init`, a key of INITS. Some also have `width`, a factor on their
channels, or `shortcut`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.models import gru, parts, resnet, vgg, wrn
from lth_tf.models.parts import INITS, Builder, StatelessDropout, initialisers, require_images
from lth_tf.registry import Registry
from lth_tf.spec import Spec, require_spec
from lth_tf.tasks import TASKS

__all__ = [
    "INITS", "MODELS", "Blueprint", "StatelessDropout", "Weights", "build", "initial_weights",
    "plain_model", "policy", "register",
]  # fmt: skip

Weights = dict[str, np.ndarray]


def build(spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int) -> Any:
    """Returns the network that a spec describes, with weights drawn from `seed`.

    Args:
      spec: model, init, output_std, width, shortcut, sync_batch_norm.
      input_shape: of one input, without the batch.
      classes: the number of logits.
      seed: any integer.

    Raises:
      UserError: the spec changes an option (width, shortcut) that the network lacks.
    """
    require_network(spec, input_shape, classes)
    builder = MODELS[spec.model]
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"init": spec.init}
    for name in ("width", "shortcut"):
        if name in known:
            options[name] = getattr(spec, name)
        elif getattr(spec, name) != getattr(Spec, name):
            raise UserError(
                f"model {spec.model!r} has no {name} to choose; leave it at {getattr(Spec, name)!r}"
            )
    with parts.synchronized(spec.sync_batch_norm):
        model = builder(input_shape, classes, seed, **options)
    if spec.output_std is not None:
        parts.draw_output(model, spec.output_std, seed)
    return model


@contextlib.contextmanager
def policy(precision: str) -> Iterator[None]:
    """Within, Keras builds layers under this mixed-precision policy.

    In float64 inputs and learning rates are float64, too: of these the policy knows nothing.
    """
    before = keras.mixed_precision.global_policy(), keras.backend.floatx()
    keras.mixed_precision.set_global_policy(precision)
    if precision == "float64":
        keras.backend.set_floatx("float64")
    try:
        yield
    finally:
        keras.backend.set_floatx(before[1])
        keras.mixed_precision.set_global_policy(before[0])


def plain_model(spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int) -> Any:
    """Returns the spec's network without masks, in float64 or else float32.

    Args:
      spec, input_shape, classes, seed: see `build`.
    """
    require_spec(spec)
    with policy("float64" if spec.precision == "float64" else "float32"):
        return build(spec, input_shape, classes, seed)


def initial_weights(
    spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int
) -> tuple[Weights, list[str]]:
    """Returns the weights that the model starts from under `seed`, and its kernels' names.

    Args:
      spec, input_shape, classes, seed: see `build`.
    """
    model = plain_model(spec, input_shape, classes, seed)
    values = {name: v.numpy() for name, v in pruning.weights(model).items()}
    return values, list(pruning.kernels(model))


def require_network(spec: Any, input_shape: Any, classes: Any) -> None:
    """Raises UserError for what no network can be built of.

    Args:
      spec, input_shape, classes: see `build`.
    """
    require_spec(spec)
    sizes = isinstance(input_shape, (tuple, list)) and [type(n) is int for n in input_shape]
    if not sizes or not all(sizes):
        raise UserError(f"input_shape must be a tuple of whole numbers, not {input_shape!r}")
    if not isinstance(classes, (int, np.integer)) or classes < 1:
        raise UserError(f"classes must be a whole number, at least 1, not {classes!r}")


def require_fit(spec: Spec, model: Any, dataset: Any) -> None:
    """Raises UserError for a data set that a network, or a change to its inputs, is not made for.

    Args:
      spec: the experiment.
      model: its network, plain or pruned.
      dataset: inputs, labels and task.
    """
    shape = tuple(dataset.input_shape)
    positions = shape if TASKS[dataset.task].positions else ()
    if (found := tuple(model.output_shape[1:])) != (*positions, dataset.classes):
        raise UserError(
            f"model {spec.model!r} puts out {list(found)} for each input, and the task of data set "
            f"{dataset.name!r}, {dataset.task}, wants {[*positions, dataset.classes]}"
        )
    if spec.augmentation != "none" and len(shape) != 3:
        raise UserError(
            f"augmentation {spec.augmentation!r} is for images, and data set {dataset.name!r} has "
            f"inputs of shape {list(shape)}; use none"
        )


class Blueprint:
    """The network of an experiment, built once for all who look at it.

    Args:
      spec: the experiment.
      input_shape, classes: of its data set.
    """

    def __init__(self, spec: Spec, input_shape: tuple[int, ...], classes: int):
        require_network(spec, input_shape, classes)
        self.spec, self.input_shape, self.classes = spec, tuple(input_shape), classes
        self._drawn: Weights | None = None

    @functools.cached_property
    def plain(self) -> Any:
        """The plain model, see `plain_model`; what it has for weights does not matter."""
        model = plain_model(self.spec, self.input_shape, self.classes, self.spec.seed)
        self._drawn = {name: v.numpy() for name, v in pruning.weights(model).items()}
        return model

    def holding(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Returns the plain model with these weights, path -> array."""
        pruning.assign(self.plain, weights)
        return self.plain

    def initial(self, seed: int) -> Weights:
        """Returns the weights that `seed` draws, path -> array."""
        if seed == self.spec.seed and self._drawn is not None:
            drawn, self._drawn = self._drawn, None
            return drawn
        return initial_weights(self.spec, self.input_shape, self.classes, seed)[0]

    def pruned(self) -> Any:
        """Returns a pruned model for training, in the spec's precision.

        It is made of the layers of `plain` where these are of that precision and in no scope of
        replicas. Its kernels are read in their layers only, so they need no wall.
        """
        if self.spec.precision in ("float32", "float64") and not tf.distribute.has_strategy():
            return pruning.prune(self.plain, wall=False)
        with policy(self.spec.precision):
            return pruning.prune(
                build(self.spec, self.input_shape, self.classes, self.spec.seed), wall=False
            )


def _lenet(units: list[int]) -> Builder:
    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        inits = initialisers(init, seed)
        layers = [keras.Input(input_shape), keras.layers.Flatten(name="flatten")]
        for i, n in enumerate(units):
            layers.append(
                keras.layers.Dense(
                    n, activation="relu", kernel_initializer=next(inits), name=f"fc{i + 1}"
                )
            )
        layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
        return keras.Sequential(layers, name="lenet")

    build.__doc__ = f"Fully connected ReLU network, hidden units {units} (LeCun et al. 1998)."
    return build


def _family(name: str) -> Builder | None:
    """Any 'lenet_A_B_...', 'lenet5_A_B_C_...', 'gru_E_H' or 'wrn_D_K'."""
    if re.fullmatch(r"lenet(_[1-9]\d*)+", name):
        return _lenet([parts.countable(int(n)) for n in name.split("_")[1:]])
    if re.fullmatch(r"lenet5(_[1-9]\d*){3,}", name):
        sizes = [parts.countable(int(n)) for n in name.split("_")[1:]]
        return _lenet5(sizes, "LeCun et al. 1998, with ReLUs")
    return gru.family(name) or wrn.family(name)


# What others need to know: the sides of the smallest image that it takes (None: it takes inputs of
# any shape), another model that is made of the same blocks, but of fewer, and its name in a family
# whose names tell sizes.
MODELS: Registry[Builder] = Registry(
    "model", _family, ("lenet_A_B_...", "lenet5_A_B_C_...", "gru_E_H", "wrn_D_K"),
    smallest=None, like=None, sized=None,
)  # fmt: skip


def register(
    name: str, *, smallest: int | None = None, like: str | None = None, sized: str | None = None
) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder in MODELS.

    Args:
      name: under which it is entered.
      smallest: the model takes images only, with sides of at least so many pixels; others are
        refused.
      like: a model that is made of the same blocks, but of fewer.
      sized: its name in a family whose names tell sizes.
    """

    def enter(builder: Builder) -> Builder:
        if smallest is None:
            return MODELS.register(name, like=like, sized=sized)(builder)

        @functools.wraps(builder)
        def checked(input_shape: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
            require_images(name, input_shape, smallest)
            return builder(input_shape, *arguments, **options)

        return MODELS.register(name, smallest=smallest, like=like, sized=sized)(checked)

    return enter


register("lenet_300_100")(_lenet([300, 100]))


def _lenet5(sizes: list[int], about: str) -> Builder:
    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        require_images("lenet5_A_B_...", input_shape, 16)
        inits = initialisers(init, seed)
        layers: list[Any] = [keras.Input(input_shape)]
        for i, filters in enumerate(sizes[:2], 1):
            layers.append(
                keras.layers.Conv2D(
                    filters, 5, activation="relu", kernel_initializer=next(inits), name=f"conv{i}"
                )
            )
            layers.append(keras.layers.MaxPooling2D(name=f"pool{i}"))
        layers.append(keras.layers.Flatten(name="flatten"))
        for i, units in enumerate(sizes[2:], 1):
            layers.append(
                keras.layers.Dense(
                    units, activation="relu", kernel_initializer=next(inits), name=f"fc{i}"
                )
            )
        layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
        return keras.Sequential(layers, name="lenet5")

    dense = " and ".join(map(str, sizes[2:]))
    build.__doc__ = (
        f"Two 5x5 convolutions of {sizes[0]} and {sizes[1]} filters with max-pools, dense layers "
        f"of {dense} ({about})."
    )
    return build


register("lenet5", smallest=16, sized="lenet5_20_50_500")(
    # 431,080 parameters on 28x28 images, 430,500 of them weights of kernels.
    _lenet5([20, 50, 500], "LeNet-5-Caffe of the pruning papers: Lee et al. 2019, section 5.1")
)
register("lenet5_classic", smallest=16, sized="lenet5_6_16_120_84")(
    _lenet5([6, 16, 120, 84], "LeCun et al. 1998, with ReLUs; Evci et al. 2022")
)


def _conv(blocks: list[int], dropout: float) -> Builder:
    name = f"conv{2 * len(blocks)}"

    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        inits = initialisers(init, seed)
        layers: list[Any] = [keras.Input(input_shape)]
        n = 0
        for filters in blocks:
            for _ in range(2):
                n += 1
                layers.append(
                    keras.layers.Conv2D(
                        filters,
                        3,
                        padding="same",
                        activation="relu",
                        kernel_initializer=next(inits),
                        name=f"conv{n}",
                    )
                )
            layers.append(keras.layers.MaxPooling2D(name=f"pool{n // 2}"))
            if dropout:
                layers.append(StatelessDropout(dropout, seed * 16 + n, name=f"drop_pool{n // 2}"))
        layers.append(keras.layers.Flatten(name="flatten"))
        for i in (1, 2):
            layers.append(
                keras.layers.Dense(
                    256, activation="relu", kernel_initializer=next(inits), name=f"fc{i}"
                )
            )
            if dropout:
                layers.append(StatelessDropout(dropout, seed * 16 + 8 + i, name=f"drop_fc{i}"))
        layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
        return keras.Sequential(layers, name=name)

    build.__doc__ = (
        f"VGG-like network: two 3x3 convolutions and a max-pool for each of {blocks} filters, two "
        f"dense layers of 256, dropout {dropout:g} (Frankle and Carbin 2019, figure 2)."
    )
    return build


for _blocks in ([64], [64, 128], [64, 128, 256]):
    for _dropout, _suffix in ((0.0, ""), (0.5, "_dropout")):
        _name = f"conv{2 * len(_blocks)}{_suffix}"
        register(_name, smallest=2 ** len(_blocks))(_conv(_blocks, _dropout))

resnet.register_all(register)
vgg.register_all(register)
