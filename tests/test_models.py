"""models: the papers' sizes, weights that are a function of the seed, noise that repeats."""

import contextlib
import dataclasses
import fnmatch
import functools
import inspect
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from lth_tf import models, pruning, storage
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.models import INITS, MODELS, StatelessDropout, initial_weights, plain_model
from lth_tf.models.resnet import IdentityShortcut
from lth_tf.spec import Spec

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXED = list(MODELS)
# Their families' smallest networks with more of the same blocks; test_conformance runs them.
DEEP = ["resnet32", "resnet44", "resnet56", "resnet110", "vgg13", "vgg16"]
QUICK = [name for name in FIXED if name not in DEEP]
SHAPES = {"lenet_300_100": (28, 28, 1)}
# The smallest images.
SIDES = {
    "conv2": 2, "conv2_dropout": 2, "conv4": 4, "conv4_dropout": 4, "conv6": 8, "conv6_dropout": 8,
    "lenet5": 16, "lenet5_classic": 16, "vgg11": 16, "vgg13": 16, "vgg16": 16, "vgg19": 16,
    "imagenet_vgg16": 32,
}  # fmt: skip


def build(name, seed=0, shape=None, classes=10, **options):
    return MODELS[name](shape or SHAPES.get(name, (32, 32, 3)), classes, seed, **options)


def small(name, seed=0, shape=None, classes=7, **options):
    """As `build`, with small images and few channels."""
    side = max(8, SIDES.get(name, 1))
    if "width" in inspect.signature(MODELS[name]).parameters:
        options.setdefault("width", 1 / 16)
    return build(name, seed, shape or (side + 4, side + 1, 2), classes, **options)


@functools.cache
def shared(name):
    """One network for all tests that only look at it."""
    return small(name)


def values(model):
    return {name: v.numpy() for name, v in pruning.weights(model).items()}


def sizes(model):
    return {name: math.prod(v.shape) for name, v in pruning.kernels(model).items()}


# Architectures.


def test_names():
    assert FIXED == [
        "lenet_300_100", "lenet5", "lenet5_classic", "conv2", "conv2_dropout", "conv4",
        "conv4_dropout", "conv6", "conv6_dropout", "resnet20", "resnet32", "resnet44", "resnet56",
        "resnet110", "imagenet_resnet18", "imagenet_resnet50", "vgg11", "vgg13", "vgg16", "vgg19",
        "imagenet_vgg16",
    ]  # fmt: skip


def test_lenet_300_100():
    model = build("lenet_300_100")
    assert model.count_params() == 266_610
    assert sizes(model) == {"fc1/kernel": 235_200, "fc2/kernel": 30_000, "output/kernel": 1000}
    assert pruning.kinds(model) == {
        "fc1/kernel": "dense",
        "fc2/kernel": "dense",
        "output/kernel": "output",
    }


def test_lenet5():
    """Lee et al. 2019: the Caffe version, of 431K parameters."""
    model = build("lenet5", shape=(28, 28, 1))
    assert model.count_params() == 431_080
    assert list(sizes(model).values()) == [500, 25_000, 400_000, 5000]


@pytest.mark.parametrize("dropout", ["", "_dropout"])
@pytest.mark.parametrize(
    ("name", "conv", "dense"),
    [
        ("conv2", 38_592, 4_262_400),  # 38K of 4.3M
        ("conv4", 259_776, 2_165_248),  # 260K of 2.4M
        # 1.1M of 1.7M, but the layers of the paper add up to 2.3M.
        ("conv6", 1_144_512, 1_116_672),
    ],
)
def test_conv(name, dropout, conv, dense):
    """The weights of Frankle and Carbin 2019, figure 2."""
    model = build(name + dropout)
    found, kinds = sizes(model), pruning.kinds(model)
    assert sum(n for k, n in found.items() if kinds[k] == "conv") == conv
    assert sum(n for k, n in found.items() if kinds[k] != "conv") == dense
    filters = [64, 64, 128, 128, 256, 256][: int(name[-1])]
    assert [w.shape[-1] for w in pruning.kernels(model).values()] == [*filters, 256, 256, 10]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", QUICK)
