"""models: the papers' sizes, weights that are a function of the seed, noise that repeats."""

import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lth_tf import pruning, storage
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.models import INITS, MODELS, StatelessDropout

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = {"lenet_300_100": (28, 28, 1)}
FIXED = list(MODELS)


def build(name, seed=0, shape=None, classes=10, **options):
    return MODELS[name](shape or SHAPES.get(name, (32, 32, 3)), classes, seed, **options)


def values(model):
    return {name: v.numpy() for name, v in pruning.weights(model).items()}


def sizes(model):
    return {name: math.prod(v.shape) for name, v in pruning.kernels(model).items()}


# Architectures.


def test_names():
    assert FIXED == [
        "lenet_300_100", "conv2", "conv2_dropout", "conv4", "conv4_dropout", "conv6",
        "conv6_dropout",
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


@pytest.mark.parametrize("name", FIXED)
def test_ends_in_logits_of_any_number_of_classes(name):
    model = build(name, shape=(12, 9, 2), classes=7)
    assert model.output_shape == (None, 7) and model.built
    out = model(np.random.default_rng(0).normal(size=(5, 12, 9, 2)).astype(np.float32)).numpy()
    assert out.min() < 0 and np.abs(out.sum(1) - 1).min() > 1e-3


@pytest.mark.parametrize("name", FIXED)
def test_plain_and_biases_zero(name):
    model = build(name, shape=(8, 8, 1))
    assert not any(isinstance(layer, pruning.MaskedLayer) for layer in model.layers)
    kernels = pruning.kernels(model)
    assert all((v == 0).all() for n, v in values(model).items() if n not in kernels)


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


# Seeds.


@pytest.mark.parametrize("name", [*FIXED, "lenet_9_8_7"])
def test_equal_seeds_are_equal_weights_and_others_differ_everywhere(name):
    one = values(build(name, seed=1, shape=(8, 8, 1)))
    keras.utils.set_random_seed(5)
    build("conv2", shape=(8, 8, 1))
    same, other = (values(build(name, seed=seed, shape=(8, 8, 1))) for seed in (1, 2))
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


def test_equal_seeds_are_equal_weights_in_every_process():
    code = """
from lth_tf import pruning, storage
from lth_tf.models import MODELS
for name in ("conv4_dropout", "lenet_300_100"):
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
        for name in ("lenet_300_100", "conv4_dropout")
    ]
    assert out.split() == here[::-1]


# Initialisations.


STD = {
    "glorot_normal": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "glorot_normal_untruncated": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "glorot_uniform": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "kaiming_normal": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
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


@pytest.mark.parametrize("init", list(INITS))
def test_models_use_the_init(init):
    for name, shape in (("lenet_300_100", (28, 28, 1)), ("conv2", (8, 8, 3))):
        model = build(name, shape=shape, init=init)
        for kernel in pruning.kernels(model).values():
            field = math.prod(kernel.shape[:-2])
            std = STD[init](field * kernel.shape[-2], field * kernel.shape[-1])
            n = math.prod(kernel.shape)
            assert abs(kernel.numpy().std() / std - 1) < 5 / math.sqrt(n)


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
        [d.name for d in tf.config.list_logical_devices("CPU")]
    )
    assert strategy.num_replicas_in_sync == 2
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
