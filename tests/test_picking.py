"""picking: which examples, options and densities a spec means, and the ticket that comes of it."""

import dataclasses
import functools

import numpy as np
import pytest

from lth_tf import datasets, masks
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, scaling
from lth_tf.datasets.stream import Shard, Streamed
from lth_tf.errors import UserError
from lth_tf.experiments import picking
from lth_tf.models import statistics
from lth_tf.recipes import one_shot
from lth_tf.recipes.record import protected
from lth_tf.scopes import SCOPES, count
from lth_tf.scorers import LOSSES, SCORERS, looks_at_data, score
from lth_tf.spec import Spec, owners
from lth_tf.tickets import Ticket
from lth_tf.training import feeds, initial_weights, plain_model

DIGITS = datasets.load("digits")
BASE = Spec(
    recipe="one_shot",
    dataset="digits",
    model="lenet_20_10",
    validation_size=100,
    scope="global",
    density=(0.5, 0.2),
    samples_per_class=3,
)
SIZES = {"fc1/kernel": 1280, "fc2/kernel": 200, "output/kernel": 100}


def spec(**changes):
    return dataclasses.replace(BASE, **changes)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# Protected kernels.


@pytest.mark.parametrize(
    "patterns, found",
    [
        ((), []),
        (("output/kernel",), ["output/kernel"]),
        (("fc*",), ["fc1/kernel", "fc2/kernel"]),
        (("*2*", "fc1/kernel", "fc*"), ["fc1/kernel", "fc2/kernel"]),
        (("fc[12]/kernel", "?utput/*"), [*SIZES]),
    ],
)
def test_protect_takes_names_and_patterns_in_the_networks_order(patterns, found):
    assert protected(patterns, SIZES) == found
    assert protected(patterns, iter(SIZES)) == found


@pytest.mark.parametrize("pattern", ["conv*", "fc1", "FC1/kernel", "output/bias"])
def test_protect_that_fits_nothing_lists_what_there_is(pattern):
    with pytest.raises(UserError) as caught:
        protected(("fc*", pattern), SIZES)
    assert str(caught.value) == (
        f"protect {pattern!r} fits no kernel; the kernels are fc1/kernel, fc2/kernel, output/kernel"
    )


# Densities.


def whole(density):
    return count(sum(d * SIZES[n] for n, d in density.items()), 1)


def test_levels_go_from_the_highest_density_down():
    found = one_shot.densities(spec(density=(0.05, 0.5, 0.2)), SIZES)
    assert found == [dict.fromkeys(SIZES, d) for d in (1.0, 0.5, 0.2, 0.05)]


@pytest.mark.parametrize("protect", [("output/kernel",), ("fc2/kernel", "output*"), ("fc1*",)])
def test_protected_kernels_are_whole_and_the_total_is_exact(protect):
    kept = protected(protect, SIZES)
    fixed, total = sum(SIZES[n] for n in kept), sum(SIZES.values())
    wanted = [(fixed + k) / total for k in (1, 2, 17, 100, 133)] + [0.98]
    found = one_shot.densities(spec(protect=protect, density=tuple(wanted)), SIZES)
    assert len(found) == 7 and found[0] == dict.fromkeys(SIZES, 1.0)
    for density, each in zip(sorted(wanted, reverse=True), found[1:], strict=True):
        assert {each[n] for n in kept} == {1.0}
        assert len({d for n, d in each.items() if n not in kept}) == 1
        assert whole(each) == count(density, total)
        scores = {n: np.arange(size, 0.0, -1) for n, size in SIZES.items()}
        mask = SCOPES["global"](scores, each, min_per_layer=0)
        assert masks.kept(mask) == count(density, total)
        assert all(mask[n].all() for n in kept)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"density": (0.0003,)}, "density 0.0003 of 1580 weights leaves nothing; ask for 0.000633"),
        ({"density": (0.5, 1e-9)}, "density 1e-09 of 1580 weights leaves nothing"),
        (
            {"density": (0.05,), "protect": ("output/kernel",)},
            "leaves the 100 of the protected kernels; ask for 0.063925 or more",
        ),
        ({"density": (100 / 1580,), "protect": ("output*",)}, "leaves the 100 of the protected"),
        ({"density": (0.9,), "protect": ("*",)}, "leaves nothing that could be pruned"),
        ({"density": (0.9,), "protect": ("fc9*",)}, "'fc9[*]' fits no kernel"),
    ],
)
def test_densities_that_cannot_be_had(changes, message):
    with pytest.raises(UserError, match=message):
        one_shot.densities(spec(**changes), SIZES)


