"""Trial additions, each one entry of a registry and nothing else, done through the command line.

A scorer that looks at data and has an option, a control that draws nothing, an optimizer with a
decay of its own, a network for images of 12 pixels, a recipe.
"""

import contextlib
import sys

import absl.flags
import numpy as np
import pytest
import test_conformance as conformance
from absl.testing import flagsaver
from test_tools import NETWORK, run, tool
from test_training import DIGITS, same, spec, start

from lth_tf import analysis, experiments, flags, masks
from lth_tf.analysis import comparison
from lth_tf.analysis.summary import read_csv
from lth_tf.compat import keras, tf
from lth_tf.datasets import DATASETS, Dataset, scaling
from lth_tf.experiments.branches import BRANCHES
from lth_tf.models import MODELS, register
from lth_tf.models.parts import initialisers
from lth_tf.recipes import RECIPES, Levels, Recipe
from lth_tf.scorers import SCORERS
from lth_tf.scorers.losses import cross_entropy
from lth_tf.scorers.network import Network
from lth_tf.spec import owners
from lth_tf.tasks import TASKS, Task
from lth_tf.tickets import load_ticket
from lth_tf.training import OPTIMIZERS, Trainer

TICKET = "replicate_00/level_01/ticket.safetensors"


@contextlib.contextmanager
def entered(registry, name):
    """Within, what is entered is there."""
    try:
        yield
    finally:
        registry.remove(name)


# A scorer.


def fisher(model, kernels, batches, *, damping: float = 1e-3, loss=cross_entropy):
    """Returns w^2 * g^2 / (g^2 + damping).

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, labels).
      damping: added to the squared gradient,
        above 0.
      loss: (labels, outputs) -> losses [n].
    """
    gradients = Network.of(model, batch_norm="eval").gradient(kernels, batches, loss)
    return {n: np.asarray(kernels[n]) ** 2 * g**2 / (g**2 + damping) for n, g in gradients.items()}


@pytest.fixture
def with_fisher():
    with entered(SCORERS, "fisher"):
        SCORERS.register("fisher")(fisher)
        yield


PICK = [*NETWORK, "--scorer=fisher", "--density=0.2", "--samples_per_class=3", "--score_only"]


def test_a_scorer_with_an_option_is_one_entry(with_fisher, monkeypatch, capsys, tmp_path):
    for work, words in (("a", []), ("b", ["1000"]), ("c", ["0.001"])):
        options = [f"--fisher_damping={word}" for word in words]
        words = [*PICK, *options, f"--workdir={tmp_path / work}"]
        code, _, err = run(monkeypatch, capsys, *words, name="one_shot")
        assert code == 0, err
    own, damped, default = (load_ticket(tmp_path / work / TICKET) for work in "abc")
    assert own.origin["scoring"] == {"rounds": 1, "samples": 30, "batch_size": 30}
    assert damped.spec.scorer_options == (("damping", 1000.0),) and not default.spec.scorer_options
    assert own.spec.digest() == default.spec.digest() != damped.spec.digest()
    assert same(own.mask, default.mask) and not same(own.mask, damped.mask)
    assert comparison.method_of(damped.spec) == "fisher (samples_per_class 3, damping 1000.0)"
    assert comparison.method_of(own.spec) == "fisher (samples_per_class 3)"


def test_its_option_is_checked(with_fisher, monkeypatch, capsys, tmp_path):
    work = f"--workdir={tmp_path / 'run'}"
    assert run(monkeypatch, capsys, *PICK, work, name="one_shot")[0] == 0
    for words, message in (
        (["--fisher_damping=1"], "belongs to another experiment: scorer_options"),
        (["--scorer=snip", "--fisher_damping=1"], "fisher_damping 1.0 needs --scorer=fisher"),
        (["--fisher_damping=much"], "fisher_damping"),
        (["--temperature=1"], "temperature 1 needs --scorer=grasp"),
    ):
        code, out, err = run(monkeypatch, capsys, *PICK, *words, work, name="one_shot")
        assert code == 1 and message in err and "Traceback" not in err, err
    code, out, err = run(
        monkeypatch, capsys, *PICK, "--controls=absolute", "--plan", name="one_shot"
    )
    assert code == 1 and "'absolute' changes nothing for scorer fisher" in err


