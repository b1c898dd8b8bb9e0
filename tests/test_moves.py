"""A mask that moves while training: what depends on it follows, wherever it is gone on with."""

import dataclasses

import numpy as np
import pytest
from test_training import DIGITS, TWO, same, spec, start

from lth_tf import distribute, masks, pruning
from lth_tf.compat import keras
from lth_tf.training import Interrupted, Trainer

STEPS = 60  # evaluations are at 20, 40, 60
MOVES = 10, 33


class Moves(keras.callbacks.Callback):
    """At MOVES as many other weights of each kernel; which ones is a function of the step."""

    def __init__(self):
        super().__init__()
        self.seen, self.put = [], []

    def next_boundary(self, step):
        return min((s for s in MOVES if s > step), default=None)

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["step"])
        if logs["step"] in MOVES:
            rng = np.random.default_rng(logs["step"])
            self.put.append(masks.shuffle(pruning.get_mask(self.model), rng))
            pruning.set_mask(self.model, self.put[-1])


def train(s, **options):
    weights, mask = start(s, 0.2)
    trainer, moves = Trainer(s, DIGITS), Moves()
    return trainer, moves, trainer.train(weights, mask, 0, STEPS, callbacks=[moves], **options)


def test_a_callback_ends_blocks_where_it_needs_to():
    _, moves, trained = train(spec(train_steps=STEPS))
    assert moves.seen == [10, 20, 33, 40, 60] and len(moves.put) == 2
    assert [r["step"] for r in trained.rows] == [0, 20, 40, 60]
    assert same(trained.mask, moves.put[-1])
    assert all(not trained.weights[n][m == 0].any() for n, m in trained.mask.items())
    assert all(trained.weights[n][m != 0].any() for n, m in trained.mask.items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_packed_sums_follow_and_replicas_stay_alike(optimizer):
    s = spec(train_steps=STEPS, optimizer=optimizer, **TWO)
    _, _, plain = train(dataclasses.replace(s, communication="plain"))
    trainer, _, packed = train(dataclasses.replace(s, communication="packed"))
    assert same(plain.weights, packed.weights) and same(plain.mask, packed.mask)
    for variable in [*trainer.model.variables, *trainer.optimizer.variables]:
        if hasattr(variable, "values") and not distribute.is_own(variable):
            one, two = (value.numpy() for value in variable.values)
            assert np.array_equal(one, two), variable.name


@pytest.fixture(
    scope="module", params=[{}, {**TWO, "communication": "packed"}], ids=["one", "two"]
)
def undisturbed(request):
    """A trainer, and what it ends with where nothing happens."""
    trainer, _, calm = train(spec(train_steps=STEPS, checkpoint_every=5, **request.param))
    return trainer, calm


@pytest.mark.sampled(1)
@pytest.mark.parametrize("at", [10, 20, 35])
def test_it_is_gone_on_with_as_if_nothing_had_happened(at, undisturbed):
    trainer, calm = undisturbed
    s, states = trainer.spec, []
    weights, mask = start(s, 0.2)

    def keep(state):
        states.append(state)
        if state.step == at:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        trainer.train(weights, mask, 0, STEPS, callbacks=[Moves()], keep=keep)
    assert states[-1].step == at
    moved = not same(states[-1].mask, mask)
    assert moved == (at > MOVES[0] or at == MOVES[0])
    _, moves, again = train(s, state=states[-1])
    assert moves.seen[0] > at
    assert same(again.weights, calm.weights) and same(again.mask, calm.mask)
    losses = [[r[c] for r in t.rows for c in ("loss", "validation_loss")] for t in (again, calm)]
    assert losses[0] == losses[1]