# Examples.


def test_balanced_has_each_class_equally_often_and_interleaved():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 20))
    chosen = picking.balanced(labels, 7, 5, seed=1)
    assert chosen.shape == (35,) and len(set(chosen.tolist())) == 35
    assert (labels[chosen].reshape(5, 7) == np.arange(7)).all()  # any 7 in a row have them all
    assert np.array_equal(chosen, picking.balanced(labels, 7, 5, seed=1))


def test_balanced_draws_by_its_seed_and_at_random():
    labels = np.arange(1000) % 10
    first, second = (picking.balanced(labels, 10, 10, seed) for seed in (0, 1))
    assert len(set(first.tolist()) & set(second.tolist())) < 20
    assert 400 < first.mean() < 600 and first.max() > 900  # not the first of each class
    fewer = picking.balanced(labels, 10, 4, 0)
    assert np.array_equal(fewer, first[:40])  # more examples leave these as they are


def test_balanced_can_take_all_of_a_class():
    labels = np.array([1, 0, 2, 1, 0, 2])
    assert sorted(picking.balanced(labels, 3, 2, 0).tolist()) == list(range(6))


@pytest.mark.parametrize(
    "labels, classes, message",
    [
        ([0, 0, 1, 2, 2], 3, "class 1 has 1 training examples$"),
        ([0, 0, 2, 2], 3, "class 1 has 0 training examples$"),
        ([0, 1, 1], 4, "class 0 has 1 training examples, and so 2 more classes$"),
    ],
)
def test_a_class_with_too_few_or_none(labels, classes, message):
    with pytest.raises(UserError, match=f"samples_per_class 2 cannot be had: {message}"):
        picking.balanced(np.array(labels), classes, 2, 0)


def numbered(n=600, classes=3):
    """A data set whose images say which one they are."""
    images = np.zeros((n, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(n), 256)
    images[:, 1, :, 0] = np.random.default_rng(0).integers(0, 256, (n, 2))
    labels = np.random.default_rng(1).integers(0, classes, n).astype(np.int32)
    return Dataset("toy", images, labels, images[:9], labels[:9], classes, (0.2,), (0.4,))


def which(batches):
    """The numbers of the examples, of images scaled to 0..1."""
    return np.concatenate([
        np.round(x[:, 0, 0, 0] * 255) * 256 + np.round(x[:, 0, 1, 0] * 255) for x, _ in batches
    ]).astype(int)  # fmt: skip


def test_batches_are_training_examples_never_validation_ones():
    data = numbered()
    for seed in range(3):
        s = spec(normalization="unit", validation_size=300, samples_per_class=60, seed=5)
        batches = picking.batches(s, data, seed)
        chosen, labels = which(batches), np.concatenate([y for _, y in batches])
        assert len(set(chosen.tolist())) == 180
        assert np.array_equal(data.train_labels[chosen], labels)
        assert np.bincount(labels).tolist() == [60, 60, 60]
        held = feeds.split(data, 300, 5)["validation"][0]
        assert not set(chosen.tolist()) & set(which([(held / 255, None)]).tolist())


def test_replicates_see_other_examples_of_the_same_split():
    data, s = numbered(), spec(normalization="unit", validation_size=300)
    one, again, other = (which(picking.batches(s, data, seed)) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and set(one.tolist()) != set(other.tolist())
    held = set(which([(feeds.split(data, 300, s.seed)["validation"][0] / 255, None)]).tolist())
    assert not held & set(other.tolist())


@pytest.mark.parametrize(
    "most, sizes",
    [(100, [30]), (30, [30]), (29, [15, 15]), (12, [10, 10, 10]), (7, [6] * 5), (8, [8, 8, 7, 7])],
)
def test_batches_are_of_nearly_equal_size(most, sizes):
    found = picking.batches(spec(score_batch_size=most), DIGITS, 0)
    assert [len(labels) for _, labels in found] == [len(x) for x, _ in found] == sizes
    whole = picking.batches(spec(), DIGITS, 0)[0]
    assert np.array_equal(np.concatenate([x for x, _ in found]), whole[0])
    assert np.array_equal(np.concatenate([y for _, y in found]), whole[1])
    assert np.bincount(whole[1]).tolist() == [3] * 10 and whole[1].dtype == np.int32


@pytest.mark.parametrize("precision", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["standard", "unit", "l2"])
def test_batches_are_scaled_as_training_does(kind, precision):
    data = numbered()
    s = spec(normalization=kind, precision=precision, validation_size=30)
    [(images, _)] = picking.batches(s, data, 0)
    dtype = np.float64 if precision == "float64" else np.float32
    assert isinstance(images, np.ndarray) and images.dtype == dtype
    chosen = which(picking.batches(spec(normalization="unit", validation_size=30), data, 0))
    raw = data.train_inputs[chosen]
    scaled = scaling.scale(raw, kind, data.mean, data.std, tf.as_dtype(dtype)).numpy()
    assert images.tobytes() == scaled.tobytes()
    x = raw / 255
    wanted = {
        "standard": (x - 0.2) / 0.4,
        "unit": x,
        "l2": x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True)),
    }[kind]
    np.testing.assert_allclose(images, wanted, rtol=1e-5)


