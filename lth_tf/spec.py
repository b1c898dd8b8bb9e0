"""Spec: one frozen value that says all of an experiment. Flags and tickets are made from it.

Longer than other files, for half of it is the list of its fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from lth_tf.errors import UserError
from lth_tf.recipes import RECIPES
from lth_tf.registry import nearest


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """A field; its metadata say all that others need to know of it.

    For its flag: `registry` names the registry whose keys are the choices, `choices` lists them;
    `low` and `high` bound a number (`low` included unless `open`, `high` excluded);
    `flag=False` keeps it off the command line; `scorer` is the only scorer that it means
    something to.

    For trunks, comparisons and resuming: `role` is what it decides: 'training' (the default: what
    a dense training computes), 'masks' (which masks there are, or what is trained under them),
    'course' (only how a run is watched and kept going). `grows` marks what can be raised later
    without making another experiment of it; `extent`, how far or in what strides pruning goes,
    which makes no other method of it. `later` marks what came after the first release: at its
    default it is left out of dictionaries, so that what was written before stays equal.

    Which recipes have a field, they say themselves (`Recipe.fields`); such a field decides
    about masks.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class Spec:
    """One experiment. Equal specs and seeds give equal tickets on one machine with equal threads.

    Densities and fractions lie in 0 to 1; steps count optimizer steps.

    Raises:
      UserError: a value out of range, an unknown choice, or two fields that
        contradict each other.
    """

    recipe: str = _field(
        "imp",
        "Where masks come from.",
        registry="recipes",
        role="masks",
        flag=False,
    )
    model: str = _field("lenet_300_100", "Network architecture.", registry="models")
    width: float = _field(
        1.0, "Factor on the channels of a resnet or vgg.", low=0.0, open=True
    )
    shortcut: str = _field(
        "projection",
        "How a resnet for small images joins blocks of different size: by a 1x1 convolution, or "
        "by subsampling and zero padding (identity).",
        choices=("projection", "identity"),
    )
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
    augmentation: str = _field(
        "none",
        "Random changes to training images: mirror half of them and shift by up to 4 pixels "
        "(flip_crop), or crop a random part and scale it to full size, then mirror "
        "(resized_crop).",
        choices=("none", "flip_crop", "resized_crop"),
    )
    init: str = _field("glorot_normal", "Initialisation of the kernels.", registry="inits")
    output_std: float | None = _field(
        None,
        "Draw the output layer's kernel from N(0, this^2) instead, whatever --init says.",
        low=0.0,
        open=True,
        later=True,
    )

    scope: str = _field(
        "layerwise", "Which weights compete with each other.", registry="scopes", role="masks"
    )
    protect: tuple[str, ...] = _field(
        (), "Kernels that are never pruned: names, or patterns such as *shortcut*.", role="masks"
    )
    density: tuple[float, ...] = _field(
        (0.05,),
        "Fractions of the weights to keep; each gives a ticket of its own.",
        low=0.0,
        high=1.0,
        open=True,
        extent=True,
    )
    scorer: str = _field(
        "grasp", "How weights are ranked.", registry="scorers"
    )
    scorer_options: tuple[tuple[str, Any], ...] = _field(
        (), "Options of the scorer that have no field here: (name, value), sorted.",
        flag=False, later=True,
    )
    rounds: int | None = _field(
        None,
        "Score and prune in so many rounds (default: 100 for synflow, 1 for the others).",
        low=1
    )
    round_schedule: str = _field(
        "exponential",
        "Density after round r of n: d^(r/n) (exponential) or 1 - (1 - d) r/n (linear).",
        choices=("exponential", "linear")
    )
    samples_per_class: int = _field(
        10, "Training examples of each class that snip and grasp score on.", low=1
    )
    score_batch_size: int = _field(
        100,
        "Most examples in the scorer's memory at once; with score_batch_norm=train also those "
        "that statistics are taken over.",
        low=1
    )
    score_batch_norm: str = _field(
        "auto",
        "Whether batch normalisation uses the batch's statistics (train) or the moving ones "
        "(eval) while scoring (auto: train for grasp, eval for snip).",
        choices=("auto", "train", "eval")
    )
    warm_batch_norm: bool = _field(
        False,
        "Give batch normalisation the statistics of the examples that are scored on before "
        "moving ones are used for scoring: a network as initialised has none.",
        later=True,
    )
    score_loss: str = _field(
        "cross_entropy", "Loss that snip and grasp score with.", registry="losses"
    )
    score_augmentation: bool = _field(
        False,
        "Score on images changed by --augmentation, as published GraSP does. flip_crop changes "
        "the pixels before they are scaled, so that what it puts around them is black.",
        later=True,
    )
    temperature: float = _field(
        200.0, "Divides the logits for grasp.", low=0.0, open=True,
        scorer="grasp",
    )
    grasp_variant: str = _field(
        "paper",
        "paper: w x Hg; official: what the published code computes; absolute: |w x Hg|.",
        choices=("paper", "official", "absolute"),
        scorer="grasp",
    )
    snip_variant: str = _field(
        "paper",
        "paper: |w x g|; official: the same on weights drawn anew for scoring, as in the "
        "published code.",
        choices=("paper", "official"),
        scorer="snip",
    )
    min_per_layer: int = _field(
        0, "Weights that every kernel keeps, whatever their scores.", low=0
    )
    dense: bool = _field(False, "Train the dense network, too.", grows=True, extent=True)
    prune_fraction: float = _field(
        0.2,
        "Fraction of the surviving weights removed per level.",
        low=0.0,
        high=1.0,
        extent=True,
    )
    prune_fraction_conv: float | None = _field(
        None,
        "The same for convolutions (default: prune_fraction).",
        low=0.0,
        high=1.0,
        extent=True,
    )
    prune_fraction_output: float | None = _field(
        None,
        "The same for the output layer (default: prune_fraction).",
        low=0.0,
        high=1.0,
        extent=True,
    )
    levels: int = _field(20, "Number of prunings.", low=0, high=1000, extent=True)
    target_density: float | None = _field(
        None,
        "Density of the last level; replaces --levels: the last level is trimmed to hit it.",
        low=0.0,
        high=1.0,
        open=True,
        extent=True,
    )
    one_shot: bool = _field(
        False, "Go to the last level's density in a single pruning."
    )
    rewind_step: float = _field(
        0.0,
        "Step whose weights a ticket starts from: a whole number of steps, or a fraction of "
        "train_steps below 1.",
        low=0.0
    )
    retrain: str = _field(
        "rewind",
        "What follows a pruning: rewind weights and schedule to rewind_step; keep the weights and "
        "rewind the schedule (lr_rewind); keep both and go on at the last learning rate "
        "(finetune).",
        choices=("rewind", "lr_rewind", "finetune")
    )
    retrain_steps: int | None = _field(
        None,
        "Steps of training after each pruning (default: train_steps less rewind_step). With "
        "--retrain=rewind it is another way to say rewind_step = train_steps - retrain_steps.",
        low=1
    )

    sparse_init: str = _field(
        "none",
        "Scale the start weights of a ticket up, once its mask is chosen, for the inputs that are "
        "gone: of each unit by its kept inputs (fan_in) or of each weight by kept inputs and "
        "outputs (fan_avg), or of each kernel by its density (layer).",
        choices=("none", "fan_in", "fan_avg", "layer"), later=True,
    )
    method: str = _field(
        "rigl", "How the mask moves while the network is trained.", registry="methods", later=True
    )
    update_every: int = _field(100, "Steps between updates of the mask.", low=1, later=True)
    update_until: float = _field(
        0.78125,
        "Step from which on the mask stays (with a falling density: of its last update), or a "
        "fraction of train_steps below 1; the default is the paper's 25,000 of 32,000.",
        low=0.0, open=True, later=True,
    )
    update_from: int = _field(
        0, "Step of the first update where the density falls (default: update_every).", low=0,
        later=True,
    )
    initial_density: float | None = _field(
        None, "Density to begin with where it falls (default: 1 for gmp, 0.5 for granet).",
        low=0.0, open=True, later=True,
    )
    drop_fraction: float = _field(
        0.3, "Fraction of a kernel's weights that the first update replaces.", low=0.0, high=1.0,
        open=True, later=True,
    )
    fraction_schedule: str = _field(
        "cosine", "How that fraction falls until update_until.", registry="fractions", later=True
    )
    grow_init: str = _field(
        "zeros", "What new weights start at: 0, or a draw of the initialisation.",
        choices=("zeros", "random"), later=True,
    )
    regrown: str = _field(
        "keep",
        "Whether a weight that an update drops and grows again keeps its value and slots, as in "
        "the published code, or starts as a new one.",
        choices=("keep", "new"), later=True,
    )
    grow_batch: str = _field(
        "train",
        "Whose gradient new weights are ranked by: of the training batch at the update's step, or "
        "of a batch of the validation part.",
        choices=("train", "held_out"), later=True,
    )
    update_trains: bool = _field(
        False,
        "Whether the step of an update by gradient also trains the weights, before it. By the "
        "paper it does not.",
        later=True,
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
    adam_epsilon: float = _field(
        1e-7, "For adam and adamw: added to the root of the second moment.", low=0.0, open=True,
        later=True,
    )
    weight_decay: float = _field(
        0.0,
        "wd * w added to the gradient of every trainable weight (L2 as the papers mean it); "
        "for adamw decoupled.",
        low=0.0,
    )
    label_smoothing: float = _field(
        0.0, "Share of each label that is spread over all classes, in training only.", low=0.0,
        high=1.0, later=True,
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
        "XLA: auto compiles on GPUs, and on CPUs networks without convolutions and recurrent "
        "layers (those would be slower); nothing where several replicas share a batch.",
        choices=("auto", "on", "off"),
    )
    sync_batch_norm: bool = _field(
        False,
        "Batch normalisation takes its statistics over the global batch, not over each replica's "
        "share of it.",
    )
    distribute: str = _field(
        "auto",
        "Replicas, which share each batch: one (none), one on each device of this machine "
        "(mirrored), or of all machines of a cluster (multi_worker); auto takes all GPUs of this "
        "machine, or else none.",
        choices=("auto", "none", "mirrored", "multi_worker"),
    )
    devices: int | None = _field(
        None,
        "Devices to use on each machine (default: all GPUs; for mirrored without any all "
        "logical CPUs).",
        low=1,
    )
    workers: int | None = _field(
        None,
        "Workers that --distribute=multi_worker must find (default: those of the cluster).",
        low=1,
    )
    communication: str = _field(
        "auto",
        "What replicas add up of their gradients: every entry (plain), or those that the mask "
        "keeps, in one buffer (packed); auto packs between machines, below a density of 0.5.",
        choices=("auto", "plain", "packed"),
    )
    worker_timeout: float = _field(
        120.0,
        "Seconds after which a worker that does not come or does not answer is given up.",
        low=1.0,
        role="course",
    )
    checkpoint_every: int = _field(
        5000,
        "Steps between checkpoints inside a training; 0: only when the process is asked to end "
        "(SIGTERM).",
        low=0,
        role="course",
    )

    seed: int = _field(0, "Replicate r uses seed + r for weights and data order.", low=0)
    replicates: int = _field(1, "Independent repetitions.", low=1, grows=True)
    controls: tuple[str, ...] = _field(
        (), "Branches run off the tickets.", registry="branches", role="masks", grows=True
    )
    control_levels: tuple[int, ...] = _field(
        (),
        "Levels at which the controls run (default: every level from 1 on).",
        role="masks",
        grows=True,
    )
    histograms: bool = _field(
        False, "Also write weight histograms for TensorBoard at every evaluation.", role="course"
    )
    measure: tuple[str, ...] = _field(
        (),
        "What else each evaluation measures: gradient_flow, the squared norm of the loss's "
        "gradient over the kept weights, of the next training batch and of the first one; with "
        "masks that move also before and after each update.",
        choices=("gradient_flow",), role="course", later=True,
    )
    hessian_at: tuple[int, ...] = _field(
        (),
        "Steps at which the largest eigenvalues of the loss's Hessian over the kept weights are "
        "written to hessian.csv.",
        role="course", later=True,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field, value)
            # 1 == 1.0, but they are different JSON: digests and tickets would differ.
            if isinstance(value, tuple) and "float" in str(field.type):
                object.__setattr__(self, field.name, tuple(map(float, value)))
            elif "float" in str(field.type) and value is not None:
                object.__setattr__(self, field.name, float(value))
            has = owners(field.name)
            if has and self.recipe not in has and value != field.default:
                only = " and ".join(map(repr, has))
                raise UserError(
                    f"{field.name} has no meaning for the recipe {self.recipe!r}, only for {only}"
                )
        # In the order of their levels, whatever the order that they were given in.
        object.__setattr__(self, "density", tuple(sorted(self.density, reverse=True)))
        object.__setattr__(self, "scorer_options", tuple(sorted(self.scorer_options)))
        self._require_retraining()
        self._require_training()
        self._require_scoring()

    def _require_retraining(self) -> None:
        """Raises UserError unless steps and weights to go back to are said once, and exist."""
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

    def _require_training(self) -> None:
        """Raises UserError where schedule, controls or devices contradict each other."""
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
            raise UserError("devices has no meaning for --distribute=none; use mirrored")
        if self.workers and self.distribute != "multi_worker":
            raise UserError("workers needs --distribute=multi_worker")

    @classmethod
    def default_of(cls, name: str) -> Any:
        """Returns a field's default."""
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)

    def require_effect(self) -> None:
        """Raises UserError for steps that a training never comes to, or not as they were meant.

        Apart from the checks of every Spec, for files may hold such a one.
        """
        drops, end = list(self.lr_drops), self.train_steps
        if drops != sorted(set(drops)):
            raise UserError(f"lr_drops {drops} must rise, each step given once")
        if drops and drops[-1] >= end:
            late = [drop for drop in drops if drop >= end]
            raise UserError(
                f"lr_drops {late} lie behind the end of training; they must be below train_steps "
                f"({end}): give other drops, or more steps"
            )
        if late := [step for step in self.hessian_at if step > end]:
            raise UserError(
                f"hessian_at {late} lie behind the end of training; give at most train_steps "
                f"({end})"
            )
        if self.warmup_steps > end:
            raise UserError(
                f"warmup_steps {self.warmup_steps} lie behind the end of training, so that the "
                f"learning rate would never be reached; give at most train_steps ({end})"
            )

    def _require_scoring(self) -> None:
        """Raises UserError for options of another scorer, and for densities given twice."""
        for field in dataclasses.fields(self):
            scorer, value = field.metadata.get("scorer", self.scorer), getattr(self, field.name)
            if scorer != self.scorer and value != field.default:
                shown = f"{value:g}" if isinstance(value, float) else repr(value)
                raise UserError(f"{field.name} {shown} needs --scorer={scorer}")
        if self.score_augmentation and self.augmentation == "none":
            raise UserError("score_augmentation needs --augmentation=flip_crop or resized_crop")
        if not self.density or len(set(self.density)) < len(self.density):
            raise UserError(f"density {list(self.density)} must name different densities")

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
        """Returns the fields as JSON-ready values; later ones only where they say something."""
        values = {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
            if not (field.metadata.get("later") and value == field.default)
        }
        if options := values.pop("scorer_options", None):
            values["scorer_options"] = dict(options)
        return values

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
        if isinstance(options := fields.get("scorer_options"), dict):
            fields["scorer_options"] = tuple(options.items())
        return cls(**fields)

    def identity(self) -> dict[str, Any]:
        """Returns the fields that decide what a single training computes."""
        left_out = set(fields_of(role="course")) | set(fields_of(grows=True))
        left_out |= {
            name for name in self.as_dict() if self.recipe not in (owners(name) or [self.recipe])
        }
        if not self.one_shot or self.target_density is not None:
            left_out.add("levels")  # more of them leave the first as they are; or a target rules
        return {name: value for name, value in self.as_dict().items() if name not in left_out}

    def digest(self) -> str:
        """Returns a short name for the identity: 8 hexadecimal digits of its sha256."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]


def require_spec(given: Any) -> None:
    """Raises UserError for what is no `Spec`."""
    if not isinstance(given, Spec):
        raise UserError(f"spec must be a lth_tf.Spec, not {type(given).__name__}")


def owners(name: str) -> list[str]:
    """Returns the recipes that have a field, where not all have it; else an empty list."""
    return [recipe for recipe, record in RECIPES.items() if name in record.fields]


def fields_of(
    *recipes: str, role: str | None = None, grows: bool | None = None, extent: bool | None = None
) -> list[str]:
    """Returns the names of the fields whose metadata say so, see `_field`.

    Args:
      *recipes: fields that one of these recipes has; none: of any recipe.
      role: 'training', 'masks' or 'course'.
      grows, extent: whether they are such fields.
    """
    found = []
    for field in dataclasses.fields(Spec):
        has, about = owners(field.name), field.metadata
        own = about.get("role", "masks" if has else "training")
        if (
            (not recipes or not has or set(recipes) & set(has))
            and role in (None, own)
            and grows in (None, about.get("grows", False))
            and extent in (None, about.get("extent", False))
        ):
            found.append(field.name)
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns in words what two dicts of values say differently, '' where nothing.

    >>> differences({"seed": 1, "levels": 3}, {"seed": 2, "levels": 3})
    'seed is 1 there, 2 here'
    """
    later = {f.name: f.default for f in dataclasses.fields(Spec) if f.metadata.get("later")}
    there, here = ({**later, **values} for values in (there, here))
    return "; ".join(
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


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
        "tuple[float, ...]": isinstance(value, tuple)
        and all(type(v) in (int, float) for v in value),
        "tuple[str, ...]": isinstance(value, tuple) and all(type(v) is str for v in value),
        "tuple[tuple[str, Any], ...]": isinstance(value, tuple) and all(map(_is_option, value)),
    }[wanted]
    if not fits:
        raise UserError(f"{field.name} must be {wanted}, not {value!r}")
    if field.metadata.get("registry") == "recipes":
        RECIPES[value]
    choices = field.metadata.get("choices")
    each = value if isinstance(value, tuple) else (value,)
    if choices and (unknown := [v for v in each if v not in choices]):
        raise UserError(
            f"unknown {field.name} {unknown[0]!r}; there are: {', '.join(choices)}."
            f"{nearest(unknown[0], list(choices))}"
        )
    if wanted == "tuple[tuple[str, Any], ...]":
        each = tuple(option for _, option in value)
    if any(isinstance(v, float) and not math.isfinite(v) for v in each):
        raise UserError(f"{field.name} must be a finite number, not {value}")
    if "float" in wanted and any(isinstance(v, int) and abs(v) >= 2**63 for v in each):
        raise UserError(f"{field.name} is out of range; it must be below 2**63")
    largest = 63 if field.name == "seed" else 31  # bits: steps are counted in int32
    if too_large := [v for v in each if type(v) is int and v >= 2**largest and "int" in wanted]:
        raise UserError(f"{field.name} {too_large[0]} is too large; it must be below 2^{largest}")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    for v in each:
        too_low = low is not None and (v <= low if field.metadata.get("open") else v < low)
        if too_low or (high is not None and v >= high):
            above = f"above {low}" if field.metadata.get("open") else f"at least {low}"
            below = f" and below {high}" if high is not None else ""
            raise UserError(f"{field.name} {v} is out of range; it must be {above}{below}")
    if wanted == "tuple[int, ...]" and any(v < 0 for v in value):
        raise UserError(f"{field.name} {list(value)} must not contain negative numbers")


def _is_option(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is str
