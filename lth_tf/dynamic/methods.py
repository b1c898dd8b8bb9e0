"""Methods: what is dropped and what is grown, how much of it, and how dense the network is.

A method is four choices in one line, none of which is code of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from lth_tf.errors import UserError
from lth_tf.registry import Registry


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to move a mask.

    Attributes:
      help: where it is from.
      grow: what new weights are ranked by: 'none' (there are none), 'random', 'gradient' (the
        magnitude of the loss's gradient at weights that are not there, too) or 'momentum' (that of
        its moving average over all steps).
      density: 'constant' or 'falling'.
      pooled: whether weights of all kernels compete when density falls.
      initial: what density it begins with where that is falling and nobody says another.
    """

    help: str
    grow: str = "none"
    density: str = "constant"
    pooled: bool = False
    initial: float = 1.0

    @property
    def grows(self) -> bool:
        """Whether weights are replaced."""
        return self.grow != "none"

    @property
    def falls(self) -> bool:
        """Whether the density falls."""
        return self.density == "falling"

    @property
    def moves(self) -> bool:
        """Whether the mask moves."""
        return self.grows or self.falls

    @property
    def looks(self) -> bool:
        """Whether an update needs a gradient of its own."""
        return self.grow == "gradient"

    def has(self, option: str) -> bool:
        """Says whether an option, a field of Spec, means something to this method."""
        return {
            "update_every": self.moves, "update_until": self.moves, "update_from": self.falls,
            "initial_density": self.falls, "drop_fraction": self.grows,
            "fraction_schedule": self.grows, "grow_init": self.grows, "regrown": self.grows,
            "grow_batch": self.looks, "update_trains": self.looks,
        }[option]  # fmt: skip


OPTIONS = (
    "update_every", "update_until", "update_from", "initial_density", "drop_fraction",
    "fraction_schedule", "grow_init", "regrown", "grow_batch", "update_trains",
)  # fmt: skip

METHODS: Registry[Method] = Registry("method")
for _name, _method in {
    "static": Method("a random mask that stays"),
    "set": Method("Mocanu et al. 2018, grown at random", "random"),
    "rigl": Method("Evci et al. 2020, grown by gradient", "gradient"),
    "snfs": Method(
        "Dettmers and Zettlemoyer 2019, grown by the gradient's momentum; without redistribution "
        "between kernels",
        "momentum",
    ),
    "gmp": Method("Zhu and Gupta 2017, from dense to sparse by magnitude", density="falling"),
    "granet": Method(
        "Liu et al. 2021, from less to more sparse, with growth by gradient",
        "gradient", "falling", pooled=True, initial=0.5,
    ),
}.items():  # fmt: skip
    METHODS.register(_name)(_method)

# (progress t / T in 0..1, learning rate over that of the first update) -> share of the drop
# fraction that is replaced.
Fraction = Callable[[float, float], float]
FRACTIONS: Registry[Fraction] = Registry("fraction schedule")


@FRACTIONS.register("cosine")
def cosine(progress: float, rate: float) -> float:
    """(1 + cos(pi t / T)) / 2, of Evci et al. 2020, section 3."""
    return (1 + math.cos(math.pi * progress)) / 2


@FRACTIONS.register("constant")
def constant(progress: float, rate: float) -> float:
    """1: the same at every update, as in SET."""
    return 1.0


@FRACTIONS.register("linear")
def linear(progress: float, rate: float) -> float:
    """1 - t / T."""
    return 1 - progress


@FRACTIONS.register("inverse_power")
def inverse_power(progress: float, rate: float) -> float:
    """(1 - t / T)^3, of Evci et al. 2020, appendix G."""
    return (1 - progress) ** 3


@FRACTIONS.register("learning_rate")
def learning_rate(progress: float, rate: float) -> float:
    """The learning rate over that of the first update, as in the code of Evci et al. 2022."""
    return rate


# (density at the beginning, at the end, progress in 0..1) -> density.
DENSITIES: Registry[Callable[[float, float, float], float]] = Registry("density schedule")


@DENSITIES.register("constant")
def always(initial: float, final: float, progress: float) -> float:
    """The density at the end.

    Args:
      initial, progress: not looked at.
      final: it.
    """
    return final


@DENSITIES.register("falling")
def falling(initial: float, final: float, progress: float) -> float:
    """d_f + (d_i - d_f) (1 - t / T)^3, of Zhu and Gupta 2017, equation 1.

    Args:
      initial, final: d_i and d_f.
      progress: t / T, 0 to 1.
    """
    return final + (initial - final) * (1 - progress) ** 3


@dataclasses.dataclass(frozen=True)
class Course:
    """When a method updates a mask within a training, and by how much.

    Args:
      method: its name.
      every: steps between updates.
      until: the step from which on there are none; with a falling density that of the last one.
      since: the step of the first one with a falling density; else it is `every`, for a network
        that has learned nothing has nothing to drop.
      drop_fraction: of a kernel's weights, replaced at an update.
      schedule: a key of FRACTIONS.

    Raises:
      UserError: there would be no update.
    """

    method: str
    every: int = 100
    until: int = 0
    since: int = 0
    drop_fraction: float = 0.3
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        if METHODS[self.method].moves and self.next(0) is None:
            raise UserError(
                f"the mask would never be updated: every {self.every} steps from step {self.first} "
                f"on, until step {self.until}; update more often, or longer"
            )

    @property
    def first(self) -> int:
        """The step of the first update."""
        return self.since if METHODS[self.method].falls and self.since else self.every

    @property
    def last(self) -> int:
        """The step of the last update."""
        end = self.until if METHODS[self.method].falls else self.until - 1
        return self.first + (end - self.first) // self.every * self.every

    def due(self, step: int) -> bool:
        """Says whether the mask is updated at a step."""
        return self.next(step) == step

    def next(self, step: int) -> int | None:
        """Returns the first step from `step` on with an update, or None."""
        if not METHODS[self.method].moves:
            return None
        at = max(self.first, self.first + -(-(step - self.first) // self.every) * self.every)
        return at if at <= self.last else None

    @property
    def updates(self) -> int:
        """How many there are."""
        return (self.last - self.first) // self.every + 1 if METHODS[self.method].moves else 0

    def fraction(self, step: int, rate: float = 1.0) -> float:
        """Returns which share of the weights is replaced at a step.

        Args:
          step: of the update.
          rate: the learning rate over that of the first update.
        """
        if not METHODS[self.method].grows:
            return 0.0
        return self.drop_fraction * FRACTIONS[self.schedule](min(1, step / self.until), rate)

    def density(self, step: int, initial: float, final: float) -> float:
        """Returns the density after the update at a step.

        Args:
          step: of the update.
          initial, final: at the beginning, and at the end.
        """
        span = self.last - self.first
        progress = (step - self.first) / span if span else 1.0
        return DENSITIES[METHODS[self.method].density](initial, final, progress)
