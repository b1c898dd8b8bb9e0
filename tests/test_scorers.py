"""scorers: what each score is, against its formula."""

import numpy as np
import pytest

from lth_tf.compat import tf
from lth_tf.scorers import SCORERS


def magnitude(values):
    return SCORERS["magnitude"](None, {"fc1/kernel": values}, None)["fc1/kernel"]


@pytest.mark.parametrize("kind", ["array", "variable"])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (tf.float16, np.float32),
        (tf.bfloat16, np.float32),
        (tf.float32, np.float32),
        (tf.float64, np.float64),
    ],
)
def test_magnitude_is_the_absolute_value_in_float32_or_wider(dtype, wide, kind):
    w = tf.constant([[-2.0, 0.5, 1 / 3], [0.0, -0.0, -1e-4]], dtype)
    scores = magnitude(tf.Variable(w) if kind == "variable" else w.numpy())
    assert scores.dtype == wide and scores.shape == (2, 3)
    assert (scores == np.abs(tf.cast(w, tf.float64).numpy())).all()
    assert not np.signbit(scores).any()


def test_magnitude_keeps_what_float64_tells_apart():
    assert len(np.unique(magnitude(1 + np.arange(5) * 2.0**-50))) == 5


def test_magnitude_is_higher_for_what_is_kept():
    scores = magnitude(np.array([0.1, -3.0, 0.0, 2.0], np.float32))
    assert np.argsort(-scores).tolist() == [1, 3, 0, 2]


def test_magnitude_takes_all_kernels_and_leaves_them_alone():
    kernels = {"b": tf.Variable([[-1.0]]), "a": np.array([-2.0, 3.0])}
    scores = SCORERS["magnitude"](None, kernels)
    assert list(scores) == ["b", "a"] and scores["a"].tolist() == [2, 3]
    assert kernels["b"].numpy() == -1 and kernels["a"].tolist() == [-2, 3]
    scores["a"][:] = 0
    assert kernels["a"].tolist() == [-2, 3]