def test_batches_are_not_augmented():
    plain, moved = (
        picking.batches(spec(augmentation=a), DIGITS, 0)[0][0] for a in ("none", "flip_crop")
    )
    assert np.array_equal(plain, moved)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """60 grey JPEGs on disk, each of another shade; labels 0, 1, 2, 0, ..."""
    path = str(tmp_path_factory.mktemp("streamed") / "0.tfrecord")
    with tf.io.TFRecordWriter(path) as file:
        for i in range(60):
            pixels = tf.fill([10, 12, 3], tf.constant(4 * i, tf.uint8))
            image = tf.io.encode_jpeg(pixels, quality=100).numpy()
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 3])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            file.write(example.SerializeToString())
    whole = (Shard(path, 0, 60),)
    return Streamed("toy", whole, whole, 3, (0.5,) * 3, (0.25,) * 3, (8, 8, 3))


def test_batches_of_streamed_data_are_balanced_training_examples(streamed):
    s = spec(normalization="unit", validation_size=15, samples_per_class=6, score_batch_size=7)
    first, again, other = (picking.batches(s, streamed, seed) for seed in (0, 0, 1))
    chosen = []
    for found in (first, other):
        assert [len(y) for _, y in found] == [6, 6, 6]
        images, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        assert images.shape == (18, 8, 8, 3) and images.dtype == np.float32
        assert (labels.reshape(6, 3) == [0, 1, 2]).all() and labels.dtype == np.int32
        chosen.append(np.round(images.mean((1, 2, 3)) * 255 / 4).astype(int))
        assert np.array_equal(chosen[-1] % 3, labels)
        assert len(set(chosen[-1])) == 18 and max(chosen[-1]) < 45  # 45 to 59 are held out
    assert set(chosen[0]) != set(chosen[1])
    assert all(np.array_equal(x, y) for x, y in zip(first[1], again[1], strict=True))


def test_a_class_with_too_few_in_streamed_data(streamed):
    s = spec(validation_size=15, samples_per_class=16)
    with pytest.raises(UserError, match="class 0 has 15 training examples, and so 2 more classes"):
        picking.batches(s, streamed, 0)


# Options.


@pytest.mark.parametrize(
    "changes, options",
    [
        ({"scorer": "magnitude"}, {}),
        ({"scorer": "synflow"}, {}),
        ({"scorer": "random"}, {"seed": 7}),
        (
            {"scorer": "snip"},
            {"seed": 7, "batch_norm": "eval", "variant": "paper", "loss": LOSSES["cross_entropy"]},
        ),
        (
            {"scorer": "snip", "snip_variant": "official", "score_batch_norm": "train",
             "score_loss": "squared_error"},
            {"seed": 7, "batch_norm": "train", "variant": "official",
             "loss": LOSSES["squared_error"]},
        ),
        (
            {"scorer": "grasp"},
            {"seed": 7, "batch_norm": "train", "variant": "paper", "temperature": 200.0,
             "loss": LOSSES["cross_entropy"]},
        ),
        (
            {"scorer": "grasp", "grasp_variant": "absolute", "score_batch_norm": "eval",
             "temperature": 1.0},
            {"seed": 7, "batch_norm": "eval", "variant": "absolute", "temperature": 1.0,
             "loss": LOSSES["cross_entropy"]},
        ),
    ],
)  # fmt: skip
def test_options(changes, options):
    assert picking.options(spec(**changes), 7) == options


# Tickets.


def dense(s=BASE, seed=0, shape=(8, 8, 1)):
    weights, kernels = initial_weights(s, shape, 10, seed)
    origin = {"seed": seed, "replicate": 0, "arm": "ticket", "input_shape": list(shape),
              "classes": 10}  # fmt: skip
    full = masks.ones({n: weights[n].shape for n in kernels})
    return Ticket(full, weights, 0, 0, origin, s)


