"""Scores that look at no data: magnitude, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf.masks import Scores


def magnitude(model: Any, kernels: Mapping[str, Any], batches: Any = None) -> Scores:
    """Returns |w|, in float32 or wider (Han et al. 2015; Frankle and Carbin 2019, section 1).

    At initialisation it ranks layers by the deviation that their weights were drawn with.

    Args:
      model: not looked at; a scorer's signature has it.
      kernels: kernel name -> variable or array.
      batches: not needed.

    Returns:
      Kernel name -> array of the kernel's shape.
    """
    return {name: _wide(np.abs(np.asarray(kernel))) for name, kernel in kernels.items()}


def random(model: Any, kernels: Mapping[str, Any], batches: Any = None, *, seed: int = 0) -> Scores:
    """Returns numbers drawn uniformly from 0 to 1: every weight has the same chance.

    Args:
      model, batches: not looked at.
      kernels: kernel name -> variable or array.
      seed: equal seeds draw equal scores.

    Returns:
      Kernel name -> float64 array of the kernel's shape.
    """
    rng = np.random.default_rng([seed, 23])
    return {name: rng.random(np.shape(kernel)) for name, kernel in kernels.items()}


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float64 else values.astype(np.float32)
