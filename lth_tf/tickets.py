"""Tickets: a mask and the weights to start from, in one file that says where it came from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import masks, pruning, storage
from lth_tf.errors import UserError
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


def load_ticket(path: str | os.PathLike) -> Ticket:
    """Returns the ticket that `Ticket.save` wrote.

    Raises:
      UserError: the file is absent, truncated, altered or no ticket.
    """
    arrays, metadata = storage.read_tensors(Path(path))
    if metadata.get("format") != "ticket":
        raise UserError(
            f"{os.fspath(path)!r} holds {metadata.get('format', 'something else')!r}, not a ticket"
        )
    weights = {name: arrays[f"weights/{name}"] for name in metadata["weights"]}
    mask = {
        name: masks.unpack(arrays[f"mask/{name}"], weights[name].shape)
        for name in metadata["kernels"]
    }
    return Ticket(
        mask,
        weights,
        metadata["level"],
        metadata["rewind_step"],
        metadata["origin"],
        Spec.from_dict(metadata["spec"]),
    )


def save_trained(path: Path, weights: Mapping[str, np.ndarray], ticket: Ticket) -> None:
    """Writes the weights that a ticket's training ended with.

    Args:
      path: the file.
      weights: path in the model -> array.
      ticket: whose they are.

    Raises:
      UserError: the file cannot be written.
    """
    storage.write_tensors(
        path,
        weights,
        {
            "format": "trained",
            "weights": list(weights),
            "level": ticket.level,
            "origin": dict(ticket.origin),
        },
    )


def load_trained(path: Path) -> dict[str, np.ndarray]:
    """Returns the weights that `save_trained` wrote; raises UserError as `load_ticket` does."""
    arrays, metadata = storage.read_tensors(path)
    if metadata.get("format") != "trained":
        raise UserError(f"{os.fspath(path)!r} does not hold trained weights")
    return {name: arrays[name] for name in metadata["weights"]}


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide what a ticket is."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
