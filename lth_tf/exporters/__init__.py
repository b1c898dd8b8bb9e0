"""Exporters: a ticket's network as files for others. (served network, folder) -> what they hold.

What leaves here was read back and compared, and its folder exists only when it is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import datasets, edge, masks, pruning, storage
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, scaling
from lth_tf.errors import UserError
from lth_tf.exporters.saved_model import saved_model
from lth_tf.exporters.served import Reread, Served, dtype_of
from lth_tf.exporters.workdir import find, read, sizes, weighed
from lth_tf.masks import Mask
from lth_tf.models import plain_model
from lth_tf.registry import Registry
from lth_tf.tickets import Ticket

Exporter = Callable[[Served, Path], Reread]
EXPORTERS: Registry[Exporter] = Registry("export format")
EXPORTERS.register("saved_model")(saved_model)

TOLERANCE = 1e-4  # of the largest logit; the weights are compared bit for bit


def export(
    ticket: Ticket,
    trained: Mapping[str, np.ndarray] | None,
    dataset: Dataset,
    target: str | os.PathLike,
    format: str = "saved_model",
) -> None:
    """Writes a ticket's plain network, without masks and optimizer, as a folder.

    The network is built anew from the ticket's spec: float64 stays float64, the mixed
    precisions become float32, which their variables are. It is written beside `target`,
    read back, compared and then renamed. `ticket.json` in the folder says what it is:
    level, density of each kernel, origin and spec, without times and paths.

    Args:
      ticket: whose mask and spec to use.
      trained: path -> array, the weights that its training ended with; None exports the
        weights it starts from.
      dataset: whose mean and std the function for raw images is to use.
      target: the folder to make.
      format: a key of EXPORTERS.

    Raises:
      UserError: an unknown format, a target that exists or cannot be written, or weights
        of another network.
      InvariantError: a weight is not 0.0 where the mask is 0, or what was written is not
        the same network.
    """
    exporter, folder = EXPORTERS[format], edge.folder(target)
    if not isinstance(ticket, Ticket):
        raise UserError(
            f"ticket must be a lth_tf.Ticket, as load_ticket returns, not {type(ticket).__name__}"
        )
    datasets.require(dataset)
    if os.path.lexists(folder):
        raise UserError(f"{str(folder)!r} exists; delete it or choose another name (--output)")
    weights = ticket.weights if trained is None else dict(trained)
    model = network(ticket, weights)
    dataclasses.replace(ticket, weights=weights).verify()
    scale = functools.partial(
        scaling.scale, kind=ticket.spec.normalization, mean=dataset.mean, std=dataset.std
    )
    with _renamed(folder) as unfinished:
        reread = exporter(Served(model, scale), unfinished)
        check(reread, model, scale, ticket.mask)
        about = describe(ticket, weights, "ticket" if trained is None else "trained")
        (unfinished / "ticket.json").write_text(about)


def network(ticket: Ticket, weights: Mapping[str, np.ndarray]) -> Any:
    """Returns the ticket's plain Keras model with mask x weights, float64 or float32.

    Raises:
      UserError: the weights are those of another network.
    """
    spec, origin = ticket.spec, ticket.origin
    model = plain_model(spec, tuple(origin["input_shape"]), origin["classes"], origin["seed"])
    pruning.assign(model, weights, ticket.mask)
    return model


def describe(ticket: Ticket, weights: Mapping[str, np.ndarray], what: str) -> str:
    """Returns JSON that says what was exported; equal exports give equal text.

    Args:
      ticket: level, density, origin and spec.
      weights: path -> array, those that were exported.
      what: 'ticket' or 'trained'.
    """
    about = {
        "weights": what,
        "weights_sha256": storage.digest(weights),
        "level": ticket.level,
        "density": ticket.density,
        "densities": {name: masks.density({name: m}) for name, m in ticket.mask.items()},
        "rewind_step": ticket.rewind_step,
        "origin": dict(ticket.origin),
        "spec": ticket.spec.as_dict(),
    }
    return json.dumps(about, indent=1, sort_keys=True) + "\n"


def check(reread: Reread, model: Any, scale: Callable[..., Any], mask: Mask) -> None:
    """Compares what was read back with the model in memory.

    Args:
      reread: what an exporter returned.
      model: the plain model that was to be exported.
      scale: see `Served`.
      mask: kernel name -> 0/1 array.

    Raises:
      InvariantError: a weight is missing or has other bits, an entry that the mask prunes
        is anything but +0.0, or a function gives other logits.
    """
    for name, variable in pruning.weights(model).items():
        expected, found = variable.numpy(), reread.weights.get(name)
        if found is None or found.dtype != expected.dtype or found.shape != expected.shape:
            raise pruning.InvariantError(f"the exported network lacks {name!r} or has another")
        # As bytes, for which -0.0 is not 0.0 and NaN is NaN.
        if name in mask and found[mask[name] == 0].view(np.uint8).any():
            raise pruning.InvariantError(f"exported {name!r} is not 0.0 everywhere the mask is 0")
        if found.tobytes() != expected.tobytes():
            raise pruning.InvariantError(f"exported {name!r} is not what was to be written")
    dtype, rng = dtype_of(model), np.random.default_rng(0)
    with tf.device("cpu:0"):  # GPUs may round to TF32, each kernel in its own way
        for n in (1, 7):
            raw = rng.integers(0, 256, (n, *model.input_shape[1:]), np.uint8)
            normalised = scale(raw, dtype=tf.float32).numpy()
            _compare(reread.logits(normalised), model(tf.cast(normalised, dtype), training=False))
            _compare(reread.logits_uint8(raw), model(scale(raw, dtype=dtype), training=False))


def _compare(found: np.ndarray, expected: Any) -> None:
    logits = expected.numpy()
    allowed = TOLERANCE * max(1.0, float(np.abs(logits).max()))
    # Not >, which is false for NaN.
    if found.dtype != np.float32 or not np.abs(found - logits).max() <= allowed:
        raise pruning.InvariantError("the exported network gives other logits than the model")


@contextlib.contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`; renames it at the end, removes it on any failure."""
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    with storage.explained(folder, "--output"):
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


__all__ = [
    "EXPORTERS", "Exporter", "Reread", "Served", "export", "find", "read", "sizes", "weighed",
]  # fmt: skip
