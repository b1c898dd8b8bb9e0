"""A model as a pure function of its kernels: what scorers differentiate.

Nothing of the model changes. While it is called, every layer sees tensors in the place of
its variables, cast to the precision that the scorer asks for; afterwards it has its
variables back. So a mixed-precision model is scored in float32, a float32 one in float64
where that is needed, and there is nothing to restore.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import distribute, pruning
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Any]


class Reused:
    """A model whose networks are built once and used in every round of scoring.

    Args:
      model: a plain model, which must not change meanwhile.
    """

    def __init__(self, model: Any):
        self.model = model
        self.networks: dict[tuple, Network] = {}


class Network:
    """A plain Keras model as a function (kernels, images) -> logits, and its derivatives.

    Dropout and noise are off. A softmax at the end is left out. BatchNormalization is computed
    here: with `batch_norm="train"` from the statistics of the batch, with "eval" (and where
    the layer is frozen, or a functional model calls it with training=False) from the moving
    ones, which are never updated.

    Keras' own layer would not do, because `tf.nn.moments` stops the gradient through the mean
    inside the variance: right for the gradient, where that term is zero, wrong for the
    Hessian. LayerNormalization is computed here for the same reason.

    Args:
      model: a plain model or `Reused`.
      dtype: 'float32' or 'float64'; by default float64 for a float64 model, else float32.
      batch_norm: 'train' or 'eval'.
      others: what to make of the weights that are not kernels: tensor -> tensor.
      preprocessing: False leaves out layers that scale the images.
      fixed: further attributes of layers to replace: (layer, attribute, value).

    Raises:
      UserError: a layer normalises by batches in a way that is not known here, keeps a
        state, or holds weights where they cannot be replaced.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: str | None = None,
        batch_norm: str = "eval",
        others: Callable[[Any], Any] = tf.identity,
        preprocessing: bool = True,
        fixed: Sequence[tuple[Any, str, Any]] = (),
    ):
        if batch_norm not in ("train", "eval"):
            raise UserError(f"unknown batch_norm {batch_norm!r}; there are: train, eval")
        self.model, self._change = model, others
        variables = pruning.weights(model)
        wide = any(v.dtype == tf.float64 for v in variables.values())
        self.dtype = tf.as_dtype(dtype or ("float64" if wide else "float32"))
        self.kernels = list(pruning.kernels(model))
        self.others = {n: v for n, v in variables.items() if n not in self.kernels}
        names = {id(v): n for n, v in variables.items()}
        layers = list(model._flatten_layers())
        self._places = [
            (layer, attribute, names[id(value)])
            for layer in layers
            for attribute, value in vars(layer).items()
            if isinstance(value, tf.Variable) and id(value) in names
        ]
        self._require_places(variables)
        self._fixed: list[tuple[Any, str, Any]] = []
        policy = keras.mixed_precision.Policy(self.dtype.name)
        frozen = _frozen(model)
        for layer in layers:
            self._fixed += [
                (layer, "_dtype_policy", policy),
                (layer, "_compute_dtype_object", self.dtype),
                (layer, "_losses", []),
                (layer._thread_local, "_eager_losses", []),
            ]
            call: Any = None
            if getattr(layer, "stateful", False) and isinstance(layer, keras.layers.RNN):
                raise UserError(
                    f"layer {layer.name!r} is stateful: a score would change its state; build the "
                    "model with stateful=False"
                )
            if isinstance(layer, keras.layers.BatchNormalization):
                train = batch_norm == "train" and layer.trainable and id(layer) not in frozen
                call = _batch_norm(layer, train)
            elif type(layer) is keras.layers.LayerNormalization:
                call = _layer_norm(layer)
            elif isinstance(layer, _NOISE) or (
                isinstance(layer, _PREPROCESSING) and not preprocessing
            ):
                call = passed_on
            if call:
                self._fixed.append((layer, "call", call))
            if self.dtype == tf.float64 and getattr(layer, "_is_graph_network", False):
                self._fixed.append((layer, "_conform_to_reference_input", self._conform(layer)))
        self._fixed += [*_without_softmax(model), *fixed]
        self._gradient = tf.function(self._gradient_of)
        self._product = tf.function(self._product_of)
        self._flow = tf.function(self._flow_of)
        for function in (self._gradient, self._product, self._flow):
            # TensorFlow would warn of every model that is scored as of one traced again.
            function._omit_frequent_tracing_warning = True
        self._classes = 0  # not known yet

    @classmethod
    def of(cls, model: Any, **options: Any) -> Network:
        """Returns a network of the model; from `Reused` always the same for the same options."""
        if not isinstance(model, Reused):
            return cls(model, **options)
        key = tuple(sorted(options.items()))
        if key not in model.networks:
            model.networks[key] = cls(model.model, **options)
        return model.networks[key]

    def __call__(self, kernels: Sequence[Any], images: Any) -> Any:
        """Returns the logits; `kernels` are tensors in the order of `self.kernels`."""
        values = dict(zip(self.kernels, kernels, strict=True))
        values |= {n: self._change(self._cast(v.read_value())) for n, v in self.others.items()}
        places = [(layer, attribute, values[name]) for layer, attribute, name in self._places]
        with replaced([*places, *self._fixed]), _inlined():
            return self.model(tf.nest.map_structure(self._cast, images), training=False)

    def gradient(
        self,
        kernels: Mapping[str, Any],
        batches: Iterable[Batch] | None,
        loss: Loss,
    ) -> dict[str, np.ndarray]:
        """Returns the gradient of the mean loss over all examples.

        Args:
          kernels, batches, loss: see `hessian_gradient`.

        Raises:
          UserError: batches that do not fit the model, or a loss that is not finite.
        """
        values, parts = self._values(kernels), _Parts(batches, summed=False)
        total = self._summed(self._gradient, values, parts, loss)
        return dict(zip(self.kernels, total, strict=True))

    def hessian_gradient(
        self,
        kernels: Mapping[str, Any],
        batches: Iterable[Batch] | None,
        loss: Loss,
        *,
        temperature: float = 1.0,
        summed: bool = False,
    ) -> dict[str, np.ndarray]:
        """Returns H g, where g and H are gradient and Hessian of the mean loss of all examples.

        Two passes, the second for the product with the whole gradient, of which the memory
        does not grow with the number of batches; a single batch needs one pass.

        Args:
          kernels: kernel name -> array.
          batches: (images, int labels [n]), the same at every walk.
          loss: (labels, logits) -> losses of the examples.
          temperature: divides the logits.
          summed: take the sum of the batches' mean losses instead of the overall mean.

        Raises:
          UserError: batches that do not fit the model, a loss that is not finite, a model
            without a second derivative.
        """
        values, parts = self._values(kernels), _Parts(batches, summed)
        vector: list[Any] = []
        if len(parts.sizes) > 1:
            whole = self._summed(self._gradient, values, parts, loss, temperature)
            vector = [tf.constant(whole.pop(0)) for _ in self.kernels]
        total = self._summed(self._product, values, parts, loss, temperature, vector)
        if not any(np.any(t) for t in total):
            raise UserError(
                f"the Hessian of model {self.model.name!r} times its gradient is zero everywhere: "
                "its second derivative does not exist or vanishes; use --scorer=snip"
            )
        return dict(zip(self.kernels, total, strict=True))

    def flow(self, kernels: Mapping[str, Any], batches: Any = None) -> dict[str, np.ndarray]:
        """Returns w * dR/dw, R the sum of the outputs for an input of ones.

        Args:
          kernels: kernel name -> array.
          batches: tells the input's shape where the model does not.

        Raises:
          UserError: R is not finite, or no one tells the shape.
        """
        with self._explained():
            total, flow = self._flow(self._values(kernels), self._ones(batches))
        if not np.isfinite(total):
            raise UserError(
                f"the flow through model {self.model.name!r} is {float(total)}: too many layers "
                "without normalisation for float64, or weights that are not finite"
            )
        return {name: f.numpy() for name, f in zip(self.kernels, flow, strict=True)}

    # --- Inside ---

    def _cast(self, value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        return tf.cast(value, self.dtype) if value.dtype.is_floating else value

    def _require_places(self, variables: Mapping[str, Any]) -> None:
        placed = {name for _, _, name in self._places}
        same = self._change is tf.identity
        for name, v in variables.items():
            if name not in placed and v.dtype.is_floating and not (same and v.dtype == self.dtype):
                raise UserError(
                    f"weight {name!r} is held in a list or dict of its layer, where it cannot be "
                    f"replaced by one in {self.dtype.name}: make it an attribute of the layer"
                )

    def _conform(self, functional: Any) -> Callable[..., Any]:
        """Keras casts the inputs of a functional model to the dtype that it was built with."""

        def conform(tensor: Any, ref_input: Any) -> Any:
            found = type(functional)._conform_to_reference_input(functional, tensor, ref_input)
            if not found.dtype.is_floating:
                return found
            return tf.ensure_shape(tf.reshape(self._cast(tensor), tf.shape(found)), found.shape)

        return conform

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Within, a model that cannot be computed is a UserError, not what Keras makes of it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # autograph and Keras wrap what layers raise in their own
            text = str(error)
            if found := re.search(r"gradient registry has no entry for: (\w+)", text):
                raise UserError(
                    f"model {self.model.name!r} has no second derivative: TensorFlow cannot "
                    f"differentiate {found[1]}; use --scorer=snip"
                ) from error
            if isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
                raise
            frame = ("in user code", "File ", "Call arguments", "Exception encountered")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith(frame)]
            raise UserError(
                f"model {self.model.name!r} cannot be computed on these inputs in "
                f"{self.dtype.name}: {type(error).__name__}: {' '.join(lines)[:300]}"
            ) from error

    def _values(self, kernels: Mapping[str, Any]) -> list[Any]:
        return [tf.cast(tf.convert_to_tensor(kernels[n]), self.dtype) for n in self.kernels]

    def _ones(self, batches: Any) -> Any:
        specs = self.model.save_spec()
        if specs is None:
            if not batches:
                raise UserError(
                    f"model {self.model.name!r} does not know the shape of its inputs; give "
                    "batches, of which the first tells it"
                )
            shapes = tf.nest.map_structure(lambda x: np.shape(x)[1:], next(iter(batches))[0])
            return tf.ones((1, *shapes), self.dtype)
        (inputs, *_), _ = specs
        return tf.nest.map_structure(
            lambda x: tf.ones((x.shape[0] or 1, *x.shape[1:]), self.dtype), inputs
        )

    def _flow_of(self, values: list, ones: Any) -> tuple[Any, list]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            total = tf.add_n([tf.reduce_sum(y) for y in tf.nest.flatten(self(values, ones))])
        gradient = tape.gradient(total, values, unconnected_gradients="zero")
        return total, [v * g for v, g in zip(values, gradient, strict=True)]

    def _gradient_of(
        self, values: list, images: Any, labels: Any, weight: Any, loss: Loss, temperature: Any
    ) -> tuple[Any, list]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            value = weight * tf.reduce_sum(loss(labels, self(values, images) / temperature))
        return value, tape.gradient(value, values)

    def _product_of(
        self, values: list, images: Any, labels: Any, weight: Any, loss: Loss, temperature: Any,
        vector: list,
    ) -> tuple[Any, list]:  # fmt: skip
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            value, gradient = self._gradient_of(values, images, labels, weight, loss, temperature)
            fixed = vector or [None if g is None else tf.stop_gradient(g) for g in gradient]
            pairs = [(g, v) for g, v in zip(gradient, fixed, strict=True) if g is not None]
            along = tf.add_n([tf.reduce_sum(g * v) for g, v in pairs])
        products = tape.gradient(along, values, unconnected_gradients="zero")
        return value, [
            None if g is None else p for g, p in zip(gradient, products, strict=True)
        ]

    def _summed(
        self, function: Any, values: list, parts: _Parts, loss: Loss, temperature: float = 1.0,
        *vector: list,
    ) -> list[np.ndarray]:  # fmt: skip
        """The sum over all parts, which are dealt out to the devices of `distribute.scored_on`.

        A part stays whole, and those of one process are added up in their order: the sum does
        not depend on how many devices there are.
        """
        strategy = distribute.scored_on()
        workers, count = distribute.workers_of(strategy), strategy.num_replicas_in_sync
        devices = strategy.extended.worker_devices if count > 1 else (None,)
        first = distribute.first_replica(strategy)

        def results() -> Iterator[list[Any]]:
            begun: list[tuple] = []
            for i, part in enumerate(parts):
                if 0 <= (here := i % count - first) < len(devices):
                    with tf.device(devices[here]):  # a GPU goes on computing while others begin
                        begun.append(self._begin(function, values, part, loss, temperature, vector))
                    if len(begun) == len(devices):
                        yield from (self._checked(*one) for one in begun)
                        begun = []
            yield from (self._checked(*one) for one in begun)

        total = workers.agree(lambda: _sum(results()))
        if workers.count == 1:
            return total
        blank = [np.zeros(value.shape, value.dtype.as_numpy_dtype) for value in values]
        return workers.add(total or blank)

    def _begin(
        self, function: Any, values: list, part: tuple, loss: Loss, temperature: float,
        vector: tuple,
    ) -> tuple[Any, Any]:  # fmt: skip
        images, labels, weight = part
        images = tf.nest.map_structure(tf.convert_to_tensor, images)
        labels = self._fitting(values, images, labels)
        numbers = tf.constant(weight, self.dtype), loss, tf.constant(temperature, self.dtype)
        arguments = values, images, labels, *numbers, *vector
        with self._explained():
            value, result = function(*arguments)
        if function is self._product:
            self._refuse_moments(function.get_concrete_function(*arguments).graph)
        return value, result

    def _checked(self, value: Any, result: list) -> list[Any]:
        if missing := [n for n, r in zip(self.kernels, result, strict=True) if r is None]:
            raise UserError(
                f"the loss of model {self.model.name!r} does not depend on {', '.join(missing)}: a "
                "branch whose outputs the loss does not see, or one that stops gradients"
            )
        if not np.isfinite(value):
            raise UserError(
                f"the loss of model {self.model.name!r} on the batches given is {float(value)}; "
                "scores need a finite one: look at the images' scale and the weights"
            )
        return result

    def _fitting(self, values: list, images: Any, labels: Any) -> Any:
        """Labels as a tensor, checked against what the model puts out."""
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(
                f"labels must be whole numbers of shape [n], not {labels.dtype} of shape "
                f"{list(labels.shape)}; turn one-hot labels into numbers with argmax"
            )
        shape = tf.nest.flatten(images)[0].shape
        if shape.rank == 0 or shape[0] != len(labels):
            raise UserError(
                f"a batch has images of shape {list(shape)} but {len(labels)} labels; it must be "
                "(images [n, ...], labels [n])"
            )
        if not self._classes:
            any_number = all(x.shape[0] is None for x in getattr(self.model, "inputs", None) or ())
            few = tf.nest.map_structure(lambda x: x[:8], images) if any_number else images
            with self._explained():
                found = self(values, few)
            if not tf.is_tensor(found):
                raise UserError(
                    f"model {self.model.name!r} puts out {len(tf.nest.flatten(found))} tensors; "
                    "scores need one, the logits"
                )
            logits = found.numpy()
            if logits.ndim != 2 or logits.shape[1] < 2:
                raise UserError(
                    f"model {self.model.name!r} puts out {list(logits.shape)}; scores need logits "
                    "of shape [n, classes] with at least two classes"
                )
            if (logits >= 0).all() and np.allclose(logits.sum(1), 1, atol=1e-4):
                raise UserError(
                    f"model {self.model.name!r} ends in a softmax; scores are taken on logits: "
                    "build it without the last activation"
                )
            self._classes = logits.shape[1]
        classes = self._classes
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(
                f"labels range from {labels.min()} to {labels.max()}, but the model has {classes} "
                f"outputs: labels must be 0 to {classes - 1}"
            )
        return tf.constant(labels, tf.int32)

    def _refuse_moments(self, graph: Any) -> None:
        for op in graph.get_operations():
            # Those in the gradient of a fused normalisation are in their place.
            forward = not op.name.startswith("gradient_tape")
            if forward and op.type == "StopGradient" and any(
                c.type == "SquaredDifference" for c in op.outputs[0].consumers()
            ):
                raise UserError(
                    f"model {self.model.name!r} takes moments with tf.nn.moments ({op.name}), "
                    "whose second derivative is wrong in TensorFlow: it stops the gradient through "
                    "the mean; use BatchNormalization or LayerNormalization, which are computed "
                    "without it, or --scorer=snip"
                )