def test_ends_in_logits_of_any_number_of_classes(name):
    model = shared(name)
    assert model.output_shape == (None, 7) and model.built
    x = np.random.default_rng(0).normal(size=(5, *model.input_shape[1:])).astype(np.float32)
    out = model(x).numpy()
    assert out.min() < 0 and np.abs(out.sum(1) - 1).min() > 1e-3


@pytest.mark.parametrize("name", QUICK)
def test_plain_biases_zero_normalisation_one(name):
    model = shared(name)
    assert not any(isinstance(layer, pruning.MaskedLayer) for layer in model.layers)
    kernels = pruning.kernels(model)
    for n, v in values(model).items():
        if n not in kernels:
            assert (v == n.endswith(("gamma", "moving_variance"))).all(), n


@pytest.mark.parametrize("name", SIDES)
def test_smallest_images(name):
    side = SIDES[name]
    assert small(name, shape=(side, side, 3)).output_shape == (None, 7)
    message = rf"'{name}' needs images .* of at least {side}x{side} pixels, not \["
    for shape in ((side - 1, side, 3), (32, side - 1, 3), (3 * side**2,)):
        with pytest.raises(UserError, match=message):
            small(name, shape=shape)


@pytest.mark.parametrize("name", ["resnet20", "imagenet_resnet18"])
def test_resnets_take_images_of_any_size(name):
    assert small(name, shape=(1, 3, 1))(np.ones((2, 1, 3, 1), np.float32)).shape == (2, 7)
    with pytest.raises(UserError, match=rf"'{name}' needs images .*, not \[784\]"):
        build(name, shape=(784,))


def test_lenet_family():
    model = build("lenet_20_30_40", shape=(4, 5, 1), classes=3)
    assert [v.shape for v in pruning.kernels(model).values()] == [
        (20, 20), (20, 30), (30, 40), (40, 3),
    ]  # fmt: skip
    assert build("lenet_7", shape=(2, 2, 1)).count_params() == 5 * 7 + 8 * 10
    assert "lenet_20_30_40" in MODELS and "lenet_20_30_40" not in list(MODELS)


@pytest.mark.parametrize(
    "name", ["lenet", "lenet_", "lenet_0", "lenet_300_", "lenet_-3", "lenet_3a"]
)
def test_no_family(name):
    with pytest.raises(UserError, match="unknown model .*lenet_A_B_..."):
        MODELS[name]
    assert name not in MODELS


def test_unknown_names():
    with pytest.raises(UserError, match="unknown model 'conv3'.*Did you mean 'conv"):
        MODELS["conv3"]
    with pytest.raises(
        UserError, match="unknown initialisation 'glorot'; there are: glorot_normal"
    ):
        build("conv2", init="glorot")


# Residual and VGG networks.