def pick(s, density=0.2, seed=0, **options):
    start = dense(s, seed)
    return picking.pick(start, DIGITS, dict.fromkeys(start.mask, density), 4, **options)


@functools.cache
def picked(scorer="grasp"):
    return pick(spec(scorer=scorer))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("scorer", SCORERS)
def test_ticket_is_the_dense_one_cut_to_the_highest_scores(scorer):
    s = spec(scorer=scorer, rounds=1)
    start, found = dense(s, 3), pick(s, seed=3)
    assert found.level == 4 and found.spec == s and masks.kept(found.mask) == count(0.2, 1580)
    assert same(found.weights, masks.apply(found.mask, start.weights))
    assert {**found.origin, "scoring": None} == {**start.origin, "scoring": None}
    model = plain_model(s, (8, 8, 1), 10, 3)
    data = picking.batches(s, DIGITS, 3) if looks_at_data(scorer) else None
    scores = score(model, scorer, data, **picking.options(s, 3))
    assert same(found.mask, SCOPES["global"](scores, 0.2, min_per_layer=0))
    assert all(m.all() for m in start.mask.values())


def test_origin_says_how_it_was_scored():
    assert picked("random").origin["scoring"] == {"rounds": 1}
    assert picked("synflow").origin["scoring"] == {"rounds": 100}
    assert picked("grasp").origin["scoring"] == {
        "rounds": 1, "samples": 30, "batch_size": 30, "batch_norm": "train"
    }  # fmt: skip
    s = spec(scorer="snip", rounds=3, samples_per_class=4, score_batch_size=15)
    assert pick(s).origin["scoring"] == {
        "rounds": 3, "samples": 40, "batch_size": 14, "batch_norm": "eval"
    }  # fmt: skip


# Field -> what else is given, because the field has no effect without it; a change.
CHANGES = {
    "scorer": ({}, {"scorer": "snip"}),
    "rounds": ({}, {"rounds": 2}),
    "round_schedule": ({"rounds": 2}, {"round_schedule": "linear"}),
    "samples_per_class": ({}, {"samples_per_class": 4}),
    "score_batch_size": ({"grasp_variant": "official"}, {"score_batch_size": 15}),
    "score_augmentation": ({"augmentation": "flip_crop"}, {"score_augmentation": True}),
    "score_loss": ({}, {"score_loss": "squared_error"}),
    "temperature": ({}, {"temperature": 1.0}),
    "grasp_variant": ({}, {"grasp_variant": "official"}),
    "snip_variant": ({"scorer": "snip"}, {"snip_variant": "official"}),
    "min_per_layer": ({}, {"min_per_layer": 60}),
    "scope": ({}, {"scope": "erk"}),
    "init": ({}, {"init": "kaiming_normal"}),
    "normalization": ({}, {"normalization": "l2"}),
}
# The last but one below, in a network that has it; the last where a scorer has other options.
ELSEWHERE = {
    "density", "dense", "score_batch_norm", "warm_batch_norm", "scorer_options", "sparse_init",
}  # fmt: skip


def test_scoring_images_are_augmented_black_around_whatever_the_micro_batches():
    plain, changed = (
        spec(augmentation="flip_crop", score_augmentation=on, score_batch_size=size)
        for on, size in ((False, 100), (True, 100))
    )
    whole = picking.batches(changed, DIGITS, 3)
    again = picking.batches(dataclasses.replace(changed, score_batch_size=7), DIGITS, 3)
    x = np.concatenate([b[0] for b in whole])
    assert np.array_equal(x, np.concatenate([b[0] for b in again]))
    before = np.concatenate([b[0] for b in picking.batches(plain, DIGITS, 3)])
    assert (x != before).any(axis=(1, 2, 3)).mean() > 0.9
    black = np.float32((0 - DIGITS.mean[0]) / DIGITS.std[0])
    assert abs(x.min() - black) < 1e-6 and not (x == 0).any()  # the mean colour, were it scaled
    other = picking.batches(changed, DIGITS, 4)
    assert not np.array_equal(other[0][0], whole[0][0])
    wide = dataclasses.replace(changed, augmentation="resized_crop", precision="float64")
    assert picking.batches(wide, DIGITS, 3)[0][0].dtype == np.float64