def test_its_flag_says_what_the_scorer_says(with_fisher):
    with tool("one_shot"), flagsaver.flagsaver():
        flag = absl.flags.FLAGS["fisher_damping"]
        assert flag.help == (
            "For --scorer=fisher: added to the squared gradient, above 0. (default: 0.001)"
        )
        assert flag.default is None and flag.flag_type() == "float"
    assert flags.recipe_of(["--fisher_damping=1"]) == "one_shot"


def test_it_keeps_the_promises_of_scorers(with_fisher):
    conformance.test_scorer_repeats_is_finite_and_takes_every_kernel("fisher")
    for scope in ("global", "erk"):
        conformance.test_scorer_and_scope("fisher", scope, 0.2)
        conformance.test_one_shot_mask_is_exact_and_leaves_the_model_as_it_is("fisher", scope)


# A control.


def first(ticket, start, dataset):
    """As many weights of every kernel, the first ones."""
    mask = {
        name: (np.arange(m.size) < m.sum()).reshape(m.shape).astype(np.uint8)
        for name, m in ticket.mask.items()
    }
    return type(ticket)(
        mask, masks.apply(mask, start), ticket.level, ticket.rewind_step, ticket.origin, ticket.spec
    )


def test_a_control_that_draws_nothing_is_one_entry(monkeypatch, capsys, tmp_path):
    with entered(BRANCHES, "first"):
        BRANCHES.register("first")(first)
        words = [*NETWORK, "--levels=1", "--prune_fraction=0.6", "--controls=first"]
        words.append(f"--workdir={tmp_path}")
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == 0, err
        assert {row["arm"] for row in analysis.read_summary(tmp_path)} == {"ticket", "first"}
        control = load_ticket(tmp_path / "replicate_00/level_01/branch_first/ticket.safetensors")
        assert masks.kept(control.mask) == masks.kept(load_ticket(tmp_path / TICKET).mask)
        assert control.mask["fc1/kernel"].reshape(-1)[:100].all()
        lab = experiments.Laboratory(control.spec, tmp_path / "lab", DIGITS)
        own = load_ticket(tmp_path / TICKET), lab.dense(0).weights, DIGITS
        # Which sees, too, that it does not follow the seed, as its entry says.
        conformance.test_branch_changes_something_repeats_and_stays_valid(
            "imp", "first", {"imp": own}
        )


# An optimizer.


def test_an_optimizer_that_decays_by_itself_is_one_entry(monkeypatch, capsys, tmp_path):
    def heavy(rate, s):
        return keras.optimizers.SGD(
            rate, momentum=s.momentum, weight_decay=s.weight_decay, jit_compile=False
        )

    decayed = {"precision": "float64", "weight_decay": 0.5, "learning_rate": 0.01}
    found = {}
    for decoupled in (True, False):
        with entered(OPTIMIZERS, "heavy"):
            OPTIMIZERS.register("heavy", decoupled=decoupled)(heavy)
            words = [*NETWORK, "--levels=0", "--optimizer=heavy", "--weight_decay=0.5"]
            work = tmp_path / str(decoupled)
            code, _, err = run(monkeypatch, capsys, *words, f"--workdir={work}")
            assert code == 0, err
            s = spec(optimizer="heavy", train_steps=6, eval_every=6, **decayed)
            weights, mask = start(s)
            found[decoupled] = Trainer(s, DIGITS).train(weights, mask, 0, 6).weights
    s = spec(optimizer="momentum", train_steps=6, eval_every=6, **{**decayed, "weight_decay": 0.0})
    without = Trainer(s, DIGITS).train(*start(s), 0, 6).weights
    bias = "fc1/bias"  # starts at 0, where a decay changes next to nothing in a few steps
    assert np.abs(found[True][bias] - without[bias]).max() < 1e-3
    shrunk = {k: np.abs(v["fc1/kernel"]).sum() for k, v in found.items()}
    plain = np.abs(without["fc1/kernel"]).sum()
    # 6 steps of 1 - 0.01 * 0.5; in the gradient, too, momentum multiplies it.
    assert shrunk[True] / plain == pytest.approx(0.995**6, rel=2e-3)
    assert shrunk[False] < 0.97 * shrunk[True]