def counts(name, shape=(32, 32, 3), classes=10, **options):
    """Numbers of trainable, other and prunable parameters."""
    # A graph draws no weights, but takes twice as long where there are many layers.
    graph = "vgg" in name
    with tf.Graph().as_default() if graph else contextlib.nullcontext():
        model = build(name, shape=shape, classes=classes, **options)
        trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
        return trainable, model.count_params() - trainable, sum(sizes(model).values())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "parameters"),
    # 0.27, 0.46, 0.66, 0.85 and 1.7 million in He et al. 2016, table 6.
    [
        ("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)  # fmt: skip
def test_resnets_for_small_images(name, parameters):
    normalised = (int(name[6:]) - 2) // 3 * (16 + 32 + 64) + 16
    assert counts(name, shortcut="identity") == (
        parameters, 2 * normalised, parameters - 2 * normalised - 10,
    )  # fmt: skip


def test_resnet20_is_the_resnet_18_of_the_ticket_paper():
    """274K parameters, 270K in convolutions (Frankle and Carbin 2019, figure 2)."""
    model = build("resnet20")
    found = sizes(model)
    assert model.count_params() == 274_042
    assert sum(math.prod(v.shape) for v in model.trainable_variables) == 272_474
    assert sum(found.values()) == 270_256 + 640 and found["output/kernel"] == 640
    shortcuts = [n for n in found if fnmatch.fnmatch(n, "*shortcut*")]
    assert [found[n] for n in shortcuts] == [16 * 32, 32 * 64]
    # Identity shortcuts save these, and their normalisation.
    assert 272_474 - 2560 - 2 * (32 + 64) == 269_722


def test_resnet32_of_double_width():
    """1.86 million parameters (Wang et al. 2020)."""
    assert counts("resnet32", width=2.0)[0] == 1_860_522


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "conv", "normalised"),
    [
        ("vgg11", 9_217_728, 2752),
        ("vgg13", 9_402_048, 2944),
        ("vgg16", 14_710_464, 4224),
        ("vgg19", 20_018_880, 5504),  # 20.0M (Frankle and Carbin 2019, figure 2)
    ],
)
def test_vggs_for_small_images(name, conv, normalised):
    wanted = conv + 5120 + 2 * normalised + 10, 2 * normalised, conv + 5120
    assert counts(name) == wanted
    if name == "vgg11":
        assert counts(name, (64, 64, 3)) == wanted


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "trainable", "others"),
    # As published for torchvision's resnet18, resnet50 and vgg16_bn.
    [
        ("imagenet_resnet18", 11_689_512, 9600),
        ("imagenet_resnet50", 25_557_032, 53_120),
        ("imagenet_vgg16", 138_365_992, 2 * 4224 + 2),  # and the counts of two dropouts
    ],
)
def test_imagenet_networks(name, trainable, others):
    assert counts(name, (224, 224, 3), 1000)[:2] == (trainable, others)


def channels(model):
    return [v.shape[-1] for v in pruning.kernels(model).values()]


def test_width():
    thin, least = (channels(build("resnet20", width=w)) for w in (0.3, 0.01))
    half = channels(build("vgg13", width=0.5))
    large = channels(build("imagenet_vgg16", width=1 / 32))
    assert thin == [*[5] * 7, *[10] * 7, *[19] * 7, 10]  # of 4.8, 9.6 and 19.2
    assert least == [1] * 21 + [10]
    assert half == [32, 32, 64, 64, 128, 128, 256, 256, 256, 256, 10]
    assert large == [2, 2, 4, 4, 8, 8, 8, *[16] * 6, 128, 128, 10]
    assert set(channels(shared("imagenet_resnet50"))) == {4, 8, 16, 32, 64, 128, 7}


@pytest.mark.parametrize("name", [n for n in QUICK if "resnet" in n or "vgg" in n])
def test_names_and_kinds_of_convolutional_networks(name):
    model = shared(name)
    kinds = pruning.kinds(model)
    *others, last = kinds
    assert kinds[last] == "output" and last == "output/kernel"
    dense = [n for n in others if kinds[n] != "conv"]
    assert dense == (["fc1/kernel", "fc2/kernel"] if name == "imagenet_vgg16" else [])
    shortcuts = [n for n in others if "shortcut" in n]
    # Small images need one of VGG's three dense layers.
    layers = int(re.search(r"\d+", name)[0]) - (2 if name.startswith("vgg") else 0)
    assert len(kinds) - len(shortcuts) == layers
    if "vgg" in name:
        assert not shortcuts and others[0] == "stage1_conv1/kernel"
    else:
        assert others[:2] == ["stem_conv/kernel", "stage1_block0_conv1/kernel"]
        stages = {"imagenet_resnet18": (2, 3, 4), "imagenet_resnet50": (1, 2, 3, 4)}
        assert shortcuts == [f"stage{i}_block0_shortcut/kernel" for i in stages.get(name, (2, 3))]
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            assert layer.use_bias == (name == "imagenet_vgg16")
        if isinstance(layer, keras.layers.BatchNormalization):
            assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)


