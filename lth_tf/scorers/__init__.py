"""Scorers: which weights matter. (model, kernels, batches, *, options) -> scores, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lth_tf.masks import Scores
from lth_tf.registry import Registry

Scorer = Callable[..., Scores]
SCORERS: Registry[Scorer] = Registry("scorer")


@SCORERS.register("magnitude")
def magnitude(model: Any, kernels: Mapping[str, Any], batches: Any = None) -> Scores:
    """Returns |w|, in float32 or wider (Han et al. 2015; Frankle and Carbin 2019, section 1).

    Args:
      model: not looked at; a scorer's signature has it.
      kernels: kernel name -> variable or array.
      batches: not needed.

    Returns:
      Kernel name -> array of the kernel's shape.
    """
    return {name: _wide(np.abs(np.asarray(kernel))) for name, kernel in kernels.items()}


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float64 else values.astype(np.float32)