@contextlib.contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within, the layers' attributes have other values; past Keras' tracking."""
    before: list[tuple[dict, str, Any]] = []
    try:
        for layer, attribute, value in attributes:
            inside = layer.__dict__
            before.append((inside, attribute, inside.get(attribute, _ABSENT)))
            inside[attribute] = value
        yield
    finally:
        for inside, attribute, value in reversed(before):
            if value is _ABSENT:
                del inside[attribute]
            else:
                inside[attribute] = value


_ABSENT = object()


class _Parts:
    """(images, labels, factor of the sum of the batch's losses) of each batch, at every walk."""

    def __init__(self, batches: Iterable[Batch] | None, summed: bool):
        if batches is None:
            raise UserError("this scorer needs batches: an iterable of (images, labels)")
        self.batches = batches
        self.sizes = []
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise UserError(
                    f"a batch is (images, labels), not {type(batch).__name__}; for a single one "
                    "give [(images, labels)]"
                )
            if not np.ndim(batch[1]):
                raise UserError("labels must have the shape [n]; is the tf.data set not batched?")
            self.sizes.append(len(batch[1]))
        if not all(self.sizes) or not self.sizes:
            raise UserError("a batch is empty: scores need at least one example in each")
        self.summed = summed

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        for (images, labels), size in zip(self.batches, self.sizes, strict=True):
            yield images, labels, 1 / size if self.summed else 1 / sum(self.sizes)


def _sum(each: Iterable[list]) -> list[np.ndarray]:
    """Adds up lists of arrays in place, for they are as large as the model."""
    total: list[np.ndarray] = []
    for values in each:
        if total:
            for t, value in zip(total, values, strict=True):
                t += np.asarray(value)
        else:
            total = [np.array(value) for value in values]
        del values
    return total


def _batch_norm(layer: Any, train: bool) -> Callable[..., Any]:
    """What replaces a BatchNormalization's `call`."""
    known = (keras.layers.BatchNormalization, keras.layers.experimental.SyncBatchNormalization)
    if type(layer) not in known or getattr(layer, "renorm", False):
        raise UserError(
            f"layer {layer.name!r} is a {type(layer).__name__}, a batch normalisation that "
            "lth_tf does not know; use keras.layers.BatchNormalization"
        )

    @tf.autograph.experimental.do_not_convert
    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if mask is not None:
            raise UserError(f"layer {layer.name!r} normalises a masked batch: not supported")
        rank = len(inputs.shape)
        kept = sorted(axis % rank for axis in tf.nest.flatten(layer.axis))
        shape = [inputs.shape[i] if i in kept else 1 for i in range(rank)]

        def spread(value: Any) -> Any:
            return value if kept == [rank - 1] else tf.reshape(value, shape)

        zeros = tf.zeros_like(layer.moving_mean)
        gamma = spread(zeros + 1 if layer.gamma is None else layer.gamma)
        beta = spread(zeros if layer.beta is None else layer.beta)
        if not train:
            factor = gamma * tf.math.rsqrt(spread(layer.moving_variance) + layer.epsilon)
            return inputs * factor + (beta - spread(layer.moving_mean) * factor)
        axes = [i for i in range(rank) if i not in kept]
        centred = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        return centred * (gamma * tf.math.rsqrt(variance + layer.epsilon)) + beta

    return call


def _layer_norm(layer: Any) -> Callable[..., Any]:
    """What replaces a LayerNormalization's `call`."""

    @tf.autograph.experimental.do_not_convert
    def call(inputs: Any) -> Any:
        rank = len(inputs.shape)
        axes = sorted(axis % rank for axis in tf.nest.flatten(layer.axis))
        shape = [inputs.shape[i] if i in axes else 1 for i in range(rank)]
        centred = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        outputs = centred * tf.math.rsqrt(variance + layer.epsilon)
        if layer.scale:
            outputs *= tf.reshape(layer.gamma, shape)
        return outputs + tf.reshape(layer.beta, shape) if layer.center else outputs

    return call


_NOISE = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)
_PREPROCESSING = keras.layers.Normalization, keras.layers.Rescaling


