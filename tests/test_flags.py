"""Flags: every field, every preset, and how a typo ends."""

import dataclasses
import re

import pytest
from absl import flags
from absl.testing import flagsaver

import lth_tf.flags
from lth_tf import experiment
from lth_tf.errors import UserError
from lth_tf.flags import REGISTRIES, expand, presets, spec_from_flags
from lth_tf.spec import Spec

lth_tf.flags.define_spec("imp", "one_shot")


def parse(*words):
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(expand(["tool", *words]))
        return spec_from_flags()


SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def test_no_flags_give_the_default_spec():
    assert parse() == Spec()


@pytest.mark.parametrize("field", dataclasses.fields(Spec), ids=lambda f: f.name)
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
        word, value = f"--{field.name}=3,5", (3, 5)
    else:
        value = 0.25 if "float" in field.type else 7
        word = f"--{field.name}={value}"
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["tool", word])
        assert flags.FLAGS[field.name].value == value


@pytest.mark.parametrize("name", presets())
def test_preset_parses_plans_and_says_what_it_is(name):
    spec = parse(f"--preset={name}")
    planned = experiment.plan(spec, SHAPES[spec.dataset], 10)
    assert planned.trainings >= spec.levels + 1
    text = open(presets()[name]).read()
    for word in ("command", "hours", "expected", "paper"):
        assert re.search(rf"^# {word} ", text, re.MULTILINE), word
    assert f"--preset={name}" in text
    assert "\n--preset" not in text  # a preset in a preset would be read and do nothing
    assert not re.search(r"^--.*#", text, re.MULTILINE)


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
