"""A model as a pure function of its kernels: what scorers differentiate.

Nothing of the model changes. While it is called, every layer sees tensors instead of
its variables, cast to the precision that the scorer asks for; afterwards it has its
variables back. So a mixed-precision model is scored in float32, a float32 one in float64
where that is needed, and there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import distribute, pruning
from lth_tf.compat import all_digits, inlined, keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning.inside import (
    autographed,
    is_graph_network,
    layers_autographed,
    layers_within,
)
from lth_tf.scorers import heads, inside, norms
from lth_tf.scorers import saturation as saturations
from lth_tf.scorers.batches import (
    Batch,
    Loss,
    Parts,
    added,
    explained,
    labels_of,
    ones,
    require_classes,
)
from lth_tf.scorers.inside import Replacement


class Reused:
    """A model whose networks are built once and used in every round of scoring.

    Args:
      model: a plain model, which must not change meanwhile.
    """

    def __init__(self, model: Any):
        self.model = model
        self.networks: dict[tuple, Network] = {}


class Network:
    """A plain Keras model as a function (kernels, inputs) -> logits, and its derivatives.

    Dropout and noise are off. A softmax at the end is left out. BatchNormalization is computed
    by `norms`: with `batch_norm="train"` from the statistics of the batch, with "eval" (and where
    the layer is frozen, or a functional model calls it with training=False) from the moving
    ones, which are never updated.

    Args:
      model: a plain model or `Reused`.
      dtype: 'float32' or 'float64'; by default float64 for a float64 model, else float32.
      batch_norm: 'train' or 'eval'.
      others: what to make of the weights that are not kernels: tensor -> tensor.
      preprocessing: False leaves out layers that scale the inputs.
      saturation: False makes activations go on beyond the point where they saturate, see
        `saturation.unbounded`.
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
        saturation: bool = True,
        fixed: Sequence[Replacement] = (),
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
        layers = layers_within(model)
        self._attributes = [
            (layer, attribute, names[id(value)])
            for layer in layers
            for attribute, value in vars(layer).items()
            if isinstance(value, tf.Variable) and id(value) in names
        ]
        self._require_attributes(variables)
        self._fixed: list[Replacement] = []
        frozen = norms.frozen(model)
        for layer in layers:
            self._fixed += inside.computing_in(layer, self.dtype)
            self._fixed += inside.forgetting_losses(layer)
            call: Any = None
            if isinstance(layer, keras.layers.RNN) and layer.stateful:
                raise UserError(
                    f"layer {layer.name!r} is stateful: a score would change its state; build the "
                    "model with stateful=False"
                )
            if isinstance(layer, keras.layers.BatchNormalization):
                train = batch_norm == "train" and layer.trainable and id(layer) not in frozen
                call = norms.batch_norm(layer, train)
            elif type(layer) is keras.layers.LayerNormalization:
                call = norms.layer_norm(layer)
            elif isinstance(layer, _NOISE) or (
                isinstance(layer, _PREPROCESSING) and not preprocessing
            ):
                call = passed_on
            if call:
                self._fixed.append((layer, "call", call))
            if self.dtype == tf.float64 and is_graph_network(layer):
                self._fixed.append(inside.taking_inputs_as_they_are(layer, self._cast))
        last = heads.without_probabilities(model, sigmoid=not saturation)
        self._fixed += [*last, *fixed]
        self._unbounded: list[Replacement] | None = None  # until the flow was looked at
        if not saturation:
            ends = [layer for layer, _, _ in last]
            self._unbounded = saturations.unbounded([x for x in layers if x not in ends], model)
            self._fixed += self._unbounded
        self._gradient, self._product, self._flow = (
            tf.function(function, autograph=False)
            for function in (self._gradient_of, self._product_of, self._flow_of)
        )
        for function in (self._gradient, self._product, self._flow):
            # TensorFlow would warn of every model that is scored as of one traced again.
            inside.omit_tracing_warning(function)
        self._classes, self._positions = 0, ()  # not known yet

    @classmethod
    def of(cls, model: Any, **options: Any) -> Network:
        """Returns a network of the model; from `Reused` always the same for the same options."""
        if not isinstance(model, Reused):
            return cls(model, **options)
        key = tuple(sorted(options.items()))
        if key not in model.networks:
            model.networks[key] = cls(model.model, **options)
        return model.networks[key]

    def __call__(self, kernels: Sequence[Any], inputs: Any) -> Any:
        """Returns the logits; `kernels` are tensors in the order of `self.kernels`."""
        values = dict(zip(self.kernels, kernels, strict=True))
        values |= {n: self._change(self._cast(v.read_value())) for n, v in self.others.items()}
        held = [(layer, attribute, values[name]) for layer, attribute, name in self._attributes]
        with inside.replaced([*held, *self._fixed]), inlined(), layers_autographed():
            return self.model(tf.nest.map_structure(self._cast, inputs), training=False)

    def gradient(
        self,
        kernels: Mapping[str, Any],
        batches: Iterable[Batch] | None,
        loss: Loss,
    ) -> dict[str, np.ndarray]:
        """Returns the gradient of the mean loss over all examples.

        Args:
          kernels: kernel name -> array.
          batches: (inputs, int labels [n]), the same at every walk.
          loss: (labels, logits) -> losses of the examples.

        Returns:
          Kernel name -> array of the kernel's shape.

        Raises:
          UserError: batches that do not fit the model, or a loss that is not finite or does
            not depend on a kernel.
        """
        values, parts = self._values(kernels), Parts(batches, summed=False)
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
          batches: (inputs, int labels [n]), the same at every walk.
          loss: (labels, logits) -> losses of the examples.
          temperature: divides the logits.
          summed: take the sum of the batches' mean losses instead of the overall mean.

        Raises:
          UserError: batches that do not fit the model, a loss that is not finite, a model
            without a second derivative.
        """
        values, parts = self._values(kernels), Parts(batches, summed)
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

    def hessian_product(
        self,
        kernels: Mapping[str, Any],
        batches: Iterable[Batch] | None,
        loss: Loss,
        vector: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Returns H v, where H is the Hessian of the mean loss of all examples.

        Args:
          kernels: kernel name -> array.
          batches: (inputs, int labels [n]), the same at every walk.
          loss: (labels, logits) -> losses of the examples.
          vector: kernel name -> array of the kernel's shape: v.

        Raises:
          UserError: see `hessian_gradient`.
        """
        values, parts = self._values(kernels), Parts(batches, summed=False)
        total = self._summed(self._product, values, parts, loss, 1.0, self._values(vector))
        return dict(zip(self.kernels, total, strict=True))

    def flow(self, kernels: Mapping[str, Any], batches: Any = None) -> dict[str, np.ndarray]:
        """Returns w * dR/dw, R the sum of the outputs for an input of ones.

        Args:
          kernels: kernel name -> array.
          batches: tells the input's shape where the model does not.

        Raises:
          UserError: R is not finite, or no one tells the shape.
        """
        values, inputs = self._values(kernels), ones(self.model, batches, self.dtype)
        with explained(self.model, self.dtype):
            total, flow = self._flow(values, inputs)
        if not np.isfinite(total):
            raise UserError(
                f"the flow through model {self.model.name!r} is {float(total)}: too many layers "
                "without normalisation for float64, activations that are multiplied with each "
                "other (gates), or weights that are not finite; use --scorer=snip"
            )
        found = {name: f.numpy() for name, f in zip(self.kernels, flow, strict=True)}
        if self._unbounded is not None:
            continued, self._unbounded = self._unbounded, None
            saturations.require_flow(
                self._flow, values, inputs, found, continued=bool(continued), model=self.model
            )
        return found

    # --- Inside ---

    def _cast(self, value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        return tf.cast(value, self.dtype) if value.dtype.is_floating else value

    def _require_attributes(self, variables: Mapping[str, Any]) -> None:
        held = {name for _, _, name in self._attributes}
        same = self._change is tf.identity
        for name, v in variables.items():
            if name not in held and v.dtype.is_floating and not (same and v.dtype == self.dtype):
                raise UserError(
                    f"weight {name!r} is held in a list or dict of its layer, where it cannot be "
                    f"replaced by one in {self.dtype.name}: make it an attribute of the layer"
                )

    def _values(self, kernels: Mapping[str, Any]) -> list[Any]:
        return [tf.cast(tf.convert_to_tensor(kernels[n]), self.dtype) for n in self.kernels]

    def _flow_of(self, values: list, ones: Any) -> tuple[Any, list]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            total = tf.add_n([tf.reduce_sum(y) for y in tf.nest.flatten(self(values, ones))])
        gradient = tape.gradient(total, values, unconnected_gradients="zero")
        return total, [v * g for v, g in zip(values, gradient, strict=True)]

    def _gradient_of(
        self, values: list, inputs: Any, labels: Any, weight: Any, loss: Loss, temperature: Any
    ) -> tuple[Any, list]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            logits = self(values, inputs) / temperature
            value = weight * tf.reduce_sum(autographed(loss)(labels, logits))
        return value, tape.gradient(value, values)

    def _product_of(
        self, values: list, inputs: Any, labels: Any, weight: Any, loss: Loss, temperature: Any,
        vector: list,
    ) -> tuple[Any, list]:  # fmt: skip
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            value, gradient = self._gradient_of(values, inputs, labels, weight, loss, temperature)
            fixed = vector or [None if g is None else tf.stop_gradient(g) for g in gradient]
            pairs = [(g, v) for g, v in zip(gradient, fixed, strict=True) if g is not None]
            along = tf.add_n([tf.reduce_sum(g * v) for g, v in pairs])
        products = tape.gradient(along, values, unconnected_gradients="zero")
        return value, [
            None if g is None else p for g, p in zip(gradient, products, strict=True)
        ]

    def _summed(
        self, function: Any, values: list, parts: Parts, loss: Loss, temperature: float = 1.0,
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

        total = workers.agree(lambda: added(results()))
        if workers.count == 1:
            return total
        blank = [np.zeros(value.shape, value.dtype.as_numpy_dtype) for value in values]
        return workers.add(total or blank)

    def _begin(
        self, function: Any, values: list, part: tuple, loss: Loss, temperature: float,
        vector: tuple,
    ) -> tuple[Any, Any]:  # fmt: skip
        inputs, labels, weight = part
        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        labels = self._fitting(values, inputs, labels)
        numbers = tf.constant(weight, self.dtype), loss, tf.constant(temperature, self.dtype)
        arguments = values, inputs, labels, *numbers, *vector
        with explained(self.model, self.dtype), all_digits():
            value, result = function(*arguments)
        if function is self._product:
            norms.refuse_moments(function.get_concrete_function(*arguments).graph, self.model)
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
                "scores need a finite one: look at the inputs' scale and the weights"
            )
        if not all(np.isfinite(r).all() for r in result):
            raise UserError(
                f"the derivatives of model {self.model.name!r} on the batches given are not "
                "finite, though the loss is: are there NaN among the inputs (a division by a "
                "deviation of 0)?"
            )
        return result

    def _fitting(self, values: list, inputs: Any, labels: Any) -> Any:
        """Labels as a tensor, checked against what the model puts out."""
        if not self._classes:
            any_number = all(x.shape[0] is None for x in self.model.inputs or ())
            few = tf.nest.map_structure(lambda x: x[:8], inputs) if any_number else inputs
            with explained(self.model, self.dtype):
                logits = tf.function(self, autograph=False)
                heads.require_one(found := logits(values, few), self.model)
                end = logits.get_concrete_function(values, few).outputs[0]
            several = np.shape(labels)[1:] == tuple(found.shape[1:-1])
            last = heads.last_operation(end)
            self._classes = heads.classes_of(found, last, self.model, positions=several)
            self._positions = tuple(found.shape[1:-1])
        labels = labels_of(inputs, labels, self._positions)
        require_classes(labels, self._classes)
        return tf.constant(labels, tf.int32)


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
      inputs: what it returns.
      training, mask: not looked at; Keras gives them to layers.
    """
    return inputs
