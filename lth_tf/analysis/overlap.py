"""How much masks have in common, beside what chance alone would give.

Two tickets of one network overlap by chance, the more so the denser they are, and the more so where
both keep many weights of the same units. What they have in common says something only beside that
(Grosse and Backes 2020, "How many winning tickets are there in one DNN?").
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Mask


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What two masks have in common in a kernel, or in all.

    Attributes:
      size: of the kernel.
      first, second: how many weights each keeps.
      both: how many both keep.
      densities: how many both would keep if each were drawn with as many weights of the kernel.
      units: the same, with as many of every input and every output on average.
    """

    size: int
    first: int
    second: int
    both: int
    densities: float
    units: float

    def jaccard(self, both: float | None = None) -> float:
        """Returns the share of what either keeps that both keep, 0 where neither keeps any.

        Args:
          both: how many both keep, if not as many as they do.
        """
        common = self.both if both is None else both
        either = self.first + self.second - common
        return common / either if either else 0.0

    @property
    def share(self) -> float:
        """The weights that both keep over those of the smaller one: R_p of Ma et al. 2021."""
        least = min(self.first, self.second)
        return self.both / least if least else 0.0


def overlaps(a: Mask, b: Mask) -> dict[str, Overlap]:
    """Returns kernel name -> what two masks have in common there, and under '' in all kernels.

    Args:
      a, b: kernel name -> 0/1 array.

    Raises:
      UserError: they are of other networks; names the kernels.
    """
    require_alike(a, b)
    found = {}
    for name, m in a.items():
        one, two = m != 0, b[name] != 0
        first, second = int(one.sum()), int(two.sum())
        found[name] = Overlap(
            m.size, first, second, int((one & two).sum()), first * second / m.size,
            float((units(one) * units(two)).sum()),
        )  # fmt: skip
    fields = [field.name for field in dataclasses.fields(Overlap)]
    return found | {"": Overlap(*(sum(getattr(o, n) for o in found.values()) for n in fields))}


def require_alike(a: Mask, b: Mask) -> None:
    """Raises UserError where two masks are of other networks, naming the kernels."""
    if strange := sorted(set(a) ^ set(b)):
        raise UserError(
            f"the tickets are of other networks: one of them alone has {', '.join(strange[:4])}"
            + (f" and {len(strange) - 4} more kernels" if len(strange) > 4 else "")
        )
    for name, m in a.items():
        if m.shape != b[name].shape:
            raise UserError(
                f"the tickets are of other networks: {name} is {list(m.shape)} and "
                f"{list(b[name].shape)}"
            )


def units(kept: np.ndarray) -> np.ndarray:
    """Returns how likely each weight is kept, if only in- and out-counts of units are known.

    Of all independent draws with these counts on average the one of largest entropy:
    p = x y / (1 + x y), x of an input and y of an output (Park and Newman 2004). Weights of a
    convolution's window share those of their channels.

    Args:
      kept: bool [..., inputs, outputs], or of any shape with one axis, all of which are inputs.

    Returns:
      float64 of that shape.
    """
    whole = kept.reshape(-1, *kept.shape[-2:]) if kept.ndim > 1 else kept.reshape(1, -1, 1)
    counts = whole.mean(0)
    p, wanted = np.zeros_like(counts), [counts.sum(1), counts.sum(0)]
    free = [np.ones(n, bool) for n in counts.shape]
    while _settle(p, wanted, free) or _settle(p.T, wanted[::-1], free[::-1]):
        pass  # what keeps all, or nothing, needs no factor, and leaves less to the others
    inside = np.ix_(*free)
    rows, columns = (w[f] for w, f in zip(wanted, free, strict=True))
    scale = max(1.0, float(np.sqrt(rows.sum())))
    x, y = rows / scale, columns / scale
    for _ in range(1000):
        before = x
        x = rows / _share(x, y)
        y = columns / _share(y, x)
        if np.allclose(x, before, rtol=1e-9, atol=0):
            break
    product = np.outer(x, y)
    p[inside] = product / (1 + product)
    return np.broadcast_to(p, whole.shape).reshape(kept.shape)


def _settle(p: np.ndarray, wanted: list[np.ndarray], free: list[np.ndarray]) -> bool:
    """Takes out rows that keep all of what is free, or nothing; says whether there were such."""
    most = int(free[1].sum())
    full = free[0] & (wanted[0] > most - 1e-9) & (most > 0)
    p[np.ix_(full, free[1])] = 1
    wanted[1][free[1]] -= int(full.sum())
    gone = full | (free[0] & (wanted[0] < 1e-9))
    free[0][gone] = False
    return bool(gone.any())


def _share(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.maximum((others[None] / (1 + np.outer(mine, others))).sum(1), 1e-300)
