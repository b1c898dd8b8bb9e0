"""States of a training: whole or told to be damaged, and enough to go on bit for bit."""

import dataclasses
import os
import signal

import numpy as np
import pytest
from test_training import DIGITS, TWO, same, spec, start

from lth_tf.training import Interrupted, State, Trainer, checkpoints


def state(step, value=1.0):
    rows = ({"step": 0, "loss": None, "validation_loss": 0.1, "seconds": 1 / 3},)
    arrays = {"weights/a": np.full((3, 2), value, np.float32), "optimizer/0000": np.int64(step)}
    return State(step, step - 1, 1 / 3, rows, 2 / 3, arrays)


def test_the_last_two_are_kept_and_come_back_as_they_were(tmp_path):
    for step in (5, 10, 900):
        checkpoints.save(tmp_path, state(step, step))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint_000000010.safetensors", "checkpoint_000000900.safetensors"
    ]  # fmt: skip
    found, wanted = checkpoints.latest(tmp_path, pytest.fail), state(900, 900)
    assert same(found.variables, wanted.variables)
    fields = [f.name for f in dataclasses.fields(State) if f.name != "variables"]
    assert [getattr(found, n) for n in fields] == [getattr(wanted, n) for n in fields]
    checkpoints.clear(tmp_path)
    assert checkpoints.latest(tmp_path, pytest.fail) is None and not list(tmp_path.iterdir())


def damage(path, how):
    whole = bytearray(path.read_bytes())
    if how == "bit":
        whole[-3] ^= 4
    path.write_bytes(whole[:-9] if how == "cut" else b"" if how == "empty" else whole)


@pytest.mark.parametrize("how", ["bit", "cut", "empty"])
def test_a_damaged_one_is_said_and_the_one_before_taken(tmp_path, how):
    for step in (5, 10):
        checkpoints.save(tmp_path, state(step))
    damage(tmp_path / "checkpoint_000000010.safetensors", how)
    said = []
    assert checkpoints.latest(tmp_path, said.append).step == 5
    assert len(said) == 1 and "checkpoint_000000010" in said[0] and "the one before" in said[0]
    damage(tmp_path / "checkpoint_000000005.safetensors", how)
    assert checkpoints.latest(tmp_path, said.append) is None and len(said) == 2
    assert checkpoints.latest(tmp_path, pytest.fail) is None


class Asked:
    """Says, like a signal that comes then, that a training is to stop after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    def __call__(self):
        self.looks -= 1
        return self.looks < 0


KINDS = {
    "adam": {},
    "schedule": {
        "optimizer": "nesterov", "learning_rate": 0.05, "lr_schedule": "cosine",
        "weight_decay": 1e-3,
    },
    "float16": {"precision": "mixed_float16"},
    "dropout": {"model": "conv2_dropout", "train_steps": 20, "eval_every": 8, "optimizer": "sgd"},
    "two replicas": {**TWO, "communication": "packed"},
    "each replica's own statistics": {
        **TWO, "model": "thin_norm", "augmentation": "flip_crop", "optimizer": "momentum",
    },
}  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_by_a_new_trainer_is_as_never_stopped(tmp_path, thin_norm, kind):
    s = spec(checkpoint_every=7, **KINDS[kind])
    weights, mask = start(s)
    arguments = weights, mask, 0, s.train_steps
    capture = s.train_steps // 2
    trainers = Trainer(s, DIGITS), Trainer(s, DIGITS)
    calm = trainers[0].train(*arguments, capture=capture)

    captured, state, stops = [], None, 0
    while stops < 10:
        # Another one than was stopped, so that what that has in memory is of no use.
        trainer = trainers[stops % 2]
        trainer._pace = 3  # looks at whether to stop between evaluations and checkpoints, too
        try:
            end = trainer.train(
                *arguments, capture=capture, captured=captured.append, state=state,
                keep=lambda state: checkpoints.save(tmp_path, state), asked=Asked(2),
            )  # fmt: skip
            break
        except Interrupted as interrupted:
            stops += 1
            before, state = state, checkpoints.latest(tmp_path, pytest.fail)
            assert f"at step {state.step} of {s.train_steps}" in str(interrupted)
            assert not before or state.step > before.step
    assert stops >= 2 and len(captured) == 1
    assert same(calm.weights, end.weights) and same(calm.captured, captured[0])
    for a, b in zip(calm.rows, end.rows, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("capture", [0, 5, 20])
def test_captured_weights_are_told_once_whatever_the_step(capture):
    s, told = spec(), []
    weights, mask = start(s)
    end = Trainer(s, DIGITS).train(weights, mask, 0, 20, capture=capture, captured=told.append)
    assert len(told) == 1 and same(told[0], end.captured)
    assert same(told[0], weights) == (capture == 0)


def test_checkpoints_change_nothing():
    runs = []
    for every in (0, 1, 7):
        kept = []
        s = spec(checkpoint_every=every)
        weights, mask = start(s)
        trainer = Trainer(s, DIGITS)
        trainer._pace = every or 5
        runs.append(trainer.train(weights, mask, 0, 60, keep=kept.append))
        assert [state.step for state in kept] == ([*range(every, 60, every)] if every else [])
    for other in runs[1:]:
        assert same(runs[0].weights, other.weights)
        assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in other.rows]


def test_sigterm_is_noted_where_there_is_a_state_to_keep_and_ends_at_once_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoints.terminations() as asked:
        with asked.patiently():
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before and Interrupted.code == 143
