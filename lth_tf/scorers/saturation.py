"""Activations that saturate, for scores that need the flow to grow with what flows in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.scorers import inside
from lth_tf.scorers.inside import Replacement

# Operations that are bounded, at least on one side, wherever a model computes them.
_BOUNDED = ("ClipByValue", "Minimum", "Relu6", "Sigmoid", "Softsign", "Tanh")
_CONTINUED = "continued"  # the name scope of what is left of those that were replaced
_INSTEAD = "use --scorer=snip or grasp, or magnitude, which looks at no data either"


def unbounded(layers: Iterable[Any], model: Any) -> list[Replacement]:
    """Returns what makes activations go on beyond the point where they saturate.

    For inputs above zero such an activation becomes x -> f'(0) x, the only homogeneous function
    that agrees with it where it does not saturate: ReLU6 becomes ReLU. What does not saturate
    is left as it is.

    Args:
      layers: those of the model.
      model: for messages.

    Raises:
      UserError: an activation saturates, and is not zero at zero (a sigmoid).
    """
    found: list[Replacement] = []
    for layer in layers:
        if isinstance(layer, keras.layers.ReLU) and layer.max_value is not None:
            found.append((layer, "max_value", None))
            continue
        if hasattr(layer, "recurrent_activation"):
            continue  # gates and what they let through saturate together
        for attribute in ("activation", *inside.function_of(layer)):
            function = vars(layer).get(attribute)
            slope = _slope(function) if callable(function) else None
            if slope:
                found.append((layer, attribute, _continued(function, slope)))
            elif slope == 0 and attribute == "activation":
                raise UserError(
                    f"layer {layer.name!r} of model {model.name!r} has the activation "
                    f"{getattr(function, '__name__', function)!r}, which saturates and is not zero "
                    f"at zero, so that synflow has no flow to measure; {_INSTEAD}"
                )
    return found


def _slope(function: Callable[[Any], Any]) -> float | None:
    """f'(0) of a function of single numbers that saturates, 0 if f(0) != 0; else None."""
    try:
        far, near = (
            np.asarray(function(tf.constant([[x, 2 * x]], tf.float64))) for x in (1e8, 1e-8)
        )
    except Exception:  # of several tensors, of another dtype: no activation
        return None
    if far.shape != (1, 2) or not np.isfinite([far, near]).all() or not near.any():
        return None
    if not np.isclose(far[0, 0], far[0, 1], rtol=1e-6, atol=0):
        return None
    if not np.isclose(2 * near[0, 0], near[0, 1], rtol=1e-6, atol=0):
        return 0.0
    return float(near[0, 0] / 1e-8)


def _continued(function: Callable[..., Any], slope: float) -> Callable[..., Any]:
    @tf.autograph.experimental.do_not_convert
    def call(x: Any, *arguments: Any, **options: Any) -> Any:
        # Rounded: of tanh the slope that was measured is not quite 1.
        straight = tf.cast(round(slope, 6), x.dtype) * x
        with tf.name_scope(_CONTINUED):
            bent = function(x, *arguments, **options)
        return tf.where(x > 0, straight, bent)

    return call


def require_flow(
    function: Any,
    values: list,
    inputs: Any,
    scores: Mapping[str, np.ndarray],
    *,
    continued: bool,
    model: Any,
) -> None:
    """Raises UserError if a flow saturates, or grows faster than what flows in.

    Args:
      function: a tf.function (kernels, inputs) -> (R, scores), R the sum of the outputs.
      values: the kernels.
      inputs: of ones.
      scores: kernel name -> what it returns for them.
      continued: whether activations of the model were replaced, see `unbounded`.
      model: for messages.
    """
    graph = function.get_concrete_function(values, inputs).graph
    if names := _bounded(graph, ("Relu6",)):
        raise UserError(
            f"model {model.name!r} computes a ReLU6 ({names[0]}) where synflow cannot take it "
            "out, and it saturates; make it a layer (keras.layers.ReLU(6.0)) or an activation, or "
            f"{_INSTEAD}"
        )
    if continued and not _is_affine(function, values, inputs):
        raise UserError(
            f"model {model.name!r} multiplies activations that saturate with others (hard swish, "
            "squeeze and excite), so that synflow's flow cannot be made to grow with what flows "
            f"in; {_INSTEAD}"
        )
    whole = all(np.all(v) for v in values)  # a mask may cut the network, on purpose
    dead = [name for name, s in scores.items() if not s.any()]
    explained = _bounded(graph, ("Softmax",))  # queries and keys: inputs are the same everywhere
    if whole and 0 < len(dead) < len(scores) and not explained and (names := _bounded(graph)):
        raise UserError(
            f"nothing flows through {', '.join(dead)} of model {model.name!r}, where an "
            f"activation saturates ({names[0]}), so that their weights cannot be ranked; {_INSTEAD}"
        )


def _bounded(graph: Any, kinds: tuple[str, ...] = _BOUNDED) -> list[str]:
    """The names of a graph's operations, those of gradients aside, that are bounded."""
    return [
        op.name
        for op in graph.get_operations()
        if op.type in kinds
        and not op.name.startswith("gradient_tape")
        and f"/{_CONTINUED}" not in op.name
        and op.outputs[0].dtype.is_floating
    ]


def _is_affine(function: Callable[[list, Any], Any], values: list, inputs: Any) -> bool:
    """Whether R(c) = a c + b for large c, as with biases and moving means; not if it grows more."""

    def flow(factor: float) -> float:
        more = tf.nest.map_structure(lambda x: tf.cast(factor, x.dtype) * x, inputs)
        return float(function(values, more)[0])

    one, two, four = (flow(c) for c in (1e6, 2e6, 4e6))
    return four - two <= 2.01 * (two - one) + 1e-6 * abs(four)
