"""The sparse engine: TensorFlow's training on the kept weights alone."""

import dataclasses
import io
import json

import numpy as np
import pytest
import rich.console

from lth_tf import datasets, experiments, masks, pruning, storage
from lth_tf.callbacks.progress import Progress
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.models import MODELS
from lth_tf.spec import Spec
from lth_tf.training import DivergedError, Interrupted, Trainer, checkpoints, sparse

pytest.importorskip("numba", reason=f"numba is not installed: {sparse.INSTALL}")

DIGITS = datasets.load("digits")
SPEC = Spec(
    model="lenet_12_9", dataset="digits", validation_size=100, batch_size=20, train_steps=100,
    eval_every=10, learning_rate=0.01, precision="float64", compile="off", distribute="none",
    weight_decay=1e-3, checkpoint_every=0,
)  # fmt: skip
KINDS = [
    {"optimizer": name} for name in ("adam", "adamw", "sgd", "momentum", "nesterov")
] + [
    {"weight_decay": 0.0, "lr_schedule": "cosine", "warmup_steps": 7},
    {"normalization": "unit", "optimizer": "momentum", "lr_schedule": "steps", "lr_drops": (30,)},
]


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


def start(trainer, density=0.3, seed=0):
    """Weights and a mask at random; units without inputs, without outputs, and without both."""
    rng = np.random.default_rng(seed)
    kernels = pruning.kernels(trainer.model)
    mask = {n: (rng.random(v.shape) < density).astype(np.uint8) for n, v in kernels.items()}
    first, second, *_ = mask
    mask[first][:, :2], mask[second][1:3] = 0, 0
    return {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}, mask


def state(trainer):
    """All that training changes, as it lies in the variables."""
    return [v.numpy() for v in (*trainer.model.variables, *trainer.optimizer.variables)]


def far(one, other):
    """The largest difference."""
    return max(np.abs(a.astype(float) - b).max(initial=0) for a, b in zip(one, other, strict=True))


def both(s, density=0.3, threads=1, dataset=DIGITS):
    """What TensorFlow's engine and the sparse one make of 50 steps, in two calls."""
    trainer = Trainer(s, dataset)
    weights, mask = start(trainer, density)
    trainer.train(weights, mask, 0, 0)
    found = []
    for engine in (trainer.engine, sparse.Sparse(trainer.setup, threads)):
        trainer.train(weights, mask, 0, 0)
        engine.begin(mask)
        total, _ = engine.advance(0, 33, 3, 0.5)
        total, bad = engine.advance(33, 50, 3, total)
        engine.sync()
        pruning.check(trainer.model, trainer.optimizer)
        found.append((state(trainer), total, bad, [engine.evaluate(p) for p in DIGITS_PARTS]))
    return found


DIGITS_PARTS = ("train", "validation", "test")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_float64_equals_the_graph(changes):
    (one, total, bad, sums), (other, total_2, bad_2, sums_2) = both(spec(**changes))
    assert far(one, other) < 1e-10
    assert abs(total - total_2) < 1e-9 and bad == bad_2 == -1
    np.testing.assert_allclose(sums, sums_2, rtol=1e-10)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_batch(threads):
    (one, total, *_), (other, total_2, *_) = both(SPEC, threads=threads)
    assert far(one, other) < 1e-10 and abs(total - total_2) < 1e-9


def test_float32_is_near():
    (one, *_), (other, *_) = both(spec(precision="float32"))
    assert far(one, other) < 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["adam", "adamw", "momentum"])
def test_slots_in_float32_differ_by_rounding_alone(name):
    """Weights hardly show a beta that is a little off; slots do after a step."""
    trainer = Trainer(spec(precision="float32", optimizer=name), DIGITS)
    weights, mask = start(trainer)
    ends = []
    for engine in (trainer.engine, sparse.Sparse(trainer.setup)):
        trainer.train(weights, mask, 0, 0)
        engine.begin(mask)
        engine.advance(0, 1, 3, 0.0)
        engine.sync()
        ends.append([v.numpy() for v in trainer.optimizer.variables])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max(initial=0))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_kept_and_nothing_pruned(density):
    (one, total, *_), (other, total_2, *_) = both(SPEC, density)
    assert far(one, other) < 1e-10 and abs(total - total_2) < 1e-9