# A network.


def twelve(input_shape, classes, seed, *, init="glorot_normal"):
    """A convolution of 12x12."""
    inits = initialisers(init, seed)
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Conv2D(4, 12, kernel_initializer=next(inits), name="conv"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"),
        ]
    )


def pixels(data_dir=None):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 12, 12, 1), np.uint8)
    labels = (np.arange(300) % 10).astype(np.int32)
    return Dataset("pixels", images, labels, images[:60], labels[:60], 10, (0.5,), (0.3,))


def test_a_network_for_images_of_a_size_is_one_entry(monkeypatch, capsys, tmp_path, request):
    with entered(MODELS, "twelve"), entered(DATASETS, "pixels"):
        register("twelve", smallest=12)(twelve)
        DATASETS.register("pixels")(pixels)
        words = [*NETWORK, "--model=twelve", "--levels=1", f"--workdir={tmp_path}"]
        code, _, err = run(monkeypatch, capsys, *words)
        message = "model 'twelve' needs images [height, width, channels] of at least 12x12 pixels"
        assert code == 1 and message in err
        code, _, err = run(monkeypatch, capsys, *words, "--dataset=pixels")
        assert code == 0, err
        conformance.test_model_wraps_trains_and_repeats("twelve", request)


# A recipe.


def half(lab, replicate):
    folder = lab.folder(replicate)
    dense = lab.ticket(folder / "level_00", lab.dense, replicate)
    trained = lab.train(folder / "level_00", dense)
    ticket = lab.ticket(folder / "level_01", lab.prune, dense, trained, dense.weights, 1)
    lab.train(folder / "level_01", ticket)
    lab.branches(folder / "level_01", ticket, dense.weights)


HALF = Recipe(
    tool="lth-half",
    module="half",
    help="trained weights, once",
    fields=("prune_fraction",),
    levels=lambda spec, shapes, kinds: Levels(
        [dict.fromkeys(shapes, 1.0), dict.fromkeys(shapes, 1 - spec.prune_fraction)]
    ),
    steps=half,
    asked=lambda spec: [1 - spec.prune_fraction],
    target="prune_fraction",
    method=lambda spec: "half",
)


def test_a_recipe_is_one_entry(monkeypatch, capsys, tmp_path):
    def do(*words):
        monkeypatch.setattr(sys, "argv", ["lth-half", *words])
        with tool("experiment") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            module.experiment("half")()
        return end.value.code or 0, *capsys.readouterr()

    with entered(RECIPES, "half"):
        RECIPES.register("half")(HALF)
        words = [*NETWORK, "--prune_fraction=0.7", "--controls=reinit"]
        code, out, err = do(*words, "--plan")
        assert code == 0 and "3 trainings: 1 replicate(s) of 2 level(s) and 1 control" in out, err
        code, out, err = do(*words, f"--workdir={tmp_path}/half")
        assert code == 0, err
        own = experiments.read_spec(tmp_path / "half")
        ticket = load_ticket(tmp_path / "half" / TICKET)
        assert own.recipe == "half" and {"prune_fraction"} == {
            name for name in own.identity() if "half" in owners(name)
        }
        assert ticket.density == pytest.approx(0.3, abs=0.01)
        code, out, err = do(*words, f"--workdir={tmp_path}/half")  # everything is there
        assert code == 0 and len(analysis.read_summary(tmp_path / "half")) == 3
        code, out, err = do(*words, "--levels=3")
        assert code == 1 and "Unknown command line flag 'levels'" in out + err
        imp = [*NETWORK, "--prune_fraction=0.7", "--levels=1", f"--workdir={tmp_path}/imp"]
        assert run(monkeypatch, capsys, *imp)[0] == 0
        found = comparison.compare(
            [(tmp_path / w, experiments.read_spec(tmp_path / w)) for w in ("half", "imp")]
        )
        assert [name.split()[0] for name in found.methods] == ["half", "imp"]
        assert len(found.densities) == 1


