"""Spec: one frozen value that says all of an experiment. Flags and tickets are made from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from lth_tf.errors import UserError
from lth_tf.registry import nearest


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """A field whose metadata are what a flag needs.

    `registry` names the registry whose keys are the choices, `choices` lists them;
    `low` and `high` bound a number (`low` included unless `open`, `high` excluded);
    `grows` marks what can be raised later without making another experiment of it.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class Spec:
    """One experiment. Equal specs and equal seeds give equal tickets on the same machine.

    Densities and fractions lie in 0 to 1; steps count optimizer steps.

    Raises:
      UserError: a value out of range, an unknown choice, or two fields that
        contradict each other.
    """

    model: str = _field("lenet_300_100", "Network architecture.", registry="models")
    dataset: str = _field("mnist", "Data set.", registry="datasets")
    normalization: str = _field(
        "standard",
        "How pixels are scaled: by the data set's mean and standard deviation per channel, to "
        "0..1, or to 0..1 and each image to L2 norm 1.",
        choices=("standard", "unit", "l2"),
    )
    validation_size: int = _field(
        5000, "Training examples held out to find the early-stop step.", low=1
    )
    init: str = _field("glorot_normal", "Initialisation of the kernels.", registry="inits")

    scope: str = _field("layerwise", "Which weights compete with each other.", registry="scopes")
    prune_fraction: float = _field(
        0.2, "Fraction of the surviving weights removed per level.", low=0.0, high=1.0
    )
    prune_fraction_conv: float | None = _field(
        None, "The same for convolutions (default: prune_fraction).", low=0.0, high=1.0
    )
    prune_fraction_output: float | None = _field(
        None, "The same for the output layer (default: prune_fraction).", low=0.0, high=1.0
    )
    levels: int = _field(20, "Number of prunings.", low=0, high=1000)
    target_density: float | None = _field(
        None,
        "Density of the last level; replaces --levels: the last level is trimmed to hit it.",
        low=0.0,
        high=1.0,
        open=True,
    )
    one_shot: bool = _field(False, "Go to the last level's density in a single pruning.")
    rewind_step: float = _field(
        0.0,
        "Step whose weights a ticket starts from: a whole number of steps, or a fraction of "
        "train_steps below 1.",
        low=0.0,
    )
    retrain: str = _field(
        "rewind",
        "What follows a pruning: rewind weights and schedule to rewind_step; keep the weights and "
        "rewind the schedule (lr_rewind); keep both and go on at the last learning rate "
        "(finetune).",
        choices=("rewind", "lr_rewind", "finetune"),
    )
    retrain_steps: int | None = _field(
        None,
        "Steps of training after each pruning (default: train_steps less rewind_step). With "
        "--retrain=rewind it is another way to say rewind_step = train_steps - retrain_steps.",
        low=1,
    )

    optimizer: str = _field("adam", "Optimizer.", registry="optimizers")
    learning_rate: float = _field(1.2e-3, "Peak learning rate.", low=0.0, open=True)
    lr_schedule: str = _field("constant", "Shape of the learning rate.", registry="lr_schedules")
    lr_drops: tuple[int, ...] = _field(
        (), "Steps at which --lr_schedule=steps multiplies the rate by lr_drop_factor."
    )
    lr_drop_factor: float = _field(0.1, "Factor at each of lr_drops.", low=0.0, open=True)
    warmup_steps: int = _field(0, "Steps of linear warm-up.", low=0)
    momentum: float = _field(0.9, "For momentum and nesterov.", low=0.0, high=1.0)
    weight_decay: float = _field(
        0.0,
        "wd * w added to the gradient of every trainable weight (L2 as the papers mean it); "
        "for adamw decoupled.",
        low=0.0,
    )
    batch_size: int = _field(60, "Global batch size.", low=1)
    train_steps: int = _field(50_000, "Steps of a whole training.", low=1)
    eval_every: int = _field(100, "Steps between evaluations on validation data.", low=1)
    precision: str = _field(
        "float32",
        "Arithmetic; variables stay float32 in the mixed ones.",
        choices=("float32", "float64", "mixed_bfloat16", "mixed_float16"),
    )
    compile: str = _field(
        "auto",
        "XLA: auto compiles on GPUs, and on CPUs networks without convolutions (those would be "
        "slower); not under --distribute=mirrored on CPUs, where TensorFlow cannot.",
        choices=("auto", "on", "off"),
    )
    distribute: str = _field("none", "tf.distribute strategy.", choices=("none", "mirrored"))
    devices: int | None = _field(
        None, "Number of devices for --distribute=mirrored (default: all).", low=1
    )

    seed: int = _field(0, "Replicate r uses seed + r for weights and data order.", low=0)
    replicates: int = _field(1, "Independent repetitions.", low=1, grows=True)
    controls: tuple[str, ...] = _field(
        (), "Branches run off the tickets.", registry="branches", grows=True
    )
    control_levels: tuple[int, ...] = _field(
        (), "Levels at which the controls run (default: every level from 1 on).", grows=True
    )
    histograms: bool = _field(
        False, "Also write weight histograms for TensorBoard at every evaluation.", grows=True
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field, value)
            if "float" in str(field.type) and value is not None:
                # 1 == 1.0, but they are different JSON: digests and tickets would differ.
                object.__setattr__(self, field.name, float(value))
        if self.rewind_step >= 1 and self.rewind_step != int(self.rewind_step):
            raise UserError(
                f"rewind_step {self.rewind_step} is neither a whole step nor a fraction below 1"
            )
        if self.rewind_step and not self.rewind_at:
            raise UserError(
                f"rewind_step {self.rewind_step:g} of train_steps {self.train_steps} is less than "
                "one step; give 0 or a larger fraction"
            )
        if self.rewind_at >= self.train_steps:
            raise UserError(
                f"rewind_step {self.rewind_step:g} lies behind the end of training; it must be "
                f"below train_steps ({self.train_steps})"
            )
        if self.retrain == "rewind" and self.retrain_steps is not None:
            if self.rewind_step:
                raise UserError(
                    "rewind_step and retrain_steps say the same thing for --retrain=rewind "
                    "(rewind_step = train_steps - retrain_steps); give one of them"
                )
            if self.retrain_steps > self.train_steps:
                raise UserError(
                    f"retrain_steps {self.retrain_steps} exceeds train_steps {self.train_steps}: "
                    "there is no earlier step to rewind to"
                )
        if self.retrain == "lr_rewind" and (self.retrain_steps or 1) > self.train_steps:
            raise UserError(
                f"retrain_steps {self.retrain_steps} exceeds train_steps {self.train_steps}: the "
                "learning rate cannot be rewound to before its beginning"
            )
        if self.retrain != "rewind" and self.rewind_step:
            raise UserError(
                f"rewind_step {self.rewind_step:g} has no meaning for --retrain={self.retrain}, "
                "which keeps the trained weights; use retrain_steps"
            )
        if self.lr_schedule == "steps" and not self.lr_drops:
            raise UserError("lr_schedule 'steps' needs lr_drops, e.g. --lr_drops=20000,25000")
        if self.lr_schedule != "steps" and self.lr_drops:
            raise UserError(
                f"lr_drops {list(self.lr_drops)} have no meaning for lr_schedule "
                f"{self.lr_schedule!r}; use --lr_schedule=steps"
            )
        if self.control_levels and not self.controls:
            raise UserError("control_levels are given but no controls, e.g. --controls=reinit")
        if self.devices and self.distribute == "none":
            raise UserError("devices needs --distribute=mirrored")

    @property
    def rewind_at(self) -> int:
        """The step whose weights tickets start from, as a whole number."""
        if self.retrain == "rewind" and self.retrain_steps is not None:
            return self.train_steps - self.retrain_steps
        if 0 < self.rewind_step < 1:
            return round(self.rewind_step * self.train_steps)
        return int(self.rewind_step)

    @property
    def retrain_span(self) -> tuple[int, int]:
        """First step and end (excluded) of the training that follows a pruning."""
        steps = self.retrain_steps or self.train_steps
        if self.retrain == "rewind":
            return self.rewind_at, self.train_steps
        if self.retrain == "lr_rewind":
            return self.train_steps - steps, self.train_steps
        return self.train_steps, self.train_steps + steps

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        """Returns the Spec that `as_dict` wrote; raises UserError for unknown fields."""
        if not isinstance(values, dict):
            raise UserError(f"a spec is a JSON object, not {type(values).__name__}")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise UserError(f"a spec has no field {name!r}.{nearest(name, names)}")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide what a single training computes."""
        grows = {f.name for f in dataclasses.fields(self) if f.metadata.get("grows")}
        if not self.one_shot or self.target_density is not None:
            grows.add("levels")  # more of them leave the first ones as they are; or a target rules
        return {name: value for name, value in self.as_dict().items() if name not in grows}

    def digest(self) -> str:
        """Returns a short name for the identity: 8 hexadecimal digits of its sha256."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError when a value is not of the field's type, choices or range."""
    if value is None and "None" in str(field.type):
        return
    wanted = str(field.type).removesuffix(" | None")
    fits = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "tuple[int, ...]": isinstance(value, tuple) and all(type(v) is int for v in value),
        "tuple[str, ...]": isinstance(value, tuple) and all(type(v) is str for v in value),
    }[wanted]
    if not fits:
        raise UserError(f"{field.name} must be {wanted}, not {value!r}")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(
            f"unknown {field.name} {value!r}; there are: {', '.join(choices)}."
            f"{nearest(value, list(choices))}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name} must be a finite number, not {value}")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    for v in value if isinstance(value, tuple) else (value,):
        too_low = low is not None and (v <= low if field.metadata.get("open") else v < low)
        if too_low or (high is not None and v >= high):
            above = f"above {low}" if field.metadata.get("open") else f"at least {low}"
            below = f" and below {high}" if high is not None else ""
            raise UserError(f"{field.name} {v} is out of range; it must be {above}{below}")
    if wanted == "tuple[int, ...]" and any(v < 0 for v in value):
        raise UserError(f"{field.name} {list(value)} must not contain negative numbers")