def _chain(input_shape, classes, seed, *, init="glorot_normal"):
    dense, layers = keras.layers.Dense, keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape), layers.Flatten(), dense(9, "tanh", name="a"),
            dense(8, "sigmoid", use_bias=False, name="b"), dense(7, name="c"), layers.ReLU(),
            dense(6, name="d"), layers.Activation("tanh"), dense(classes, name="output"),
        ],
        name="chain",
    )  # fmt: skip


def test_activations_and_layers_without_bias(monkeypatch):
    monkeypatch.setitem(MODELS._entries, "chain", _chain)
    (one, total, *_), (other, total_2, *_) = both(spec(model="chain"), 0.6)
    assert far(one, other) < 1e-10 and abs(total - total_2) < 1e-9


def _own_relu(x):
    return tf.nn.leaky_relu(x)


_own_relu.__name__ = "relu"
OTHERS = {  # (layers before the last, why they are refused)
    "slope": ([{"": "Dense"}, {"": "ReLU", "negative_slope": 0.1}], "negative_slope is not 0"),
    "threshold": ([{"": "Dense"}, {"": "ReLU", "threshold": 1.0}], "threshold is not 0"),
    "most": ([{"": "Dense"}, {"": "ReLU", "max_value": 6.0}], "max_value is not None"),
    "own": ([{"": "Dense", "activation": _own_relu}], "activation test_sparse_engine.relu"),
    "elu": ([{"": "Dense", "activation": "elu"}], "a Dense with activation elu"),
    "kernels": ([{"": "Dense", "kernel_constraint": "max_norm"}], "kernel_constraint is not None"),
    "biases": ([{"": "Dense", "bias_constraint": "non_neg"}], "bias_constraint is not None"),
    "loss": ([{"": "Dense", "activity_regularizer": "l2"}], "activity_regularizer is not None"),
    "frozen": ([{"": "Dense", "trainable": False}], "trainable is not True"),
    "dtype": ([{"": "Dense", "dtype": "float64"}], "a Dense of float64"),
    "order": ([{"": "Flatten", "data_format": "channels_first"}], "is not channels_last"),
    "dropout": ([{"": "Dense"}, {"": "Dropout", "rate": 0.1}], "a Dropout"),
    "flat": ([{"": "Dense"}, {"": "Flatten"}], "a Flatten"),
    "twice": ([{"": "Activation", "activation": "tanh"}], "activation of nothing dense"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_layers_that_do_something_else_are_refused(case, monkeypatch):
    """Each would be trained as if it were a plain one."""
    others, why = OTHERS[case]

    def build(input_shape, classes, seed, *, init="glorot_normal"):
        made = [
            getattr(keras.layers, other[""])(
                **({"units": 5} if other[""] == "Dense" else {}),
                **{k: v for k, v in other.items() if k},
            )
            for other in others
        ]
        head = keras.layers.Dense(classes, name="output")
        flat = [] if case == "order" else [keras.layers.Flatten()]
        return keras.Sequential([keras.Input(input_shape), *flat, *made, head])

    monkeypatch.setitem(MODELS._entries, "chain", build)
    with pytest.raises(UserError, match=f"engine=sparse cannot train this: layer .*{why}"):
        Trainer(spec(model="chain", precision="float32"), DIGITS, execution=Execution("sparse"))


def test_inputs_of_floats_and_of_several_channels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4, 2)).astype(np.float32)
    y = rng.integers(0, 3, 300)
    data = datasets.Dataset("mine", x, y, x[:50], y[:50], 3, (0.5, -1.0), (2.0, 0.7))
    (one, total, *_), (other, total_2, *_) = both(SPEC, dataset=data)
    assert far(one, other) < 1e-10 and abs(total - total_2) < 1e-9


def test_same_bits_however_the_steps_are_split():
    trainer = Trainer(spec(precision="float32", optimizer="adam"), DIGITS)
    weights, mask = start(trainer)
    ends = []
    for cuts in ([40], [1, 40], [13, 14, 40]):
        trainer.train(weights, mask, 0, 0)
        engine, step, total = sparse.Sparse(trainer.setup), 0, 0.0
        engine.begin(mask)
        for cut in cuts:
            total, _ = engine.advance(step, cut, 0, total)
            engine.sync()
            engine.begin(mask)
            step = cut
        ends.append([*state(trainer), np.float64(total)])
    for end in ends[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ends[0], end, strict=True))