def test_dropout_of_imagenet_vgg16():
    model = shared("imagenet_vgg16")
    found = [layer for layer in model.layers if isinstance(layer, StatelessDropout)]
    assert [layer.name for layer in found] == ["drop_fc1", "drop_fc2"]
    assert all(layer.rate == 0.5 for layer in found) and found[0].seed != found[1].seed


def residual(model, x):
    """A residual network's logits, of its weights and TensorFlow's operations alone."""
    w = values(model)

    def conv(x, name, strides=1):
        p = w[f"{name}/kernel"].shape[0] // 2
        return tf.nn.conv2d(x, w[f"{name}/kernel"], strides, [[0, 0], [p, p], [p, p], [0, 0]])

    def norm(x, name):
        gamma, beta, mean, variance = (
            w[f"{name}/{n}"] for n in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    x = tf.nn.relu(norm(conv(x, "stem_conv", 2 if "imagenet" in model.name else 1), "stem_norm"))
    if "imagenet" in model.name:
        x = tf.nn.max_pool2d(x, 3, 2, [[0, 0], [1, 1], [1, 1], [0, 0]])
    for first in [n for n in w if n.endswith("conv1/kernel")]:
        name = first.removesuffix("_conv1/kernel")
        strides = 2 if "block0" in name and "stage1" not in name else 1
        last = 3 if f"{name}_conv3/kernel" in w else 2
        y = x
        for i in range(1, last + 1):
            y = conv(y, f"{name}_conv{i}", strides if i == last - 1 else 1)
            y = norm(y, f"{name}_norm{i}")
            y = y if i == last else tf.nn.relu(y)
        if f"{name}_shortcut/kernel" in w:
            x = norm(conv(x, f"{name}_shortcut", strides), f"{name}_shortcut_norm")
        elif strides == 2:
            x = x[:, ::2, ::2]
            x = tf.concat([x, tf.zeros([*x.shape[:3], y.shape[-1] - x.shape[-1]])], -1)
        x = tf.nn.relu(x + y)
    return tf.reduce_mean(x, (1, 2)) @ w["output/kernel"] + w["output/bias"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("resnet20", 32, {}),
        ("resnet20", 33, {"shortcut": "identity"}),
        ("imagenet_resnet18", 33, {}),
        ("imagenet_resnet50", 32, {}),
    ],
)
def test_residual_networks_compute_what_the_papers_say(name, side, options):
    model = small(name, shape=(side, side - 1, 3), **options)
    rng = np.random.default_rng(0)
    for variable in model.variables:  # biases and statistics, too
        noise = rng.uniform(0.5, 1.5, variable.shape)
        variable.assign(noise if len(variable.shape) < 2 else noise * variable.numpy())
    x = rng.normal(size=(2, side, side - 1, 3)).astype(np.float32)
    np.testing.assert_allclose(model(x), residual(model, x), rtol=1e-4, atol=1e-4)


def test_identity_shortcut():
    layer = IdentityShortcut(5, 2)
    x = np.arange(1, 2 * 3 * 4 * 2 + 1, dtype=np.float32).reshape(2, 3, 4, 2)
    out = layer(x).numpy()
    assert out.shape == (2, 2, 2, 5) and not layer.weights
    assert (out[..., :2] == x[:, [0, 2]][:, :, [0, 2]]).all() and not out[..., 2:].any()
    assert (IdentityShortcut.from_config(layer.get_config())(x).numpy() == out).all()


def test_unknown_shortcut():
    with pytest.raises(UserError, match="unknown shortcut 'none'; there are: projection, identity"):
        build("resnet20", shortcut="none")


def test_pruned_residual_network_saved_and_loaded(tmp_path):
    plain = small("resnet20", shape=(8, 8, 1), shortcut="identity", width=0.25)
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    model = pruning.prune(plain)
    assert (model(x).numpy() == plain(x).numpy()).all()
    mask = {
        n: (np.arange(v.size) % 2).reshape(v.shape).astype(np.uint8)
        for n, v in pruning.get_mask(model).items()
    }
    pruning.set_mask(model, mask)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded(x).numpy() == model(x).numpy()).all()
    assert all((m == mask[n]).all() for n, m in pruning.get_mask(loaded).items())
    assert (pruning.strip(loaded)(x).numpy() == model(x).numpy()).all()


