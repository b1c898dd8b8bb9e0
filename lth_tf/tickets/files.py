"""Tickets and trained weights read again: whether they are whole, and the ones that are meant."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import edge, masks, storage
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.spec import Spec
from lth_tf.tickets.ticket import Ticket, told


def whose(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns which training a folder of a workdir is for: replicate, level and arm.

    Empty where the folder is none of a workdir's.

    >>> whose("runs/a/replicate_01/level_02/branch_reinit")
    {'replicate': 1, 'level': 2, 'arm': 'reinit'}
    """
    found = re.search(
        r"/replicate_(\d{2,6})/level_(\d{2,6})(?:/branch_([^/]+))?$",
        Path(folder).absolute().as_posix(),
    )
    if not found:
        return {}
    return {"replicate": int(found[1]), "level": int(found[2]), "arm": found[3] or "ticket"}


def load_ticket(path: str | os.PathLike) -> Ticket:
    """Returns the ticket that `Ticket.save` wrote.

    Raises:
      OtherFile: it lies in a workdir, where another one belongs.
      UserError: the file is absent, truncated, altered or no ticket.
    """
    path = edge.path(path, "a ticket")
    arrays, metadata = storage.read_tensors(path)
    if metadata.get("format") != "ticket":
        raise UserError(
            f"{os.fspath(path)!r} holds {metadata.get('format', 'something else')!r}, not a ticket"
        )
    with storage.reading(path, "is no whole ticket", _ANEW):
        ticket = _whole(arrays, metadata)
    if meant := whose(path.parent):
        with storage.reading(path, "is no whole ticket", _ANEW):
            storage.require(_ORIGIN.keys() <= ticket.origin.keys(), "its origin is not told")
        meant["seed"] = ticket.spec.seed + meant["replicate"]
        if ticket.level == 0:
            rewound = path.name == "rewind.safetensors"
            meant["rewind_step"] = ticket.spec.rewind_at if rewound else 0
        found = {**told(ticket.level, ticket.origin), "rewind_step": ticket.rewind_step}
        storage.require_meant(path, found, meant)
    return ticket


_ANEW = "delete it and run the same command again to make it anew"
# What an origin says, and whether a value out of a file is such a thing.
_ORIGIN: dict[str, Callable[[Any], bool]] = {
    "seed": storage.is_count,
    "replicate": storage.is_count,
    "arm": lambda value: isinstance(value, str),
    "input_shape": lambda value: isinstance(value, list) and all(map(storage.is_count, value)),
    "classes": storage.is_count,
}


