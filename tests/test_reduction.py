"""Packed sums: the same numbers, fewer bytes."""

import dataclasses
import types

import numpy as np
import pytest
from test_training import DIGITS, TWO, same, spec, start

from lth_tf import distribute
from lth_tf.training import Trainer
from lth_tf.training.reduction import WORTH, Reduction


def trained(communication, density, **changes):
    s = spec(**TWO, communication=communication, **changes)
    weights, mask = start(s, density)
    trainer = Trainer(s, DIGITS)
    return trainer, mask, trainer.train(weights, mask, 0, 40)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("changes", [{}, {"precision": "mixed_bfloat16", "optimizer": "momentum"}])
def test_packed_sums_are_the_same_bits(changes):
    _, _, plain = trained("plain", 0.2, **changes)
    trainer, mask, packed = trained("packed", 0.2, **changes)
    assert trainer.reduction.entries(mask) is not None
    assert same(plain.weights, packed.weights)
    columns = ("loss", "validation_loss", "test_loss")
    for a, b in zip(plain.rows, packed.rows, strict=True):
        assert [a[c] for c in columns] == [b[c] for c in columns]


@pytest.mark.slow
def test_several_masks_one_after_the_other_in_few_graphs():
    trainer = Trainer(spec(**TWO, communication="packed"), DIGITS)
    for density in (0.7, 0.5, 0.3, 0.2, 0.1, 0.05):
        weights, mask = start(trainer.spec, density)
        found = trainer.train(weights, mask, 0, 20).weights
        assert all(not found[name][m == 0].any() for name, m in mask.items())
    assert trainer.engine.steps.experimental_get_tracing_count() == 2


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05])
def test_bytes_are_those_of_what_is_kept(density):
    s = spec(**TWO, communication="packed")
    trainer = Trainer(s, DIGITS)
    weights, mask = start(s, density)
    kept = sum(int(m.sum()) for m in mask.values())
    others = sum(w.size for name, w in weights.items() if name not in mask)
    least = 4 * (kept + others)
    assert least <= trainer.reduction.bytes(mask) <= 1.1 * least
    one, two = trainer.strategy.experimental_local_results(trainer.reduction.entries(mask))
    assert 4 * len(one) == trainer.reduction.bytes(mask) and np.array_equal(one, two)


def test_bytes_without_packing_are_all_and_of_one_replica_none():
    s = spec()
    weights, mask = start(s, 0.1)
    whole = 4 * (sum(w.size for w in weights.values()) + 1)
    assert Trainer(dataclasses.replace(s, **TWO), DIGITS).reduction.bytes(mask) == whole
    one = Trainer(dataclasses.replace(s, communication="packed"), DIGITS)
    assert one.reduction.bytes(mask) == 0 and one.reduction.entries(mask) is None


@pytest.mark.parametrize(
    "communication, replicas, workers, density, packs",
    [
        ("auto", 2, 2, WORTH / 2, True),
        ("auto", 2, 2, WORTH * 1.5, False),
        ("auto", 8, 1, WORTH / 2, False),
        ("packed", 8, 1, WORTH * 1.5, True),
        ("packed", 1, 1, WORTH / 2, False),
        ("packed", 2, 1, 1.0, False),
        ("plain", 2, 2, WORTH / 2, False),
    ],
)
def test_when_it_packs(communication, replicas, workers, density, packs, monkeypatch):
    trainer = Trainer(spec(), DIGITS)
    mask = start(spec(), min(density, 0.9))[1]
    if density == 1:
        mask = {name: np.ones_like(m) for name, m in mask.items()}
    monkeypatch.setattr(distribute, "index_and_count", lambda _: (0, workers))
    strategy = types.SimpleNamespace(num_replicas_in_sync=replicas)
    reduction = Reduction(trainer.model, strategy, communication)
    entries = sum(int(m.sum()) if packs else m.size for m in mask.values())
    others = sum(v.shape[0] for v in trainer.model.trainable_variables if v.shape.rank == 1)
    assert reduction.bytes(mask) == (4 * (entries + others + 1) if replicas > 1 else 0)