# Specs.


def test_a_spec_chooses_width_shortcut_and_init():
    spec = Spec(model="resnet20", width=0.5, shortcut="identity", init="kaiming_normal")
    model = models.build(spec, (8, 8, 1), 10, 3)
    wanted = build("resnet20", 3, (8, 8, 1), width=0.5, shortcut="identity", init="kaiming_normal")
    assert storage.digest(values(model)) == storage.digest(values(wanted))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet_300_100", {"width": 2.0}),
        ("lenet5", {"width": 0.5}),
        ("conv2", {"shortcut": "identity"}),
        ("vgg11", {"shortcut": "identity"}),
        ("imagenet_resnet18", {"shortcut": "identity"}),
    ],
)
def test_a_spec_is_refused_what_the_network_lacks(name, options):
    (option,) = options
    with pytest.raises(UserError, match=rf"model '{name}' has no {option} to choose; leave it at"):
        models.build(Spec(model=name, **options), (32, 32, 3), 10, 0)


# Seeds.


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*QUICK, "lenet_9_8_7"])
def test_equal_seeds_are_equal_weights_and_others_differ_everywhere(name):
    one = values(shared(name))
    keras.utils.set_random_seed(5)
    build("conv2", shape=(8, 8, 1))
    same, other = (values(small(name, seed=seed)) for seed in (0, 1))
    assert list(one) == list(same)
    assert storage.digest(one) == storage.digest(same)
    kernels = [n for n in one if n.endswith("kernel")]
    assert len(kernels) >= 3
    for kernel in kernels:
        assert (one[kernel] != other[kernel]).mean() > 0.99, kernel


def test_layers_and_seeds_do_not_share_weights():
    drawn = [
        v for seed in range(3) for n, v in values(build("lenet_9_9_9", seed, (3, 3, 1), 9)).items()
        if n.endswith("kernel")
    ]  # fmt: skip
    assert len(drawn) == 12 and len({v.tobytes() for v in drawn}) == 12