def test_every_field_of_the_recipe_is_tested():
    fields = {f.name for f in dataclasses.fields(Spec) if "one_shot" in owners(f.name)}
    assert fields == set(CHANGES) - {"scope", "init", "normalization"} | ELSEWHERE


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_changes_which_weights_are_kept(name):
    given, change = CHANGES[name]
    before = pick(spec(**given)) if given else picked()
    after = pick(spec(**given, **change))
    assert not same(before.mask, after.mask)
    assert masks.kept(before.mask) == masks.kept(after.mask) == count(0.2, 1580)


def test_the_seed_changes_which_weights_are_kept_and_nothing_else_does():
    assert not same(picked().mask, pick(spec(), seed=1).mask)
    assert same(picked().mask, pick(spec()).mask)
    trained_otherwise = spec(
        precision="mixed_bfloat16", distribute="mirrored", devices=2, optimizer="sgd",
        train_steps=7, augmentation="flip_crop", score_batch_size=12, replicates=2, dense=True,
        controls=("shuffle",),
    )  # fmt: skip
    assert masks.overlap(picked().mask, pick(trained_otherwise).mask) > 0.98


def test_batch_norm_mode_reaches_the_scorer(thin_norm):
    thin = spec(scorer="snip", model=thin_norm)
    by_default, train = pick(thin), pick(dataclasses.replace(thin, score_batch_norm="train"))
    assert by_default.origin["scoring"]["batch_norm"] == "eval"
    assert train.origin["scoring"]["batch_norm"] == "train"
    assert 0.1 < masks.overlap(by_default.mask, train.mask) < 0.9


def test_batch_norm_is_warmed_up_for_scoring_alone(thin_norm):
    thin = spec(scorer="snip", model=thin_norm, precision="float64")
    warm = dataclasses.replace(thin, warm_batch_norm=True)
    assert 0.1 < masks.overlap(pick(thin).mask, pick(warm).mask) < 1
    model, data = plain_model(warm, (8, 8, 1), 10, 0), picking.batches(warm, DIGITS, 0)
    norm, before = model.get_layer("norm"), [v.numpy() for v in model.variables]
    inputs = [x for x, _ in data] * 2
    inputs[1] = 2 * inputs[1]
    with statistics.anew(model, inputs):
        convolved = [model.get_layer("conv")(x).numpy() for x in inputs]
        mean = np.mean([c.mean((0, 1, 2)) for c in convolved], 0)
        np.testing.assert_allclose(norm.moving_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        variance = np.mean([c.var((0, 1, 2)) for c in convolved], 0)
        np.testing.assert_allclose(norm.moving_variance.numpy(), variance, rtol=1e-2)
        found = score(model, "snip", data, **picking.options(warm, 0))
    assert all(np.array_equal(v.numpy(), b) for v, b in zip(model.variables, before, strict=True))
    assert norm.momentum != 0 and len(inputs) == 2
    with statistics.anew(model, [data[0][0]]):
        found = score(model, "snip", data, **picking.options(warm, 0))
    assert same(pick(warm).mask, SCOPES["global"](found, 0.2, min_per_layer=0))
    for changes, said in (
        ({"scorer": "synflow"}, "looks at no examples"),
        ({"scorer": "grasp"}, "statistics of each batch are used"),
        ({"model": "lenet_12_9"}, "'lenet_12_9' has no batch normalisation"),
    ):
        with pytest.raises(UserError, match=f"warm_batch_norm has no effect: .*{said}"):
            pick(dataclasses.replace(warm, **changes))


@pytest.mark.parametrize("scorer", ["grasp", "snip"])
def test_float64_specs_are_scored_in_float64(scorer):
    s = spec(precision="float64", scorer=scorer)
    wide = pick(s)
    assert {w.dtype for w in wide.weights.values()} == {np.dtype(np.float64)}
    model, data = plain_model(s, (8, 8, 1), 10, 0), picking.batches(s, DIGITS, 0)
    scores = score(model, scorer, data, **picking.options(s, 0))
    assert {v.dtype for v in scores.values()} == {np.dtype(np.float64)}
    assert same(wide.mask, SCOPES["global"](scores, 0.2, min_per_layer=0))


def test_transform_is_applied_to_the_scores_before_they_are_ranked():
    assert same(pick(spec(), transform=np.copy).mask, picked().mask)
    lowest = pick(spec(), transform=np.negative)
    assert masks.overlap(lowest.mask, picked().mask) == 0
    assert masks.kept(lowest.mask) == masks.kept(picked().mask)
