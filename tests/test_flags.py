"""Flags: every field, every preset, and how a typo ends."""

import contextlib
import dataclasses
import inspect
import re

import pytest
from absl import flags
from absl.testing import flagsaver

import lth_tf.flags
from lth_tf import experiments
from lth_tf.errors import UserError
from lth_tf.flags import REGISTRIES, expand, presets, spec_from_flags
from lth_tf.models import MODELS
from lth_tf.recipes import RECIPES
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec, owners

lth_tf.flags.define_spec(*RECIPES)


FIELDS = {f.name: f for f in dataclasses.fields(Spec)}
ON_THE_LINE = [f for f in FIELDS.values() if f.metadata.get("flag", True)]


def parse(*words, recipe="imp"):
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(expand(["tool", *words]))
        return spec_from_flags(recipe)


# Data set -> shape of its images, number of classes.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "tiny_shakespeare": ((64,), 65),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "tiny_imagenet": ((64, 64, 3), 200),
    "imagenet2012": ((224, 224, 3), 1000),
}


def test_no_flags_give_the_default_spec():
    assert parse() == Spec()
    assert parse(recipe="one_shot") == Spec(recipe="one_shot")


def test_the_recipe_is_the_tools_choice():
    hidden = [f.name for f in FIELDS.values() if f not in ON_THE_LINE]
    assert hidden == ["recipe", "scorer_options"]  # which the scorers' own flags give
    assert "recipe" not in flags.FLAGS


@pytest.mark.parametrize("field", ON_THE_LINE, ids=lambda f: f.name)
def test_every_field_has_a_flag_with_help_that_arrives(field):
    flag = flags.FLAGS[field.name]
    assert len(flag.help) > 15
    registry, choices = field.metadata.get("registry"), field.metadata.get("choices")
    if field.type == "bool":
        word, value = f"--{field.name}", True
    elif registry or choices:
        value = list(REGISTRIES[registry])[-1] if registry else choices[-1]
        assert value in flag.help
        word = f"--{field.name}={value}"
        value = (value,) if field.type.startswith("tuple") else value
    elif field.type.startswith("tuple"):
        value = {"int": (3, 5), "float": (0.25, 1e-3), "str": ("fc1/kernel", "*2*")}[
            re.match(r"tuple\[(\w+)", field.type)[1]
        ]
        word = f"--{field.name}={','.join(map(str, value))}"
    else:
        value = 0.25 if "float" in field.type else 7
        word = f"--{field.name}={value}"
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["tool", word])
        assert flags.FLAGS[field.name].value == value


# Presets.


def command(name):
    """What the preset's header says to type."""
    text = open(presets()[name]).read()
    return re.search(r"^# command +(.*?)^# hours", text, re.MULTILINE | re.DOTALL)[1]


def preset(name, *words):
    """The spec that the tool named in the header makes of the preset."""
    tool = re.search(r"lth-(imp|oneshot|sparse)\b", command(name))[0]
    (recipe,) = [name for name, record in RECIPES.items() if record.tool == tool]
    scope = RECIPES[recipe].defaults.get("scope", "layerwise")
    return parse(f"--scope={scope}", f"--preset={name}", *words, recipe=recipe)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", presets())
def test_preset_parses_plans_and_says_what_it_is(name):
    spec = preset(name)
    shape, classes = SHAPES[spec.dataset]
    if shape[0] > 64 and "width" in inspect.signature(MODELS[spec.model]).parameters:
        spec = dataclasses.replace(spec, width=spec.width / 4)  # seconds less, and GBs
    planned = experiments.plan(spec, shape, classes)
    levels = spec.levels + 1 if spec.recipe == "imp" else spec.dense + len(spec.density)
    assert planned.trainings >= levels * spec.replicates
    assert planned.steps >= spec.train_steps * spec.replicates
    text = open(presets()[name]).read()
    for word in ("command", "hours", "expected", "paper"):
        assert re.search(rf"^# {word} ", text, re.MULTILINE), word
    assert f"--preset={name}" in command(name)
    assert "\n--preset" not in text  # a preset in a preset would be read and do nothing
    assert not re.search(r"^--.*#", text, re.MULTILINE)


