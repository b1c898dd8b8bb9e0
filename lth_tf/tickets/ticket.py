"""What a ticket is, and how it is written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import masks, pruning, storage
from lth_tf.masks import Mask
from lth_tf.spec import Spec

LIBRARIES = ("lth_tf", "tensorflow", "tf_keras", "tensorflow-model-optimization", "numpy")


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse network to be trained.

    Attributes:
      mask: kernel name -> uint8 array, 1 = kept.
      weights: path -> array, every weight of the model, those of the mask's zeros 0.0.
      level: how many prunings made it; 0 is the dense network.
      rewind_step: the step of the schedule at which its training starts.
      origin: where it comes from, JSON-ready: seed, replicate, arm ('ticket' or the
        branch), input_shape, classes, and sha256 of the initial weights.
      spec: the experiment.
    """

    mask: Mask
    weights: dict[str, np.ndarray]
    level: int
    rewind_step: int
    origin: Mapping[str, Any]
    spec: Spec

    @property
    def density(self) -> float:
        """The fraction of prunable weights kept, 0 to 1."""
        return masks.density(self.mask)

    @functools.cached_property
    def digest(self) -> str:
        """A sha256 of what is trained: mask, weights, where it starts and whose it is."""
        arrays = {f"mask/{name}": m for name, m in self.mask.items()}
        arrays |= {f"weights/{name}": w for name, w in self.weights.items()}
        about = {**told(self.level, self.origin), "rewind_step": self.rewind_step}
        text = json.dumps(about, sort_keys=True)
        return hashlib.sha256(f"{storage.digest(arrays)} {text}".encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ticket as one .safetensors file; equal tickets give equal bytes.

        Raises:
          InvariantError: a weight is not 0.0 where the mask is 0.
          UserError: the file cannot be written.
        """
        self.verify()
        packed = {f"mask/{name}": masks.pack(m) for name, m in self.mask.items()}
        starts = {f"weights/{name}": w for name, w in self.weights.items()}
        storage.write_tensors(
            Path(path),
            packed | starts,
            {
                "format": "ticket",
                "kernels": list(self.mask),
                "weights": list(self.weights),
                "level": self.level,
                "rewind_step": self.rewind_step,
                "density": self.density,
                "origin": dict(self.origin),
                "spec": self.spec.as_dict(),
                "versions": versions(),
            },
        )

    def verify(self) -> None:
        """Raises InvariantError unless every weight is 0.0 where the mask is 0."""
        for name, m in self.mask.items():
            if np.any(self.weights[name][m == 0] != 0):
                raise pruning.InvariantError(f"the ticket's weights {name!r} exceed its mask")


def told(level: Any, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a file says of whose it is, in the words of `whose`, and its seed."""
    return {**{name: origin.get(name) for name in ("replicate", "arm", "seed")}, "level": level}


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide what a ticket is."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