def passed_on(inputs: Any, training: Any = None, mask: Any = None) -> Any:
    """A layer's `call` that does nothing.

    Args:
      inputs: are returned.
      training, mask: not looked at; Keras gives them.
    """
    return inputs


def _frozen(model: Any) -> set[int]:
    """Ids of the layers that a functional model, or one inside, calls with training=False."""
    if not getattr(model, "_is_graph_network", False):
        return set()
    found: set[int] = set()
    for layer in model.layers:
        if any(node.call_kwargs.get("training") is False for node in layer._inbound_nodes):
            found |= {id(x) for x in layer._flatten_layers()}
        elif isinstance(layer, keras.Model):
            found |= _frozen(layer)
    return found


@contextlib.contextmanager
def _inlined() -> Iterator[None]:
    """Within, a tf.function that a layer calls is traced anew, with what the layer has now.

    It would keep the tensors that it sees, and has kept the variables that it saw before.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _without_softmax(model: Any) -> list[tuple[Any, str, Any]]:
    """What makes a functional or Sequential model that ends in a softmax put out its logits."""
    while isinstance(model, keras.Model) and getattr(model, "outputs", None):
        if len(model.outputs) != 1:
            return []
        last = model.outputs[0]._keras_history.layer
        if last is model or len(last._inbound_nodes) > 1 and not isinstance(last, keras.Model):
            return []  # used elsewhere, too: not only the end
        model = last
    if isinstance(model, keras.layers.Softmax):
        return [(model, "call", lambda inputs, mask=None: inputs)]
    if getattr(model, "activation", None) is keras.activations.softmax:
        return [(model, "activation", keras.activations.linear)]
    return []