@pytest.mark.parametrize("name", presets())
def test_preset_has_only_flags_that_its_tool_has(name):
    recipe = preset(name).recipe
    known = {f.name for f in ON_THE_LINE if recipe in (owners(f.name) or [recipe])}
    known |= {"compression"} if "density" in known else set()
    given = re.findall(r"^--(\w+)", open(presets()[name]).read(), re.MULTILINE)
    assert given and {g if g in known else g.removeprefix("no") for g in given} <= known
    assert len(given) == len(set(given))


def test_presets_that_loop_over_scorers_loop_over_some_that_exist():
    loops = {name: re.search(r"for s in ([\w ]+);", command(name)) for name in presets()}
    assert any(loops.values())
    for name, loop in loops.items():
        for scorer in loop[1].split() if loop else ():
            assert scorer in SCORERS
            assert preset(name, f"--scorer={scorer}").scorer == scorer


def test_the_presets_of_one_comparison_differ_in_the_recipe_only():
    a, b = preset("fashion_lenet5_imp"), preset("fashion_lenet5_oneshot")
    owned = {name for name in FIELDS if owners(name)} | {"recipe", "controls"}
    assert (a.recipe, b.recipe) == ("imp", "one_shot")
    assert {n for n in FIELDS if getattr(a, n) != getattr(b, n)} <= owned
    # Four of its levels have the densities of the others.
    shape, classes = SHAPES["fashion_mnist"]
    planned = experiments.plan(a, shape, classes)
    sizes = planned.kept(0)
    total = sum(sizes.values())
    found = [sum(d[n] * sizes[n] for n in d) / total for d in planned.densities]
    for density, level in zip(b.density, (10, 13, 17, 20), strict=True):
        assert found[level] == pytest.approx(density, rel=0.01)


def test_preset_and_flagfile_stand_where_they_are_written(tmp_path):
    path = presets()["digits_lenet_imp"]
    assert parse("--preset=digits_lenet_imp", "--levels=2").levels == 2
    assert parse("--levels=2", "--preset=digits_lenet_imp").levels == 20
    assert parse("--preset", "digits_lenet_imp") == parse(f"--flagfile={path}")
    assert parse("--preset=digits_lenet_imp").dataset == "digits"


def test_paper_presets_have_the_papers_numbers():
    lenet = parse("--preset=mnist_lenet_imp")
    assert (lenet.train_steps, lenet.batch_size, lenet.learning_rate) == (50_000, 60, 1.2e-3)
    assert (lenet.prune_fraction, lenet.prune_fraction_output) == (0.2, 0.1)
    for model, steps, rate, conv in (
        ("conv2", 20_000, 2e-4, 0.1), ("conv4", 25_000, 3e-4, 0.1), ("conv6", 30_000, 3e-4, 0.15),
    ):  # fmt: skip
        s = parse(f"--preset=cifar10_{model}_imp")
        assert (s.model, s.train_steps, s.learning_rate, s.prune_fraction_conv) == (
            model, steps, rate, conv,
        )  # fmt: skip


# Recipes.


@contextlib.contextmanager
def undefined():
    """Within, none of this package's flags is defined."""
    found = [
        (module, flag)
        for module, some in flags.FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl")
        for flag in some
    ]
    flags.FLAGS.remove_flag_values([flag.name for _, flag in found])
    kept = set(flags.FLAGS)
    try:
        yield
    finally:
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - kept)
        for module, flag in found:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def defined(*recipes, **defaults):
    """Flag -> default, of a tool that defines those of these recipes."""
    with undefined():
        before = set(flags.FLAGS)
        for _ in range(2):  # the second time changes nothing
            lth_tf.flags.define_spec(*recipes, **defaults)
        return {n: flags.FLAGS[n].default for n in flags.FLAGS if n not in before}


def test_each_tool_has_the_flags_of_its_recipe_only():
    imp, one_shot, neither = defined("imp"), defined("one_shot"), defined()
    owned = {
        recipe: {f.name for f in ON_THE_LINE if recipe in owners(f.name)}
        for recipe in RECIPES
    }
    assert {"levels", "prune_fraction", "rewind_step"} <= set(imp) - set(one_shot)
    assert {"scorer", "density", "compression", "dense"} <= set(one_shot) - set(imp)
    assert set(imp) - set(neither) == owned["imp"]
    own = {"compression", *lth_tf.flags.scorer_flags()}
    assert set(one_shot) - set(neither) == owned["one_shot"] | own
    assert set(defined("imp", "one_shot")) == set(imp) | set(one_shot)
    assert {"method", "update_every", "density"} <= set(defined("sparse")) - set(imp)
    assert set(defined("sparse")) - set(neither) == owned["sparse"] | {"compression"}
    shared = {f.name for f in ON_THE_LINE} - set().union(*owned.values())
    assert set(neither) == shared | {"preset"}


