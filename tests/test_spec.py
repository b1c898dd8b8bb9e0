"""spec: every field is checked, contradictions are refused, equal experiments have equal names."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from lth_tf.errors import UserError
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, differences, fields_of, owners

FIELDS = {field.name: field for field in dataclasses.fields(Spec)}
LATER = [f.name for f in FIELDS.values() if f.metadata.get("later")]
# field -> what else it needs, values that are allowed, values that are out of range.
RANGES = {
    "recipe": ({}, ("imp", "one_shot"), ("one-shot", "")),
    "width": ({}, (1e-3, 0.5, 1, 2.0), (0, 0.0, -1)),
    "shortcut": ({}, ("projection", "identity"), ("none", "")),
    "augmentation": ({}, ("none", "flip_crop", "resized_crop"), ("flip", "")),
    "protect": ({}, ((), ("output/kernel",), ("*shortcut*", "conv1/kernel")), ()),
    "density": (
        {},
        ((0.05,), (1e-9,), (0.999,), (0.1, 0.05)),
        ((), (0.0,), (0,), (1.0,), (1,), (-0.1,), (0.1, 1.5), (0.1, 0.2, 0.1)),
    ),
    "scorer_options": (
        {},
        ((), (("damping", 0.1),), (("a", 1), ("b", "text"))),
        (("a",), ((1, 2),), (("a", 1, 2),)),
    ),
    "rounds": ({}, (None, 1, 100), (0, -1)),
    "round_schedule": ({}, ("exponential", "linear"), ("cosine", "")),
    "samples_per_class": ({}, (1, 10, 5000), (0, -1)),
    "score_batch_size": ({}, (1, 100), (0, -1)),
    "score_augmentation": ({"augmentation": "flip_crop"}, (False, True), ()),
    "output_std": ({}, (None, 0.01, 1), (0, -0.1)),
    "adam_epsilon": ({}, (1e-8, 1), (0, -1e-8)),
    "score_batch_norm": ({}, ("auto", "train", "eval"), ("batch", "")),
    "warm_batch_norm": ({}, (False, True), ()),
    "temperature": ({"scorer": "grasp"}, (1e-3, 1, 200.0), (0, 0.0, -1)),
    "grasp_variant": ({"scorer": "grasp"}, ("paper", "official", "absolute"), ("code", "")),
    "snip_variant": ({"scorer": "snip"}, ("paper", "official"), ("absolute", "")),
    "min_per_layer": ({}, (0, 1, 100), (-1,)),
    "dense": ({}, (False, True), ()),
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
    "distribute": ({}, ("auto", "none", "mirrored", "multi_worker"), ("tpu",)),
    "devices": ({"distribute": "mirrored"}, (None, 1, 8), (0, -1)),
    "workers": ({"distribute": "multi_worker"}, (None, 1, 8), (0, -1)),
    "communication": ({}, ("auto", "plain", "packed"), ("sparse",)),
    "sync_batch_norm": ({}, (False, True), ()),
    "worker_timeout": ({}, (1, 120.0), (0, 0.5)),
    "checkpoint_every": ({}, (0, 5000), (-1,)),
    "seed": ({}, (0, 2**31), (-1,)),
    "replicates": ({}, (1, 5), (0, -1)),
    "control_levels": ({"controls": ("reinit",)}, ((), (1, 2), (0,)), ((-1,), (3, -1))),
    "histograms": ({}, (False, True), ()),
    "sparse_init": ({}, ("none", "fan_in", "fan_avg", "layer"), ("fan_out",)),
    "label_smoothing": ({}, (0, 0.0, 0.1), (1, 1.0, -0.1)),
    "update_every": ({}, (1, 100), (0, -1)),
    "update_until": ({}, (0.5, 1, 25_000), (0, 0.0, -1)),
    "update_from": ({}, (0, 100), (-1,)),
    "initial_density": ({}, (None, 1, 0.5), (0, 0.0, -0.5)),
    "drop_fraction": ({}, (0.1, 0.99), (0, 1, 1.5)),
    "grow_init": ({}, ("zeros", "random"), ("ones",)),
    "regrown": ({}, ("keep", "new"), ("old",)),
    "grow_batch": ({}, ("train", "held_out"), ("test",)),
    "update_trains": ({}, (False, True), ()),
    "measure": ({}, ((), ("gradient_flow",)), (("flow",), ("gradient_flow", "x"))),
    "hessian_at": ({}, ((), (0, 100)), ((-1,),)),
}
# Their choices are keys of registries, which a spec cannot look up; field -> another choice.
NAMES = {
    "model": "conv2",
    "dataset": "digits",
    "init": "glorot_uniform",
    "scope": "global",
    "scorer": "snip",
    "score_loss": "squared_error",
    "optimizer": "sgd",
    "lr_schedule": "cosine",
    "controls": ("reinit",),
    "method": "set",
    "fraction_schedule": "linear",
}
NOT_A = {
    "str": (3, 1.5, True, ("a",), b"adam"),
    "bool": (0, 1, "true", 1.0),
    "int": (1.5, 1.0, "1", True, (1,)),
    "float": ("0.5", True, (0.5,), 1j),
    "tuple[int, ...]": ([1], 1, (1.5,), ("1",), (True,), "12"),
    "tuple[float, ...]": ([0.1], 0.1, ("0.1",), (True,), (0.1, None), "0.1"),
    "tuple[str, ...]": (["reinit"], "reinit", (1,)),
    "tuple[tuple[str, Any], ...]": ([("a", 1)], "a", (1,)),
}
ONE_SHOT = Spec(recipe="one_shot")


def recipe_of(name):
    return {"recipe": owners(name)[0]} if owners(name) else {}


def make(name, value, **others):
    """A spec with that value, of a recipe that has the field."""
    return Spec(**{**recipe_of(name), **others, name: value})


def test_every_field_is_tested():
    assert sorted([*RANGES, *NAMES]) == sorted(FIELDS)


# Each field.


@pytest.mark.parametrize("name", RANGES)
def test_range(name):
    others, allowed, refused = RANGES[name]
    for value in allowed:
        found = getattr(make(name, value, **others), name)
        assert found == value
    for value in refused:
        with pytest.raises(UserError, match=name):
            make(name, value, **others)


@pytest.mark.parametrize("name", FIELDS)
def test_type(name):
    kind = FIELDS[name].type
    for value in NOT_A[kind.removesuffix(" | None")]:
        with pytest.raises(UserError, match=f"{name} must be"):
            Spec(**{name: value})
    if not kind.endswith(" | None"):
        with pytest.raises(UserError, match=f"{name} must be .*, not None"):
            Spec(**{name: None})


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if "float" in f.type])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name, bad):
    with pytest.raises(UserError, match=f"{name} must be a finite number"):
        make(name, (0.5, bad) if FIELDS[name].type.startswith("tuple") else bad)


def test_range_says_what_is_allowed():
    for name, value, text in (
        (
            "prune_fraction",
            20.0,
            "prune_fraction 20.0 is out of range; it must be at least 0.0 and",
        ),
        ("target_density", 0.0, "it must be above 0.0 and below 1.0"),
        ("batch_size", 0, "batch_size 0 is out of range; it must be at least 1$"),
        ("density", (0.1, 20), "density 20 is out of range; it must be above 0.0 and below 1.0"),
        ("density", (), r"density \[\] must name different densities"),
        ("density", (0.1, 0.10), r"density \[0.1, 0.1\] must name different densities"),
    ):
        with pytest.raises(UserError, match=text):
            make(name, value)


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
        ({"recipe": "one_shot", "score_augmentation": True}, "needs --augmentation=flip_crop"),
        ({"lr_drops": (5,)}, "no meaning for lr_schedule 'constant'"),
        ({"lr_drops": (5,), "lr_schedule": "cosine"}, "no meaning for lr_schedule 'cosine'"),
        ({"control_levels": (1,)}, "no controls"),
        ({"devices": 2, "distribute": "none"}, "no meaning for --distribute=none"),
        ({"workers": 2}, "needs --distribute=multi_worker"),
    ],
)
def test_contradiction(fields, text):
    with pytest.raises(UserError, match=text):
        Spec(**fields)


@pytest.mark.parametrize("scorer", ["snip", "synflow", "magnitude", "random", "grasp"])
def test_options_of_another_scorer_are_refused(scorer):
    for name, value in (
        ("grasp_variant", "official"), ("grasp_variant", "absolute"), ("snip_variant", "official"),
        ("temperature", 1.0),
    ):  # fmt: skip
        owner = "snip" if name == "snip_variant" else "grasp"
        if scorer == owner:
            assert getattr(make(name, value, scorer=scorer), name) == value
        else:
            with pytest.raises(UserError, match=f"{name} .* needs --scorer={owner}"):
                make(name, value, scorer=scorer)


OTHERS = {"imp": "one_shot", "one_shot": "imp", "sparse": "imp"}
OWNED = [name for name in FIELDS if owners(name)]


@pytest.mark.parametrize("name", OWNED)
def test_fields_of_the_other_recipe_are_refused_when_changed(name):
    field = FIELDS[name]
    other = OTHERS[owners(name)[0]]
    changed = NAMES.get(name) or next(v for v in RANGES[name][1] if v != field.default)
    with pytest.raises(UserError, match=f"{name} has no meaning for the recipe '{other}', only"):
        Spec(recipe=other, **{name: changed})
    assert getattr(Spec(recipe=other, **{name: field.default}), name) == field.default


def test_both_recipes_have_fields_of_their_own():
    assert {"density", "scorer", "dense", "rounds"} < set(OWNED)
    assert {"levels", "prune_fraction", "rewind_step", "one_shot"} < set(OWNED)
    assert not {"seed", "scope", "protect", "train_steps", "controls"} & set(OWNED)


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
        ONE_SHOT,
        Spec(
            recipe="one_shot", density=(1 / 3, 0.1, 1e-3), scorer="snip", snip_variant="official",
            rounds=3, protect=("output/kernel", "*1*"), dense=True, width=0.5, min_per_layer=1,
        ),  # fmt: skip
    ):
        text = json.dumps(spec.as_dict())
        back = Spec.from_dict(json.loads(text))
        assert back == spec and json.dumps(back.as_dict()) == text
    assert list(Spec().as_dict()) == [n for n in FIELDS if n not in LATER]
    options = make("scorer_options", (("b", 2), ("a", 0.5)))
    assert list(options.as_dict())[-1] == "scorer_options"
    assert Spec.from_dict(json.loads(json.dumps(options.as_dict()))) == options
    assert options.as_dict()["scorer_options"] == {"a": 0.5, "b": 2}


def test_from_dict_refuses_what_spec_refuses():
    with pytest.raises(UserError, match="a spec has no field 'level'. Did you mean 'levels'"):
        Spec.from_dict({"level": 3})
    with pytest.raises(UserError, match="levels must be int"):
        Spec.from_dict({"levels": "3"})
    assert Spec.from_dict({"levels": 3}) == Spec(levels=3)
    with pytest.raises(UserError, match="density must be tuple"):
        Spec.from_dict({"recipe": "one_shot", "density": ["0.1"]})
    with pytest.raises(UserError, match="levels has no meaning for the recipe 'one_shot'"):
        Spec.from_dict({"recipe": "one_shot", "levels": 3})
    assert Spec.from_dict({"recipe": "one_shot", "density": [0.5, 0.25]}).density == (0.5, 0.25)


# What lth-imp wrote before there were other recipes.
OLD = {
    "batch_size", "compile", "control_levels", "controls", "dataset", "devices", "distribute",
    "eval_every", "histograms", "init", "learning_rate", "levels", "lr_drop_factor", "lr_drops",
    "lr_schedule", "model", "momentum", "normalization", "one_shot", "optimizer", "precision",
    "prune_fraction", "prune_fraction_conv", "prune_fraction_output", "replicates", "retrain",
    "retrain_steps", "rewind_step", "scope", "seed", "target_density", "train_steps",
    "validation_size", "warmup_steps", "weight_decay",
}  # fmt: skip


def test_specs_written_before_there_were_recipes_are_still_the_same():
    recorded = pathlib.Path(__file__).parent.parent / "results" / "mnist_lenet_imp" / "spec.json"
    texts = [json.dumps({n: v for n, v in Spec(levels=7).as_dict().items() if n in OLD})]
    texts += [recorded.read_text()] if recorded.exists() else []
    for text in texts:
        written = json.loads(text)
        assert set(written) == OLD
        old = Spec.from_dict(written)
        assert old.recipe == "imp"
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in written.items()}
        assert old.identity() == Spec(**values).identity()
        assert {n: old.as_dict()[n] for n in OLD} == written


# Identity.


def test_equal_specs_are_written_alike():
    a, b = Spec(learning_rate=1, rewind_step=10), Spec(learning_rate=1.0, rewind_step=10.0)
    assert a == b and a.digest() == b.digest()
    assert json.dumps(a.as_dict()) == json.dumps(b.as_dict())
    warm = Spec(recipe="one_shot", width=2, temperature=1)
    again = Spec(recipe="one_shot", width=2.0, temperature=1.0)
    assert warm.digest() == again.digest()
    assert json.dumps(warm.as_dict()) == json.dumps(again.as_dict())


GROWTH = [
    {"levels": 21},
    {"replicates": 5},
    {"histograms": True},
    {"measure": ("gradient_flow",)},
    {"hessian_at": (0, 9)},
    {"checkpoint_every": 7},
    {"worker_timeout": 7.0},
    {"controls": ("reinit",)},
    {"controls": ("reinit",), "control_levels": (2,)},
]


@pytest.mark.parametrize("change", GROWTH)
def test_identity_ignores_what_grows(change):
    assert Spec(**change).identity() == Spec().identity()
    assert Spec(**change).digest() == Spec().digest()
    assert Spec(**change) != Spec()


@pytest.mark.parametrize("change", [c for c in GROWTH if "levels" not in c] + [{"dense": True}])
def test_identity_of_one_shot_ignores_what_grows(change):
    grown = Spec(recipe="one_shot", **change)
    assert grown.identity() == ONE_SHOT.identity() and grown.digest() == ONE_SHOT.digest()
    assert grown != ONE_SHOT


def test_densities_are_those_of_the_levels_in_whatever_order():
    a, b = (Spec(recipe="one_shot", density=d) for d in ((0.02, 0.5, 0.1), (0.1, 0.02, 0.5)))
    assert a == b and a.density == (0.5, 0.1, 0.02) and a.digest() == b.digest()


def test_identity_has_the_recipes_own_fields_only():
    for recipe in OTHERS:
        names = set(Spec(recipe=recipe).identity())
        owned = {n for n in OWNED if recipe in owners(n)}
        assert owned - names <= {"levels", "dense", *LATER}
        assert not names & (set(OWNED) - owned) and "recipe" in names
    assert Spec().digest() != ONE_SHOT.digest()


def test_every_other_field_makes_another_experiment():
    grow = {name for change in GROWTH for name in change} | {"dense"}
    for name, (needed, allowed, _) in RANGES.items():
        if name not in grow:
            digests = {make(name, value, **needed).digest() for value in allowed}
            assert len(digests) == len(set(allowed)) > 1, name
    for name, value in NAMES.items():
        if name not in grow:
            assert make(name, value).digest() != Spec(**recipe_of(name)).digest(), name


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


# Digests that are the names of folders people have.
@pytest.mark.parametrize(
    "fields, digest",
    [
        ({}, "81af02b6"),
        ({"levels": 3, "one_shot": True, "controls": ("reinit",)}, "418cbd49"),
        ({"recipe": "one_shot"}, "8674ac51"),
        (
            {"recipe": "one_shot", "scope": "global", "scorer": "snip", "density": (0.1, 0.02)},
            "823685dd",
        ),
    ],
)
def test_digests_stay_what_they_were(fields, digest):
    assert Spec(**fields).digest() == digest


def test_a_field_of_several_recipes_is_in_the_identity_of_each(monkeypatch):
    both = dataclasses.replace(RECIPES["imp"], fields=("density", "levels"))
    monkeypatch.setitem(RECIPES._entries, "both", both)
    assert owners("density") == ["one_shot", "sparse", "both"]
    assert owners("levels") == ["imp", "both"]
    other = Spec(recipe="both", density=(0.3,), levels=2, one_shot=False)
    assert other.identity()["density"] == [0.3] and "scorer" not in other.identity()
    assert other.digest() != Spec(recipe="both", density=(0.4,), levels=2).digest()
    assert "density" in Spec(recipe="one_shot").identity() and "density" not in Spec().identity()
    with pytest.raises(UserError, match="'imp', only for 'one_shot' and 'sparse' and 'both'"):
        Spec(density=(0.3,))
    assert Spec().digest() == "81af02b6"


def test_every_field_has_one_role():
    roles = [fields_of(role=role) for role in ("training", "masks", "course")]
    assert sorted(sum(roles, [])) == sorted(FIELDS)
    assert set(fields_of(role="course")) == {
        "checkpoint_every", "worker_timeout", "histograms", "measure", "hessian_at"
    }  # fmt: skip


def test_fields_that_came_later_leave_what_was_written_before_as_it_is():
    assert {"output_std", "scorer_options", "adam_epsilon", "method"} <= set(LATER)
    for values in (ONE_SHOT.as_dict(), ONE_SHOT.identity(), Spec().as_dict()):
        assert not set(LATER) & set(values)
    new = Spec(output_std=0.01, adam_epsilon=1e-8)
    assert Spec.from_dict(new.as_dict()) == new and new.digest() != Spec().digest()
    assert differences(Spec().identity(), new.identity()) == (
        "output_std is None there, 0.01 here; adam_epsilon is 1e-07 there, 1e-08 here"
    )