# A task, on inputs that are no images.


def waves(data_dir=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)).astype(np.float32) * 3 + 1
    y = np.sin(x[:, 0]).astype(np.float32)
    mean, std = (tuple(map(float, f(x[:300], axis=0))) for f in (np.mean, np.std))
    return Dataset("waves", x[:300], y[:300], x[300:], y[300:], 1, mean, std, task="waves")


def test_a_task_is_one_entry(monkeypatch, capsys, tmp_path):
    task = Task(
        losses=lambda y, outputs: tf.square(y - tf.cast(outputs[:, 0], y.dtype)),
        hits=lambda y, outputs: tf.abs(y - tf.cast(outputs[:, 0], y.dtype)),
        metric="error", higher=False, margin=0.01, percent=False,
    )  # fmt: skip
    with entered(TASKS, "waves"), entered(DATASETS, "waves"):
        TASKS.register("waves")(task)
        DATASETS.register("waves")(waves)
        words = [*NETWORK, "--dataset=waves", "--train_steps=200", "--eval_every=50", "--levels=1"]
        words += ["--controls=reinit", "--prune_fraction=0.5", f"--workdir={tmp_path}/run"]
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == 0, err
        assert "error" in out and "accuracy" not in out
        rows = analysis.read_summary(tmp_path / "run")
        assert set(rows[0]) >= {"test_error_early", "test_error_end"}
        (dense,) = (row for row in rows if row["level"] == 0)
        start = read_csv(tmp_path / "run/replicate_00/level_00/metrics.csv")[0]
        assert 0 < dense["test_error_end"] < 0.8 * start["test_error"]
        # Less is better: half of the dense network's error wins, twice of it does not.
        for factor, wins in ((0.5, True), (2.0, False)):
            made = [
                {**row, "test_error_early": 0.4 * f, "test_error_end": 0.4 * f}
                for row in rows
                for f in [{("ticket", 1): factor, ("reinit", 1): 4.0}.get(
                    (row["arm"], row["level"]), 1.0
                )]
            ]  # fmt: skip
            assert bool(analysis.winning(made).end) == wins


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_inputs_may_be_floats_or_whole_numbers(precision):
    x, own = tf.constant(waves().train_inputs), spec(precision=precision)
    found = scaling.scaled(x, waves(), own)
    assert found.dtype == precision
    np.testing.assert_allclose(np.mean(found, 0), np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(np.std(found, 0), np.ones(6), atol=1e-5)
    plain = scaling.scaled(x, waves(), spec(precision=precision, normalization="unit"))
    np.testing.assert_array_equal(plain, np.asarray(x, precision))
    tokens = tf.constant([[1, 2], [3, 4]])
    assert scaling.scaled(tokens, waves(), own) is tokens


def words_in(input_shape, classes, seed, *, init="glorot_normal"):
    inits = initialisers(init, seed)
    return keras.Sequential(
        [
            keras.Input(input_shape, dtype="int32"),
            keras.layers.Embedding(7, 4, name="embedding"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"),
        ]
    )


def test_whole_numbers_train(monkeypatch, capsys, tmp_path):
    def tokens(data_dir=None):
        x = np.random.default_rng(0).integers(0, 7, (300, 5), np.int32)
        y = (x[:, 0] % 3).astype(np.int32)
        return Dataset("tokens", x[:240], y[:240], x[240:], y[240:], 3, (0.0,), (1.0,))

    with entered(MODELS, "words"), entered(DATASETS, "tokens"):
        register("words")(words_in)
        DATASETS.register("tokens")(tokens)
        words = [*NETWORK, "--dataset=tokens", "--model=words", "--levels=1", "--train_steps=300"]
        words += ["--learning_rate=0.05", f"--workdir={tmp_path}"]
        assert run(monkeypatch, capsys, *words)[0] == 0
        assert analysis.read_summary(tmp_path)[0]["test_accuracy_end"] > 0.9
