"""Scores of the second order, against derivatives written out."""

import numpy as np
import pytest

import lth_tf
from lth_tf import pruning
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError

layers = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 6)), RNG.integers(0, 3, 7).astype("int32")
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([6], dtype="float64"),
            layers.Dense(5, "tanh", dtype="float64", name="a"),
            layers.BatchNormalization(dtype="float64"),
            layers.Dense(3, dtype="float64", name="b"),
        ]
    )


def losses(model, x, y):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))


def by_hand(model):
    """Kernel name -> w, mean gradient, mean of the squared gradients of single examples."""
    kernels = pruning.kernels(model)
    each = []
    for i in range(7):
        with tf.GradientTape() as tape:
            loss = losses(model, X[i : i + 1], Y[i : i + 1])[0]
        each.append([g.numpy() for g in tape.gradient(loss, list(kernels.values()))])
    return {
        n: (v.numpy(), np.mean([e[j] for e in each], 0), np.mean([e[j] ** 2 for e in each], 0))
        for j, (n, v) in enumerate(kernels.items())
    }


def test_fisher_is_the_mean_of_squares_of_single_examples(model):
    diag = lth_tf.score(model, "fisher_diag", BATCHES)
    taylor = lth_tf.score(model, "fisher_taylor", BATCHES)
    for name, (w, g, f) in by_hand(model).items():
        assert np.allclose(diag[name], w**2 * f / 2, rtol=1e-9, atol=0)
        assert np.allclose(taylor[name], w * g + w**2 * f / 2, rtol=1e-9, atol=1e-15)


def test_the_hessians_diagonal_is_hit_by_many_probes(model):
    kernels = pruning.kernels(model)
    exact = {}
    for name, v in kernels.items():
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(losses(model, X, Y))
            g = tape.gradient(loss, v)
        size = int(np.prod(v.shape))
        exact[name] = np.diag(outer.jacobian(g, v).numpy().reshape(size, size)).reshape(v.shape)
    found = lth_tf.score(model, "hessian_diag", BATCHES, probes=400)
    for name, v in kernels.items():
        want = v.numpy() ** 2 * exact[name] / 2
        assert np.corrcoef(found[name].ravel(), want.ravel())[0, 1] > 0.98
    again = lth_tf.score(model, "hessian_diag", BATCHES, probes=2, seed=1)
    other = lth_tf.score(model, "hessian_diag", BATCHES, probes=2, seed=2)
    assert any(not np.array_equal(a, other[n]) for n, a in again.items())
    with pytest.raises(UserError, match="probes must be at least 1"):
        lth_tf.score(model, "hessian_diag", BATCHES, probes=0)