@pytest.mark.slow
def test_equal_seeds_are_equal_weights_in_every_process():
    code = """
from lth_tf import pruning, storage
from lth_tf.models import MODELS
for name in ("conv4_dropout", "lenet_300_100", "resnet20"):
    model = MODELS[name]((8, 8, 1), 10, 3)
    print(storage.digest({n: v.numpy() for n, v in pruning.weights(model).items()}))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True
    )
    # Here in the other order.
    here = [
        storage.digest(values(build(name, seed=3, shape=(8, 8, 1))))
        for name in ("resnet20", "lenet_300_100", "conv4_dropout")
    ]
    assert out.split() == here[::-1]


# Initialisations.


STD = {
    "glorot_normal": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "glorot_normal_untruncated": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "glorot_uniform": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "kaiming_normal": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "kaiming_normal_fan_out": lambda fan_in, fan_out: math.sqrt(2 / fan_out),
}
# Largest |w| in standard deviations; a normal variable truncated at 2 has a deviation of 0.8796.
BOUND = {"glorot_normal": 2 / 0.87962566103423978, "glorot_uniform": math.sqrt(3)}


def test_every_init_is_tested():
    assert sorted(STD) == sorted(INITS)


@pytest.mark.parametrize("name", list(INITS))
@pytest.mark.parametrize("shape", [(784, 300), (3, 3, 64, 128)])
def test_init(name, shape):
    w = INITS[name](5)(shape, tf.float64).numpy()
    field = math.prod(shape[:-2])
    z = w / STD[name](field * shape[-2], field * shape[-1])
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    assert abs(z.std() - 1) < 5 / math.sqrt(z.size)  # wider than the error of any of these
    if name in BOUND:
        assert 0.999 * BOUND[name] < np.abs(z).max() <= BOUND[name] * (1 + 1e-9)
    else:
        assert np.abs(z).max() > 4
        assert abs((np.abs(z) > 2).mean() - 0.0455) < 5 * math.sqrt(0.0455 / z.size)
    same, other = (INITS[name](seed)(shape, tf.float64).numpy() for seed in (5, 6))
    assert (same == w).all() and (other != w).mean() > 0.99


@pytest.mark.sampled(2)
@pytest.mark.parametrize("init", list(INITS))
def test_models_use_the_init(init):
    for model in (
        build("lenet_300_100", init=init),
        build("conv2", shape=(8, 8, 3), init=init),
        small("resnet20", init=init, width=0.25),
        small("vgg11", init=init, width=0.25),
    ):
        for kernel in pruning.kernels(model).values():
            field = math.prod(kernel.shape[:-2])
            std = STD[init](field * kernel.shape[-2], field * kernel.shape[-1])
            n = math.prod(kernel.shape)
            assert abs(kernel.numpy().std() / std - 1) < 5 / math.sqrt(n)


@pytest.mark.parametrize("model", ["lenet_300_100", "vgg11"])
def test_the_output_layer_has_a_deviation_of_its_own(model):
    """With --init=kaiming_normal_fan_out these are the weights that GraSP's code starts from."""
    options = {"width": 0.25} if model == "vgg11" else {}
    spec = Spec(model=model, init="kaiming_normal_fan_out", **options)
    both = spec, dataclasses.replace(spec, output_std=0.01)
    before, after = (initial_weights(s, (32, 32, 3), 100, 3) for s in both)
    *others, last = after[1]
    w = after[0][last]
    assert abs(w.std() / 0.01 - 1) < 5 / math.sqrt(w.size) and abs(w.mean()) < 0.05 * w.size**-0.5
    assert all(np.array_equal(before[0][n], after[0][n]) for n in after[0] if n != last)
    assert np.array_equal(w, initial_weights(both[1], (32, 32, 3), 100, 3)[0][last])
    assert not np.array_equal(w, initial_weights(both[1], (32, 32, 3), 100, 4)[0][last])


@pytest.mark.parametrize("model", ["lenet_300_100", "conv2", "resnet20", "vgg11"])
def test_float64_networks_take_float64_in(model):
    shape = (8, 8, 3) if model == "conv2" else (32, 32, 3)
    made = plain_model(Spec(model=model, precision="float64"), shape, 10, 0)
    x = np.full((1, *shape), 1 + 2.0**-40)
    assert made.inputs[0].dtype == tf.float64
    assert not np.array_equal(made(x), made(x.astype(np.float32)))
    assert keras.backend.floatx() == "float32"


# Dropout.


@pytest.fixture
def dropout():
    layer = StatelessDropout(0.3, seed=4)
    layer.build((None, 1000))
    return layer


ONES = np.ones((100, 1000), np.float32)


def test_dropout_rate_and_scale(dropout):
    out = dropout(ONES, training=True).numpy()
    assert out.dtype == np.float32 and set(np.unique(out)) == {0, np.float32(1 / 0.7)}
    assert abs((out == 0).mean() - 0.3) < 5 * math.sqrt(0.21 / ONES.size)
    assert np.abs((out == 0).mean(0) - 0.3).max() < 6 * math.sqrt(0.21 / 100)
    assert np.abs((out == 0).mean(1) - 0.3).max() < 6 * math.sqrt(0.21 / 1000)


def test_dropout_keeps_nothing_of_what_it_drops(dropout):
    out = dropout(ONES * np.nan, training=True).numpy()
    assert abs((out == 0).mean() - 0.3) < 0.01 and not np.signbit(out[out == 0]).any()


def test_no_dropout_in_inference(dropout):
    x = np.random.default_rng(0).normal(size=(10, 1000)).astype(np.float32)
    for training in (False, None, tf.constant(False)):
        assert (dropout(x, training=training).numpy() == x).all()
    assert int(dropout.count) == 0
    assert (dropout(x, training=tf.constant(True)).numpy() == 0).any()
    assert int(dropout.count) == 1


