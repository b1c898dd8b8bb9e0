"""spec: every field is checked, contradictions are refused, equal experiments have equal names."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from lth_tf.errors import UserError
from lth_tf.spec import Spec

FIELDS = {field.name: field for field in dataclasses.fields(Spec)}
# field -> what else it needs, values that are allowed, values that are out of range.
RANGES = {
    "normalization": ({}, ("standard", "unit", "l2"), ("none", "")),
    "validation_size": ({}, (1, 5000), (0, -1)),
    "prune_fraction": ({}, (0, 0.0, 0.2, 0.999), (1, 1.0, 20.0, -0.1)),
    "prune_fraction_conv": ({}, (None, 0, 0.1, 0.999), (1.0, -0.1)),
    "prune_fraction_output": ({}, (None, 0, 0.1, 0.999), (1.0, -0.1)),
    "levels": ({}, (0, 20, 999), (-1, 1000)),
    "target_density": ({}, (None, 1e-9, 0.5, 0.999), (0, 0.0, 1, 1.0, 20.0, -0.5)),
    "one_shot": ({}, (False, True), ()),
    "rewind_step": ({}, (0, 0.0, 0.02, 1, 1.0, 500.0, 49_999), (-1, -0.1, 1.5, 50_000, 1e9)),
    "retrain": ({}, ("rewind", "lr_rewind", "finetune"), ("rewinding", "")),
    "retrain_steps": ({}, (None, 1, 50_000), (0, -1, 50_001)),
    "learning_rate": ({}, (1e-9, 0.1, 2), (0, 0.0, -0.1)),
    "lr_drops": ({"lr_schedule": "steps"}, ((1,), (0, 5), (20_000, 25_000)), ((), (-1,), (5, -1))),
    "lr_drop_factor": ({}, (0.1, 1), (0, 0.0, -0.1)),
    "warmup_steps": ({}, (0, 10_000), (-1,)),
    "momentum": ({}, (0, 0.0, 0.9), (1, 1.0, -0.1)),
    "weight_decay": ({}, (0, 0.0, 1e-4, 2.0), (-1e-4,)),
    "batch_size": ({}, (1, 60), (0, -60)),
    "train_steps": ({}, (1, 50_000), (0, -1)),
    "eval_every": ({}, (1, 100), (0, -1)),
    "precision": ({}, ("float32", "float64", "mixed_bfloat16", "mixed_float16"), ("fp16",)),
    "compile": ({}, ("auto", "on", "off"), ("yes",)),
    "distribute": ({}, ("none", "mirrored"), ("tpu",)),
    "devices": ({"distribute": "mirrored"}, (None, 1, 8), (0, -1)),
    "seed": ({}, (0, 2**31), (-1,)),
    "replicates": ({}, (1, 5), (0, -1)),
    "control_levels": ({"controls": ("reinit",)}, ((), (1, 2), (0,)), ((-1,), (3, -1))),
    "histograms": ({}, (False, True), ()),
}
# Their choices are keys of registries, which a spec cannot look up; field -> another choice.
NAMES = {
    "model": "conv2",
    "dataset": "digits",
    "init": "glorot_uniform",
    "scope": "global",
    "optimizer": "sgd",
    "lr_schedule": "cosine",
    "controls": ("reinit",),
}
NOT_A = {
    "str": (3, 1.5, True, ("a",), b"adam"),
    "bool": (0, 1, "true", 1.0),
    "int": (1.5, 1.0, "1", True, (1,)),
    "float": ("0.5", True, (0.5,), 1j),
    "tuple[int, ...]": ([1], 1, (1.5,), ("1",), (True,), "12"),
    "tuple[str, ...]": (["reinit"], "reinit", (1,)),
}


def test_every_field_is_tested():
    assert sorted([*RANGES, *NAMES]) == sorted(FIELDS)


# Each field.


@pytest.mark.parametrize("name", RANGES)
def test_range(name):
    others, allowed, refused = RANGES[name]
    for value in allowed:
        found = getattr(Spec(**others, **{name: value}), name)
        assert found == value
    for value in refused:
        with pytest.raises(UserError, match=name):
            Spec(**others, **{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_type(name):
    kind = FIELDS[name].type
    for value in NOT_A[kind.removesuffix(" | None")]:
        with pytest.raises(UserError, match=f"{name} must be"):
            Spec(**{name: value})
    if not kind.endswith(" | None"):
        with pytest.raises(UserError, match=f"{name} must be .*, not None"):
            Spec(**{name: None})


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type.startswith("float")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name, bad):
    with pytest.raises(UserError, match=f"{name} must be a finite number"):
        Spec(**{name: bad})


def test_range_says_what_is_allowed():
    for name, value, text in (
        (
            "prune_fraction",
            20.0,
            "prune_fraction 20.0 is out of range; it must be at least 0.0 and",
        ),
        ("target_density", 0.0, "it must be above 0.0 and below 1.0"),
        ("batch_size", 0, "batch_size 0 is out of range; it must be at least 1$"),
    ):
        with pytest.raises(UserError, match=text):
            Spec(**{name: value})


def test_unknown_choice_names_the_nearest():
    with pytest.raises(UserError) as caught:
        Spec(retrain="fintune")
    assert str(caught.value) == (
        "unknown retrain 'fintune'; there are: rewind, lr_rewind, finetune. "
        "Did you mean 'finetune'?"
    )


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec().levels = 3


def test_help_is_written_for_every_field():
    for field in FIELDS.values():
        assert field.metadata["help"].endswith((".", ")")), field.name


# Contradictions.


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rewind_step": 100, "train_steps": 100}, "behind the end of training"),
        ({"rewind_step": 0.999, "train_steps": 100}, "behind the end of training"),
        ({"rewind_step": 1.5}, "neither a whole step nor a fraction"),
        ({"rewind_step": 10, "retrain_steps": 90, "train_steps": 100}, "give one of them"),
        ({"retrain_steps": 101, "train_steps": 100}, "no earlier step to rewind to"),
        ({"retrain": "lr_rewind", "retrain_steps": 101, "train_steps": 100}, "cannot be rewound"),
        ({"retrain": "lr_rewind", "rewind_step": 10}, "no meaning for --retrain=lr_rewind"),
        ({"retrain": "finetune", "rewind_step": 0.1}, "no meaning for --retrain=finetune"),
        ({"lr_schedule": "steps"}, "needs lr_drops"),
        ({"lr_drops": (5,)}, "no meaning for lr_schedule 'constant'"),
        ({"lr_drops": (5,), "lr_schedule": "cosine"}, "no meaning for lr_schedule 'cosine'"),
        ({"control_levels": (1,)}, "no controls"),
        ({"devices": 2}, "needs --distribute=mirrored"),
    ],
)
def test_contradiction(fields, text):
    with pytest.raises(UserError, match=text):
        Spec(**fields)


# Retraining.


@pytest.mark.parametrize(
    ("fields", "rewind_at", "span"),
    [
        ({}, 0, (0, 1000)),
        ({"rewind_step": 100}, 100, (100, 1000)),
        ({"rewind_step": 1}, 1, (1, 1000)),
        ({"rewind_step": 0.02}, 20, (20, 1000)),
        ({"rewind_step": 0.0204}, 20, (20, 1000)),
        ({"rewind_step": 0.0206}, 21, (21, 1000)),
        ({"rewind_step": 999}, 999, (999, 1000)),
        ({"retrain_steps": 900}, 100, (100, 1000)),
        ({"retrain_steps": 1000}, 0, (0, 1000)),
        ({"retrain": "lr_rewind"}, 0, (0, 1000)),
        ({"retrain": "lr_rewind", "retrain_steps": 300}, 0, (700, 1000)),
        ({"retrain": "finetune"}, 0, (1000, 2000)),
        ({"retrain": "finetune", "retrain_steps": 300}, 0, (1000, 1300)),
        ({"retrain": "finetune", "retrain_steps": 5000}, 0, (1000, 6000)),
    ],
)
def test_retraining(fields, rewind_at, span):
    spec = Spec(train_steps=1000, **fields)
    assert spec.rewind_at == rewind_at and type(spec.rewind_at) is int
    assert spec.retrain_span == span and {type(step) for step in spec.retrain_span} == {int}


# As a dictionary.


def test_round_trip():
    for spec in (
        Spec(),
        Spec(model="conv2", prune_fraction_conv=0.1, target_density=1 / 3, rewind_step=0.1),
        Spec(lr_schedule="steps", lr_drops=(5, 9), controls=("reinit",), control_levels=(1, 3)),
        Spec(distribute="mirrored", devices=2, retrain="lr_rewind", retrain_steps=7),
    ):
        text = json.dumps(spec.as_dict())
        back = Spec.from_dict(json.loads(text))
        assert back == spec and json.dumps(back.as_dict()) == text
    assert list(Spec().as_dict()) == list(FIELDS)


def test_from_dict_refuses_what_spec_refuses():
    with pytest.raises(UserError, match="a spec has no field 'level'. Did you mean 'levels'"):
        Spec.from_dict({"level": 3})
    with pytest.raises(UserError, match="levels must be int"):
        Spec.from_dict({"levels": "3"})
    assert Spec.from_dict({"levels": 3}) == Spec(levels=3)


# Identity.


def test_equal_specs_are_written_alike():
    a, b = Spec(learning_rate=1, rewind_step=10), Spec(learning_rate=1.0, rewind_step=10.0)
    assert a == b and a.digest() == b.digest()
    assert json.dumps(a.as_dict()) == json.dumps(b.as_dict())


GROWTH = [
    {"levels": 21},
    {"replicates": 5},
    {"histograms": True},
    {"controls": ("reinit",)},
    {"controls": ("reinit",), "control_levels": (2,)},
]


@pytest.mark.parametrize("change", GROWTH)
def test_identity_ignores_what_grows(change):
    assert Spec(**change).identity() == Spec().identity()
    assert Spec(**change).digest() == Spec().digest()
    assert Spec(**change) != Spec()


def test_every_other_field_makes_another_experiment():
    grow = {name for change in GROWTH for name in change}
    for name, (needed, allowed, _) in RANGES.items():
        if name not in grow:
            digests = {Spec(**needed, **{name: value}).digest() for value in allowed}
            assert len(digests) == len(set(allowed)) > 1, name
    for name, value in NAMES.items():
        if name not in grow:
            assert Spec(**{name: value}).digest() != Spec().digest(), name


def test_levels_decide_only_what_is_pruned_at_once():
    assert Spec(one_shot=True, levels=5).digest() != Spec(one_shot=True, levels=6).digest()
    for fields in ({}, {"target_density": 0.1}, {"target_density": 0.1, "one_shot": True}):
        assert Spec(levels=5, **fields).digest() == Spec(levels=6, **fields).digest()


def test_digest_is_the_same_in_every_process():
    code = "from lth_tf.spec import Spec; print(Spec(controls=('reinit',)).digest())"
    out = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True
        ).strip()
        for seed in ("1", "2")
    }
    assert out == {Spec(controls=("reinit",)).digest()}
    assert len(Spec().digest()) == 8 and int(Spec().digest(), 16) >= 0