def test_a_loss_that_is_not_finite_is_told_where_it_is():
    wild = spec(optimizer="sgd", learning_rate=1e160, weight_decay=0.0)
    steps = []
    for engine in ("tensorflow", "sparse"):
        trainer = Trainer(wild, DIGITS, execution=Execution(engine))
        with pytest.raises(DivergedError, match="not finite at step") as caught:
            trainer.train(*start(trainer), 0, 100)
        steps.append(str(caught.value))
    assert steps[0] == steps[1]


# --- In a training ---


def trained(execution, **given):
    trainer = Trainer(SPEC, DIGITS, execution=execution)
    return trainer.train(*start(trainer), 0, 100, seed=5, **given)


def test_a_whole_training_is_the_same_with_callbacks_and_a_moving_mask():
    class Mover(keras.callbacks.Callback):
        """Looks at weights, changes one, and moves the mask, at evaluations."""

        def on_epoch_end(self, epoch, logs=None):
            mask = pruning.get_mask(self.model)
            name, m = next(iter(mask.items()))
            kernel = pruning.kernels(self.model)[name]
            kernel.assign(kernel.numpy() * 1.01)
            if logs["step"] == 50:
                pruning.set_mask(self.model, {**mask, name: np.roll(m, 1, axis=0)})

    for callbacks in ((), (Mover(),)):
        one, other = (trained(Execution(e), callbacks=callbacks) for e in ("tensorflow", "sparse"))
        assert (one.decision.engine, other.decision.engine) == ("tensorflow", "sparse")
        assert far(one.weights.values(), other.weights.values()) < 1e-10
        assert all((one.mask[n] == m).all() for n, m in other.mask.items())
        for a, b in zip(one.rows, other.rows, strict=True):
            assert a["step"] == b["step"] and a["test_accuracy"] == b["test_accuracy"]
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-10)


def test_weights_are_captured_and_a_training_resumed_bit_for_bit():
    kept, captured = [], []
    whole = trained(Execution("sparse"), capture=37, captured=captured.append)
    again = iter([False] * 4 + [True] * 99)
    with pytest.raises(Interrupted):
        trained(Execution("sparse"), keep=kept.append, asked=lambda: next(again))
    resumed = trained(Execution("tensorflow"), state=kept[0])  # which says how it was begun
    assert kept[0].decision == {"engine": "sparse"} and 0 < kept[0].step < 100
    assert captured and resumed.decision.engine == "sparse"
    for name, w in whole.weights.items():
        assert w.tobytes() == resumed.weights[name].tobytes()


@pytest.mark.parametrize("decision", [{"engine": "abacus"}, {"engine": []}, {}, [1], "sparse"])
def test_a_checkpoint_of_no_known_engine_is_damaged(decision, tmp_path):
    kept, said = [], []
    with pytest.raises(Interrupted):
        trained(Execution("sparse"), keep=kept.append, asked=lambda: True)
    checkpoints.save(tmp_path, kept[0])
    assert checkpoints.latest(tmp_path, said.append).decision == {"engine": "sparse"} and not said
    checkpoints.save(tmp_path, dataclasses.replace(kept[0], decision=decision))
    assert checkpoints.latest(tmp_path, said.append) is None and "its engine is" in said[0]


def test_auto_is_decided_by_the_density():
    trainer = Trainer(SPEC, DIGITS, execution=Execution("auto"))
    weights, mask = start(trainer, 0.05)
    assert trainer.train(weights, mask, 0, 10).decision.engine == "sparse"
    ones = masks.ones({n: m.shape for n, m in mask.items()})
    assert trainer.train(weights, ones, 0, 10).decision.engine == "tensorflow"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"model": "conv2"}, "is a Conv2D"),
        ({"precision": "mixed_bfloat16"}, "precision is mixed_bfloat16, not float32 or float64"),
        ({"augmentation": "flip_crop"}, "augmentation is flip_crop, not none"),
        ({"normalization": "l2"}, "normalization is l2"),
        ({"distribute": "mirrored", "devices": 2}, "several replicas share a batch"),
    ],
)
def test_what_it_cannot_train_is_said_at_once(changes, why):
    with pytest.raises(UserError, match=f"engine=sparse cannot train this: .*{why}.*tensorflow"):
        Trainer(spec(**changes), DIGITS, execution=Execution("sparse"))
    auto = Trainer(spec(**changes), DIGITS, execution=Execution("auto"))
    assert auto.engines.choose(start(auto, 0.01)[1], 10).engine == "tensorflow"