def test_a_tool_can_have_a_default_of_its_own():
    plain, changed = defined("one_shot"), defined("one_shot", scope="global")
    assert (plain["scope"], changed["scope"]) == ("layerwise", "global")
    assert {n for n in plain if plain[n] != changed[n]} == {"scope"}


def test_flags_of_the_other_recipe_do_not_reach_the_spec():
    assert parse("--levels=3", recipe="one_shot") == Spec(recipe="one_shot")
    assert parse("--scorer=snip", "--density=0.5") == Spec()


@pytest.mark.parametrize(
    "text, density",
    [("20,10", (0.1, 0.05)), ("1.25", (0.8,)), ("1e3", (0.001,)), ("3, 7", (1 / 3, 1 / 7))],
)
def test_compression_is_the_inverse_of_density(text, density):
    assert parse(f"--compression={text}", recipe="one_shot").density == density
    preset = "--preset=fashion_lenet5_oneshot"
    assert parse(preset, f"--compression={text}", recipe="one_shot").density == density


@pytest.mark.parametrize(
    "words, message",
    [
        (("--compression=abc",), "compression 'abc' is out of range; it is the number of weights"),
        (("--compression=0.5",), "compression '0.5' is out of range"),
        (("--compression=10,0",), "compression '0' is out of range"),
        (("--compression=-10",), "compression '-10' is out of range"),
        (("--compression=inf",), "compression 'inf' is out of range"),
        (("--compression=nan",), "compression 'nan' is out of range"),
        (("--compression=10,",), "compression '' is out of range"),
        (("--compression=1",), "compression '1' is out of range"),
        (("--compression=10,10",), "must name different densities"),
    ],
)
def test_wrong_compressions_are_explained(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words, recipe="one_shot")


# Mistakes.


@pytest.mark.parametrize(
    "word, message",
    [
        ("--model=lenet_300_10O", "unknown model 'lenet_300_10O'.*lenet_A_B.*Did you mean"),
        ("--dataset=minst", "unknown data set 'minst'; there are: digits, mnist.*'mnist'"),
        ("--scope=globl", "unknown scope 'globl'.*Did you mean 'global'"),
        ("--controls=reinit,rand", "unknown branch 'rand'"),
        ("--retrain=rewnd", "unknown retrain 'rewnd'.*Did you mean 'rewind'"),
        ("--levels=three", "'three' is not a whole number"),
        ("--learning_rate=fast", "'fast' is not a number"),
        ("--lr_drops=1,x", "'x' is not a whole number"),
        ("--density=0.1,half", "'half' is not a number"),
        ("--scorer=grsp", "unknown scorer 'grsp'; there are: .*Did you mean 'grasp'"),
        ("--score_loss=crossentropy", "unknown loss .*Did you mean 'cross_entropy'"),
        ("--controls=shufle", "unknown branch 'shufle'.*Did you mean 'shuffle'"),
        ("--grasp_variant=offical", "unknown grasp_variant .*Did you mean 'official'"),
        ("--modle=lenet_300_100", "Unknown command line flag 'modle'"),
    ],
)
def test_typos_die_at_parse_time(word, message):
    with pytest.raises(flags.Error, match=message):
        parse(word)


@pytest.mark.parametrize(
    "word, message",
    [
        ("--preset=mnist_lenet", "unknown preset 'mnist_lenet'; there are: .*Did you mean"),
        ("--flagfile={nested}", "--preset=digits_lenet_imp inside a flag file is not expanded"),
        ("--flagfile=nowhere.flags", "there is no flag file 'nowhere.flags'"),
        ("--learning_rate=-1", "learning_rate -1.0 is out of range"),
        ("--target_density=1.5", "target_density 1.5 is out of range"),
        ("--lr_schedule=steps", "needs lr_drops"),
    ],
)
def test_wrong_values_are_explained(tmp_path, word, message):
    (tmp_path / "nested.flags").write_text("--preset=digits_lenet_imp\n")
    with pytest.raises(UserError, match=message):
        parse(word.format(nested=tmp_path / "nested.flags"))