def test_dropout_noise_is_a_function_of_seed_and_count(dropout):
    first, second = (dropout(ONES, training=True).numpy() for _ in range(2))
    assert int(dropout.count) == 2
    assert abs(((first == 0) & (second == 0)).mean() - 0.09) < 0.01  # independent
    dropout.count.assign(0)
    assert (dropout(ONES, training=True).numpy() == first).all()
    assert (tf.function(dropout)(ONES, training=True).numpy() == second).all()
    same, other = StatelessDropout(0.3, seed=4), StatelessDropout(0.3, seed=5)
    assert (same(ONES, training=True).numpy() == first).all()
    assert ((other(ONES, training=True).numpy() == 0) != (first == 0)).mean() > 0.4


def test_dropout_rate_zero_is_the_identity():
    assert (StatelessDropout(0.0, seed=0)(ONES, training=True).numpy() == ONES).all()


def test_dropout_in_other_precisions():
    for dtype in ("float64", "mixed_bfloat16", "mixed_float16"):
        out = StatelessDropout(0.5, seed=1, dtype=dtype)(ONES, training=True)
        assert out.dtype.name == dtype.removeprefix("mixed_")
        assert set(np.unique(tf.cast(out, tf.float32))) == {0, 2}


def test_dropout_gradient(dropout):
    x = tf.constant(ONES)
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = dropout(x, training=True)
    assert (tape.gradient(out, x).numpy() == out.numpy()).all()


def test_dropout_layers_of_a_model_draw_apart():
    model = build("conv6_dropout", shape=(8, 8, 1))
    layers = [layer for layer in model.layers if isinstance(layer, StatelessDropout)]
    assert [layer.name for layer in layers] == [
        "drop_pool1", "drop_pool2", "drop_pool3", "drop_fc1", "drop_fc2",
    ]  # fmt: skip
    assert len({layer.seed for layer in layers}) == 5
    other = build("conv6_dropout", shape=(8, 8, 1), seed=1)
    assert not {x.seed for x in layers} & {getattr(x, "seed", None) for x in other.layers}


def test_dropout_replicas_draw_apart():
    strategy = tf.distribute.MirroredStrategy(
        [d.name for d in tf.config.list_logical_devices("CPU")][:2]
    )
    with strategy.scope():
        layer = StatelessDropout(0.5, seed=1)
        layer.build((None, 1000))

    @tf.function
    def step():
        return strategy.run(lambda: layer(tf.ones((10, 1000)), training=True))

    one, two = (x.numpy() for x in strategy.experimental_local_results(step()))
    assert abs(((one == 0) & (two == 0)).mean() - 0.25) < 0.03
    assert layer.count.numpy() == 1  # and not 2


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_dropout_saved_and_loaded(tmp_path, ending):
    model = build("conv2_dropout", shape=(8, 8, 1))
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    for _ in range(3):
        model(x, training=True)
    model.save(tmp_path / f"model{ending}")
    loaded = keras.models.load_model(tmp_path / f"model{ending}")
    assert loaded.get_layer("drop_fc1").count.numpy() == 3
    assert loaded.get_layer("drop_fc1").get_config() == model.get_layer("drop_fc1").get_config()
    assert (loaded(x, training=True).numpy() == model(x, training=True).numpy()).all()
    assert (loaded(x).numpy() == model(x).numpy()).all()


def test_dropout_count_is_a_weight_like_any_other():
    model, other = (build("conv2_dropout", shape=(8, 8, 1)) for _ in range(2))
    x = np.ones((2, 8, 8, 1), np.float32)
    for _ in range(4):
        model(x, training=True)
    assert "drop_fc1/count" in pruning.weights(model)
    assert "drop_fc1/count" not in pruning.kernels(model)
    pruning.assign(other, values(model))
    assert (other(x, training=True).numpy() == model(x, training=True).numpy()).all()