def test_without_the_extra_the_command_to_install_it_is_said(monkeypatch):
    monkeypatch.setattr(sparse.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"numba is not installed: pip install lth_tf\[sparse\]"):
        Trainer(SPEC, DIGITS, execution=Execution("sparse"))


def test_a_training_begun_with_the_extra_is_not_resumed_without_it(monkeypatch):
    kept = []
    with pytest.raises(Interrupted):
        trained(Execution("sparse"), keep=kept.append, asked=lambda: True)
    monkeypatch.setattr(sparse.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="was begun with the sparse engine: numba is not installed"):
        trained(Execution(), state=kept[0])


def test_compiled_code_is_kept_where_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "cache"))
    kept, other = sparse._folder("1"), sparse._folder("2")
    assert kept == sparse._folder("1") != other and {kept.parent} == {tmp_path / "cache"}
    (tmp_path / "file").touch()
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "file"))
    alone = sparse._folder("1")
    assert alone.is_dir() and tmp_path not in alone.parents and alone != sparse._folder("1")


# --- In an experiment ---


def test_a_workdir_is_computed_with_the_engine_that_it_was_begun_with(tmp_path):
    s = spec(levels=2, train_steps=30, prune_fraction=0.6)
    found = {}
    for engine in ("tensorflow", "sparse"):
        work = tmp_path / engine
        experiments.imp(s, work, DIGITS, execution=Execution(engine))
        assert json.loads((work / "execution.json").read_text())["engine"] == engine
        tickets = sorted(work.rglob("ticket.safetensors"))
        found[engine] = [p.read_bytes() for p in tickets]
        _, about = storage.read_tensors(tickets[-1].with_name("trained.safetensors"))
        assert about.get("decision") == ({"engine": "sparse"} if engine == "sparse" else None)
    assert len(found["sparse"]) == 3 and found["sparse"] == found["tensorflow"]  # masks and all
    more = dataclasses.replace(s, levels=3)
    with pytest.raises(UserError, match="was begun with --engine=sparse; give that, or leave it"):
        experiments.imp(more, tmp_path / "sparse", DIGITS, execution=Execution("tensorflow"))
    experiments.imp(more, tmp_path / "sparse", DIGITS)
    (last,) = (tmp_path / "sparse").rglob("level_03/trained.safetensors")
    assert storage.read_tensors(last)[1]["decision"] == {"engine": "sparse"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "engine, model, said",
    [
        ("tensorflow", "lenet_12_9", None),
        ("sparse", "lenet_12_9", "the sparse engine trains all networks"),
        ("auto", "lenet_12_9", "the sparse engine trains networks of density 0.2 and below"),
        ("auto", "conv2", "TensorFlow trains all networks, the sparse engine cannot: layer "),
    ],
)
def test_the_user_is_told_what_trains(engine, model, said, tmp_path):
    texts = io.StringIO()
    console = rich.console.Console(file=texts, width=200)
    s = spec(model=model, levels=0, train_steps=2)
    experiments.imp(
        s, tmp_path, DIGITS, lambda plan: Progress(console, plan.steps),
        execution=Execution(engine),
    )  # fmt: skip
    assert said in texts.getvalue() if said else "engine" not in texts.getvalue()


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match="unknown engine 'spars'; there are: .*sparse.*"):
        Execution("spars")


def test_where_there_is_a_gpu_auto_is_tensorflow(monkeypatch):
    auto = Trainer(spec(), DIGITS, execution=Execution("auto"))
    mask = start(auto, 0.01)[1]
    assert auto.engines.choose(mask, 10).engine == "sparse"
    monkeypatch.setattr("lth_tf.training.engines._gpu", lambda: True)
    assert auto.engines.choose(mask, 10).engine == "tensorflow"
    assert "on the GPU" in auto.engines.told()
