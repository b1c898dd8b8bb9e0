"""schedules: the densities of the papers' levels, targets hit, learning rates step by step."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from lth_tf.errors import UserError
from lth_tf.schedules import (
    LR_SCHEDULES,
    ROUND_SCHEDULES,
    learning_rates,
    level_densities,
    round_densities,
)
from lth_tf.scopes import count
from lth_tf.spec import Spec

LENET = {"fc1/kernel": 784 * 300, "fc2/kernel": 300 * 100, "output/kernel": 100 * 10}
RATES = {"fc1/kernel": 0.2, "fc2/kernel": 0.2, "output/kernel": 0.1}


def whole(densities, sizes):
    return math.fsum(densities[n] * s for n, s in sizes.items()) / sum(sizes.values())


def case(rng):
    sizes = {f"k{i}": int(rng.integers(1, 10**5)) for i in range(rng.integers(1, 6))}
    rates = {name: float(rng.choice([0, 0.1, 0.2, 0.5, rng.uniform(0.01, 0.9)])) for name in sizes}
    rates["k0"] = rates["k0"] or 0.2
    protected = sum(n for name, n in sizes.items() if rates[name] == 0) / sum(sizes.values())
    return sizes, rates, protected


# Levels.


def test_lenet_after_20_levels():
    levels = level_densities(LENET, RATES, levels=20)
    assert len(levels) == 21 and set(levels[0].values()) == {1.0}
    for level, densities in enumerate(levels):
        for name, rate in RATES.items():
            exact = (1 - Fraction(str(rate))) ** level
            assert densities[name] == pytest.approx(float(exact), rel=1e-14)
            assert count(densities[name], LENET[name]) == round(exact * LENET[name])
    assert {n: count(levels[20][n], s) for n, s in LENET.items()} == {
        "fc1/kernel": 2712, "fc2/kernel": 346, "output/kernel": 122,
    }  # fmt: skip


def test_lenet_densities_of_the_paper():
    """Frankle and Carbin 2019, figure 3: Pm = 100, 51.3, 21.1, 7.0, 3.6 and 1.9 %."""
    levels = level_densities(LENET, RATES, levels=18)
    shown = [100 * whole(levels[n], LENET) for n in (0, 3, 7, 12, 15, 18)]
    assert np.round(shown, 1).tolist() == [100.0, 51.3, 21.1, 7.0, 3.6, 1.9]


def test_levels_zero_and_one_shot():
    assert level_densities(LENET, RATES, levels=0) == [dict.fromkeys(LENET, 1.0)]
    assert level_densities(LENET, RATES, levels=0, one_shot=True) == [dict.fromkeys(LENET, 1.0)]
    every = level_densities(LENET, RATES, levels=7)
    assert level_densities(LENET, RATES, levels=7, one_shot=True) == [every[0], every[-1]]


def test_protected_kernels_stay_whole():
    levels = level_densities({"a": 10, "b": 10}, {"a": 0.2, "b": 0.0}, levels=30)
    assert all(densities["b"] == 1.0 for densities in levels)
    assert levels[30]["a"] == pytest.approx(0.8**30)


# Targets.


def test_target_is_hit_within_one_weight_per_kernel():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, rates, protected = case(rng)
        target = protected + (1 - protected) * rng.uniform(0.001, 0.999)
        levels = level_densities(sizes, rates, target_density=target)
        n = sum(sizes.values())
        assert whole(levels[-1], sizes) == pytest.approx(target, rel=1e-9)
        kept = sum(count(levels[-1][name], s) for name, s in sizes.items())
        assert abs(kept - target * n) <= len(sizes) / 2 + 1e-6
        # All levels before it are whole ones, and the one after the last but one overshoots.
        for level, densities in enumerate(levels[:-1]):
            assert densities == {name: (1 - rates[name]) ** level for name in sizes}
            assert whole(densities, sizes) > target
        overshot = {name: (1 - rates[name]) ** (len(levels) - 1) for name in sizes}
        assert whole(overshot, sizes) <= target + 1e-9
        once = level_densities(sizes, rates, target_density=target, one_shot=True)
        assert once == [levels[0], levels[-1]]


def test_target_that_is_a_whole_level_takes_no_level_more():
    for p in (0.1, 0.15, 0.2, 0.25, 0.5):
        for levels in range(1, 31):
            found = level_densities({"a": 10**6}, {"a": p}, target_density=(1 - p) ** levels)
            assert len(found) == levels + 1
            assert found == level_densities({"a": 10**6}, {"a": p}, levels=levels)


@pytest.mark.parametrize("target", [0.5, 0.499, 0.1, 1.0, 1.5, 0.0, -1.0, float("nan")])
def test_unreachable_target(target):
    with pytest.raises(UserError, match="cannot be reached.*below 1 and above 0.5"):
        level_densities({"a": 50, "b": 50}, {"a": 0.2, "b": 0.0}, target_density=target)


def test_nothing_to_prune_reaches_no_target():
    with pytest.raises(UserError, match="cannot be reached"):
        level_densities({"a": 50}, {"a": 0.0}, target_density=0.9)


def test_one_end_and_only_one():
    for ends in ({}, {"levels": 3, "target_density": 0.5}):
        with pytest.raises(UserError, match="either levels or target_density"):
            level_densities({"a": 50}, {"a": 0.2}, **ends)


# Rounds.


@pytest.mark.parametrize("schedule", ROUND_SCHEDULES)
@pytest.mark.parametrize("density", [1e-4, 0.05, 1 / 3, 0.5, 0.999, 1.0])
def test_rounds_follow_their_formula_and_end_at_the_density(schedule, density):
    for rounds in (1, 2, 3, 7, 100):
        found = round_densities(density, rounds, schedule)
        assert len(found) == rounds
        assert found[-1] == density  # to the last bit, or a weight more or less is kept
        exact = [
            density ** (r / rounds) if schedule == "exponential" else 1 - (1 - density) * r / rounds
            for r in range(1, rounds + 1)
        ]
        np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)
        assert (np.diff(found) < 0).all() or density == 1
        assert 0 < min(found) and max(found) <= 1


def test_the_default_of_rounds_is_the_exponential_schedule_of_synflow():
    """Tanaka et al. 2020, algorithm 1: rho^-(k / n) for compression rho."""
    found = round_densities(0.1, 100)
    np.testing.assert_allclose(found, [10 ** -(k / 100) for k in range(1, 101)], rtol=1e-12)
    assert found == round_densities(0.1, 100, "exponential")
    assert found != round_densities(0.1, 100, "linear")


@pytest.mark.parametrize("schedule", ROUND_SCHEDULES)
def test_rounds_of_each_kernel(schedule):
    density = {"b": 0.1, "a": 1.0, "c": 0.4}
    found = round_densities(density, 5, schedule)
    assert found[-1] == density and [list(d) for d in found] == [["b", "a", "c"]] * 5
    for name, d in density.items():
        assert [each[name] for each in found] == round_densities(d, 5, schedule)
    assert all(each["a"] == 1.0 for each in found)  # protected in every round


@pytest.mark.parametrize("rounds", [0, -1])
def test_less_than_one_round(rounds):
    with pytest.raises(UserError, match=f"rounds {rounds} is out of range; .*at least 1"):
        round_densities(0.1, rounds)


def test_unknown_round_schedule():
    with pytest.raises(UserError, match="unknown round_schedule 'cosine'; there are: exponential"):
        round_densities(0.1, 3, "cosine")


def test_round_schedules_are_those_that_a_spec_can_name():
    field = next(f for f in dataclasses.fields(Spec) if f.name == "round_schedule")
    assert tuple(field.metadata["choices"]) == tuple(ROUND_SCHEDULES)


# Learning rates.


def test_constant():
    assert learning_rates("constant", 1.2e-3, 4).tolist() == [1.2e-3] * 4


def test_steps():
    """ResNet-18 of Frankle and Carbin 2019: 0.1, 0.01 from step 20,000, 0.001 from 25,000."""
    rates = learning_rates("steps", 0.1, 30_000, drops=(20_000, 25_000))
    assert rates.shape == (30_000,) and rates.dtype == np.float64
    assert (rates[:20_000] == 0.1).all()
    np.testing.assert_allclose(rates[20_000:25_000], 0.01, rtol=1e-14)
    np.testing.assert_allclose(rates[25_000:], 0.001, rtol=1e-14)


def test_steps_in_any_order_with_any_factor():
    rates = learning_rates("steps", 1.0, 6, drops=[4, 2], factor=0.5)
    assert rates.tolist() == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert learning_rates("steps", 1.0, 3, drops=[0], factor=0.5).tolist() == [0.5] * 3


def test_cosine():
    rates = learning_rates("cosine", 2.0, 100)
    assert rates[0] == 2.0 and rates[50] == pytest.approx(1.0)
    assert rates[25] == pytest.approx(1 + math.sqrt(0.5))
    assert 0 < rates[99] < 1e-3 and (np.diff(rates) < 0).all()


@pytest.mark.parametrize("name", list(LR_SCHEDULES))
def test_warm_up(name):
    options = {"drops": [60, 80], "factor": 0.1}
    plain = learning_rates(name, 0.3, 100, **options)
    warm = learning_rates(name, 0.3, 100, **options, warmup=10)
    np.testing.assert_allclose(warm[:10], plain[:10] * np.arange(1, 11) / 10, rtol=1e-14)
    assert (warm[9:] == plain[9:]).all()


def test_unknown_schedule():
    with pytest.raises(UserError, match="unknown learning-rate schedule 'cosin'.*'cosine'"):
        learning_rates("cosin", 0.1, 10)