def _whole(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Ticket:
    """The ticket of a file; raises ValueError where it contradicts itself."""
    kernels, names, origin = (metadata[name] for name in ("kernels", "weights", "origin"))
    stored = [*(f"mask/{name}" for name in kernels), *(f"weights/{name}" for name in names)]
    storage.require(sorted(stored) == sorted(arrays), "its arrays are others than it lists")
    storage.require(kernels, "it has no kernels")
    weights = {name: arrays[f"weights/{name}"] for name in names}
    mask = {name: masks.unpack(arrays[f"mask/{name}"], weights[name].shape) for name in kernels}
    for name, m in mask.items():
        storage.require(m.size, f"its kernel {name!r} has no weights")
        packed = np.array_equal(masks.pack(m), arrays[f"mask/{name}"])
        storage.require(packed, f"the mask of {name!r} has more entries than the kernel")
        held = not np.any(weights[name][m == 0] != 0)
        storage.require(held, f"its weights {name!r} exceed its mask")
    level, step = metadata["level"], metadata["rewind_step"]
    storage.require(storage.is_count(level) and storage.is_count(step), "no level, or no step")
    storage.require(isinstance(origin, dict), "its origin is no object")
    for name, fits in {**_ORIGIN, "order_seed": storage.is_count}.items():
        storage.require(name not in origin or fits(origin[name]), f"its origin has no {name}")
    ticket = Ticket(mask, weights, level, step, origin, Spec.from_dict(metadata["spec"]))
    storage.require(metadata["density"] == ticket.density, "its density is another")
    return ticket


def save_trained(
    path: Path, weights: Mapping[str, np.ndarray], ticket: Ticket, metrics: str | None = None,
    decision: Mapping[str, Any] | None = None, mask: Mask | None = None,
    flops: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Writes the weights that a ticket's training ended with.

    Args:
      path: the file.
      weights: path in the model -> array.
      ticket: whose they are.
      metrics: the digest of the training's metrics.csv, see `analysis.summary`.
      decision: how they were computed, where it was not by the graph of all weights.
      mask: kernel name -> 0/1 array, where it ended with another than the ticket's.
      flops: what the summary tells of them.

    Raises:
      UserError: the file cannot be written.
    """
    packed = {f"{_MOVED}{name}": masks.pack(m) for name, m in (mask or {}).items()}
    storage.write_tensors(
        path,
        {**weights, **packed},
        {
            "format": "trained",
            "weights": list(weights),
            "level": ticket.level,
            "origin": dict(ticket.origin),
            "ticket": ticket.digest,
            **({} if metrics is None else {"metrics": metrics}),
            **({"decision": dict(decision)} if decision else {}),
            **({"density": masks.density(mask)} if mask else {}),
            **({"flops": dict(flops)} if flops else {}),
        },
    )


def found_in(path: Path) -> list[Path]:
    """Returns the files of tickets that a path stands for: itself, or those of a workdir in order.

    Raises:
      UserError: there is none.
    """
    path = edge.folder(path)
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("replicate_*/level_*/**/ticket.safetensors"))
    if not found:
        raise UserError(f"{str(path)!r} is a folder without tickets; give a file or a workdir")
    return found


def load_trained(
    path: str | os.PathLike, ticket: Ticket | None = None, metrics: str | None = None
) -> dict[str, np.ndarray]:
    """Returns the weights that `save_trained` wrote.

    Args:
      path: the file.
      ticket: whose they must be (None: anybody's).
      metrics: the digest of the metrics.csv beside it (None: not looked at).

    Raises:
      OtherFile: they are another ticket's, or metrics.csv is another training's. Files of
        format 2 and before tell level, replicate and arm only.
      UserError: as `load_ticket`.
    """
    path = edge.path(path, "trained weights")
    arrays, metadata = storage.read_tensors(path)
    if metadata.get("format") != "trained":
        raise UserError(f"{os.fspath(path)!r} does not hold trained weights")
    with storage.reading(path, "holds no whole weights", _ANEW):
        names, origin = metadata["weights"], metadata["origin"]
        stored = [name for name in arrays if not name.startswith(_MOVED)]
        storage.require(sorted(names) == sorted(stored), "its arrays are others than it lists")
        found = told(metadata["level"], origin)
    storage.require_meant(path, found, whose(path.parent))
    if ticket is not None:
        storage.require_meant(path, found, told(ticket.level, ticket.origin))
        if metadata.get("ticket", ticket.digest) != ticket.digest:
            raise storage.OtherFile(
                f"{os.fspath(path)!r} holds the weights of another ticket than the one beside it; "
                "put the one back whose training it is, or delete this file and run the same "
                "command again"
            )
        with storage.reading(path, "does not fit its ticket", _ANEW):
            storage.require(set(names) == ticket.weights.keys(), "other weights")
            for name, w in ticket.weights.items():
                alike = (arrays[name].shape, arrays[name].dtype) == (w.shape, w.dtype)
                storage.require(alike, f"another shape or type of {name!r}")
            for name, m in _moved(arrays, ticket).items():
                storage.require(
                    not np.any(arrays[name][m == 0] != 0), f"{name!r} exceeds the mask"
                )
    require_metrics(path, metadata, metrics)
    return {name: arrays[name] for name in names}


_MOVED = "mask:"  # before the name of a kernel, in a file of trained weights


def _moved(arrays: Mapping[str, np.ndarray], ticket: Ticket) -> Mask:
    """The mask that a training ended with; raises ValueError where it is none of the ticket's."""
    if not any(name.startswith(_MOVED) for name in arrays):
        return dict(ticket.mask)
    stored = {f"{_MOVED}{name}" for name in ticket.mask}
    storage.require(stored <= arrays.keys(), "a mask of other kernels")
    return {n: masks.unpack(arrays[f"{_MOVED}{n}"], m.shape) for n, m in ticket.mask.items()}


def solution(path: str | os.PathLike, ticket: Ticket) -> Ticket:
    """Returns the network that a ticket's training ended with, as a ticket of its own.

    Its mask is the one that was in force at the end, its weights those of the file.

    Args:
      path: of the trained weights.
      ticket: whose they are.

    Raises:
      UserError: as `load_trained`.
    """
    weights = load_trained(path, ticket)
    arrays, _ = storage.read_tensors(edge.path(path, "trained weights"))
    return dataclasses.replace(ticket, mask=_moved(arrays, ticket), weights=weights)


def require_metrics(path: Path, metadata: Mapping[str, Any], metrics: str | None) -> None:
    """Raises OtherFile where the metrics.csv beside trained weights is not of their training.

    Args:
      path: the weights' file.
      metadata: what it says.
      metrics: the digest of metrics.csv (None: not looked at).
    """
    if metrics is not None and metadata.get("metrics", metrics) != metrics:
        raise storage.OtherFile(
            f"{str(path.with_name('metrics.csv'))!r} is not what the training of the weights "
            "beside it gave; put that one back, or delete this file and run the same command "
            "again: the training is done again"
        )
