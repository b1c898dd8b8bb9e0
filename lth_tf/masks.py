"""Masks and scores: dictionaries from kernel name to array, and what is counted on them.

A `Mask` maps a kernel name ('fc1/kernel') to a uint8 array of the kernel's shape,
1 where the weight is kept. `Scores` map the same names to float arrays of the same
shapes; everywhere in this package a HIGHER score means KEEP.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Mask = dict[str, np.ndarray]
Scores = dict[str, np.ndarray]


def ones(shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Returns the mask that keeps everything.

    >>> ones({"fc1/kernel": (2, 3)})["fc1/kernel"].sum()
    np.uint64(6)
    """
    return {name: np.ones(shape, np.uint8) for name, shape in shapes.items()}


def size(mask: Mapping[str, np.ndarray]) -> int:
    """Returns N, the number of prunable weights."""
    return sum(m.size for m in mask.values())


def kept(mask: Mask) -> int:
    """Returns the number of ones."""
    return sum(int(np.count_nonzero(m)) for m in mask.values())


def density(mask: Mask) -> float:
    """Returns the fraction of weights kept, 0 to 1, over all kernels together.

    >>> density({"a": np.array([1, 0], np.uint8), "b": np.array([1, 1], np.uint8)})
    0.75
    """
    return kept(mask) / size(mask)


def is_subset(inner: Mask, outer: Mask) -> bool:
    """Says whether every weight that `inner` keeps is kept by `outer` too.

    >>> is_subset({"a": np.array([1, 0])}, {"a": np.array([1, 1])})
    True
    """
    return inner.keys() == outer.keys() and all(
        not np.any((inner[name] != 0) & (outer[name] == 0)) for name in inner
    )


def overlap(a: Mask, b: Mask) -> float:
    """Returns the Jaccard index |a ∩ b| / |a ∪ b| of the kept weights, 0 to 1.

    >>> overlap({"k": np.array([1, 1, 0])}, {"k": np.array([0, 1, 1])})
    0.3333333333333333
    """
    both = sum(int(np.count_nonzero((a[n] != 0) & (b[n] != 0))) for n in a)
    either = sum(int(np.count_nonzero((a[n] != 0) | (b[n] != 0))) for n in a)
    return both / either if either else 1.0


def tied(
    scores: Mapping[str, np.ndarray],
    mask: Mask,
    within: Mask | None = None,
    *,
    pooled: bool = False,
) -> dict[str, tuple[int, int]]:
    """Returns where equal scores were divided by position: name -> (kept, pruned) of them.

    A cut falls among equal scores where the highest of those pruned is also one of those kept.

    Args:
      scores: kernel name -> array, higher = keep.
      mask: what was made of them.
      within: only weights that this mask keeps took part.
      pooled: whether all kernels competed in one ranking.

    Returns:
      Those kernels with such scores, and how many of them.

    >>> tied({"a": np.array([0.0, 0, 1]), "b": np.zeros(2)},
    ...      {"a": np.array([1, 0, 1]), "b": np.zeros(2)}, pooled=True)
    {'a': (1, 1), 'b': (0, 2)}
    """
    lost = {
        n: (mask[n] == 0) if within is None else (mask[n] == 0) & (within[n] != 0) for n in scores
    }
    tops = {n: s[lost[n]].max() for n, s in scores.items() if lost[n].any()}
    if pooled and tops:
        tops = dict.fromkeys(scores, max(tops.values()))
    found = {}
    for name, top in tops.items():
        equal = scores[name] == top
        found[name] = (
            int(np.count_nonzero(equal & (mask[name] != 0))),
            int(np.count_nonzero(equal & lost[name])),
        )
    if pooled and not any(kept for kept, _ in found.values()):
        return {}
    return {n: both for n, both in found.items() if any(both) and (pooled or both[0])}


def said_of_ties(found: Mapping[str, tuple[int, int]], size: int) -> str:
    """Returns a sentence on what `tied` found, '' where few weights were decided by position.

    Few are less than 10, or less than 1 % of those kept.

    Args:
      found: kernel name -> (kept, pruned).
      size: the number of weights that the mask keeps.
    """
    kept, pruned = (sum(both[i] for both in found.values()) for i in (0, 1))
    if min(kept, pruned) < max(10, size / 100):
        return ""
    names = [f"{name} ({k + p:,})" for name, (k, p) in found.items()]
    names = names if len(names) < 7 else [*names[:5], f"{len(names) - 5} more kernels"]
    return (
        f"the cut falls among {kept + pruned:,} equal scores: {kept:,} of them are kept and "
        f"{pruned:,} pruned by nothing but their position, in {', '.join(names)}"
    )


def shuffle(mask: Mask, rng: np.random.Generator) -> Mask:
    """Returns `mask` with each kernel's entries permuted within that kernel.

    Each kernel keeps its density; where the ones are is lost. The "random mask"
    control of Frankle and Carbin (2019), section 4 and appendix F.

    >>> m = shuffle({"k": np.array([[1, 1, 0, 0]], np.uint8)}, np.random.default_rng(0))
    >>> m["k"].shape, int(m["k"].sum())
    ((1, 4), 2)
    """
    return {name: rng.permutation(m.reshape(-1)).reshape(m.shape) for name, m in mask.items()}


def apply(mask: Mask, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns mask x weights, bit for bit: kept weights unchanged, pruned ones +0.0.

    Weights without a mask (biases, BatchNorm) pass through. A product would leave
    -0.0 and NaN where the mask is zero; a selection does not.

    >>> w = apply({"k": np.array([1, 0])}, {"k": np.array([2.0, -3.0]), "b": np.array([5.0])})
    >>> w["k"], w["b"]
    (array([2., 0.]), array([5.]))
    """
    return {
        name: np.where(mask[name] != 0, w, np.zeros((), w.dtype)) if name in mask else w
        for name, w in weights.items()
    }


def pack(m: np.ndarray) -> np.ndarray:
    """Returns the array's entries as bits: uint8[ceil(size / 8)], row-major, big-endian.

    >>> pack(np.array([1, 0, 0, 0, 0, 0, 0, 1, 1]))
    array([129, 128], dtype=uint8)
    """
    return np.packbits(np.asarray(m, bool).reshape(-1))


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the uint8 array of `shape` that `pack` made `bits` from.

    Raises:
      ValueError: the bits are too few or too many for the shape.

    >>> unpack(np.array([160], np.uint8), (3,))
    array([1, 0, 1], dtype=uint8)
    """
    count = int(np.prod(shape, dtype=np.int64))
    if bits.shape != ((count + 7) // 8,):
        raise ValueError(f"{bits.size} bytes cannot hold a mask of shape {shape}")
    return np.unpackbits(bits, count=count).reshape(shape)
