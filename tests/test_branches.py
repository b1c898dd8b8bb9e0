"""What a control changes and what it does not."""

import dataclasses
import functools

import numpy as np
import pytest

from lth_tf import datasets, masks
from lth_tf.errors import UserError
from lth_tf.experiments import picking
from lth_tf.experiments.branches import BRANCHES
from lth_tf.recipes import one_shot
from lth_tf.scopes import SCOPES, count
from lth_tf.scorers import SCORERS, looks_at_data, score
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import initial_weights, plain_model

DIGITS = datasets.load("digits")
SPEC = Spec(dataset="digits", model="lenet_20_10", train_steps=40, rewind_step=10)
ONE_SHOT = Spec(
    recipe="one_shot",
    dataset="digits",
    model="lenet_20_10",
    validation_size=100,
    scope="global",
    density=(0.5, 0.3),
    samples_per_class=2,
)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def dense(spec, seed=5):
    weights, kernels = initial_weights(spec, (8, 8, 1), 10, seed)
    origin = {"seed": seed, "input_shape": [8, 8, 1], "classes": 10, "arm": "ticket"}
    full = masks.ones({n: weights[n].shape for n in kernels})
    return Ticket(full, weights, 0, spec.retrain_span[0], origin, spec)


def ticket(spec=SPEC, level=2, seed=5):
    """A ticket whose mask came from anywhere."""
    start = dense(spec, seed)
    rng = np.random.default_rng(0)
    mask = {n: (rng.random(m.shape) < 0.4).astype(np.uint8) for n, m in start.mask.items()}
    cut = masks.apply(mask, start.weights)
    return dataclasses.replace(start, mask=mask, weights=cut, level=level)


@functools.cache
def picked(spec=ONE_SHOT, level=2, seed=5):
    """A ticket that its spec's scorer picked, and the weights that it was cut out of."""
    start = dense(spec, seed)
    sizes = {n: m.size for n, m in start.mask.items()}
    density = one_shot.densities(spec, sizes)[level]
    return picking.pick(start, DIGITS, density, level), start.weights


def run(name, own, start=None):
    return BRANCHES[name](own, dense(own.spec).weights if start is None else start, DIGITS)


# reinit


def test_reinit_draws_other_weights_of_the_same_distribution():
    own, new = ticket(), run("reinit", ticket())
    for name, m in own.mask.items():
        assert np.array_equal(new.mask[name], m)
        a, b = own.weights[name][m == 1], new.weights[name][m == 1]
        assert (a != b).all() and 0.8 < a.std() / b.std() < 1.25
        assert not new.weights[name][m == 0].any()


def test_reinit_differs_between_levels_and_replicates():
    drawn = [run("reinit", ticket(level=level, seed=seed)) for level, seed in
             ((2, 5), (3, 5), (2, 6))]  # fmt: skip
    kernels = [d.weights["fc1/kernel"].tobytes() for d in drawn]
    assert len(set(kernels)) == 3


def test_reinit_has_no_past_to_rewind_to():
    assert ticket().rewind_step == 10 and run("reinit", ticket()).rewind_step == 0
    tuned = dataclasses.replace(SPEC, rewind_step=0.0, retrain="lr_rewind", retrain_steps=15)
    assert run("reinit", ticket(tuned)).rewind_step == 25
    assert run("reinit", picked()[0]).rewind_step == 0


# shuffle


@pytest.mark.parametrize("make", [lambda: ticket(), lambda: picked()[0]], ids=["imp", "one_shot"])
def test_shuffle_keeps_every_kernels_count_and_takes_other_weights(make):
    own = make()
    start = {n: w + 1 for n, w in dense(own.spec).weights.items()}  # not those of step 0
    new = run("shuffle", own, start)
    for name, m in own.mask.items():
        assert new.mask[name].sum() == m.sum() and new.mask[name].dtype == np.uint8
        assert not np.array_equal(new.mask[name], m)
        expected = m.sum() / m.size  # of its weights as many are kept as by chance
        assert 0.6 < (new.mask[name] & m).sum() / m.sum() / expected < 1.6
    assert same(new.weights, masks.apply(new.mask, start))
    assert (new.rewind_step, new.level, new.origin) == (own.rewind_step, own.level, own.origin)


def test_shuffle_differs_between_levels_and_replicates_and_repeats():
    found = [run("shuffle", ticket(level=level, seed=seed)).mask for level, seed in
             ((2, 5), (3, 5), (2, 6))]  # fmt: skip
    for i, mask in enumerate(found):
        assert not any(same(mask, other) for other in found[:i])
    assert same(found[0], run("shuffle", ticket()).mask)


# invert


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_invert_keeps_exactly_the_lowest_scores(scorer, scope):
    spec = dataclasses.replace(ONE_SHOT, scorer=scorer, scope=scope, rounds=1)
    own, start = picked(spec)
    new = run("invert", own, start)
    data = picking.batches(spec, DIGITS, 5) if looks_at_data(scorer) else None
    model = plain_model(spec, (8, 8, 1), 10, 5)
    scores = score(model, scorer, data, **picking.options(spec, 5))
    for group in [[n] for n in scores] if scope == "layerwise" else [list(scores)]:
        flat = np.concatenate([scores[n].reshape(-1) for n in group])
        chosen = np.concatenate([new.mask[n].reshape(-1) for n in group]) != 0
        assert chosen.sum() == count(0.3, flat.size)
        assert flat[chosen].max() <= flat[~chosen].min()
    assert masks.overlap(new.mask, own.mask) == 0  # 30 % from the top, 30 % from the bottom
    assert same(new.weights, masks.apply(new.mask, start)) and new.level == own.level


def test_invert_prunes_in_as_many_rounds_as_the_ticket():
    spec = dataclasses.replace(ONE_SHOT, scorer="synflow", rounds=5)
    own, start = picked(spec)
    in_rounds, at_once = run("invert", own, start), run("invert", *picked(
        dataclasses.replace(spec, rounds=1)))  # fmt: skip
    assert masks.kept(in_rounds.mask) == masks.kept(own.mask) == masks.kept(at_once.mask)
    assert not same(in_rounds.mask, at_once.mask)


def test_invert_keeps_protected_kernels_and_the_least_of_every_kernel():
    spec = dataclasses.replace(ONE_SHOT, protect=("output/kernel",), min_per_layer=50)
    own, start = picked(spec)
    new = run("invert", own, start)
    assert new.mask["output/kernel"].all() and not same(new.mask, own.mask)
    assert all(m.sum() >= 50 for m in new.mask.values())
    assert masks.kept(new.mask) == masks.kept(own.mask) == count(0.3, 1580)


@pytest.mark.parametrize("level", [1, 2])
def test_invert_has_the_density_of_the_tickets_level(level):
    own, start = picked(level=level)
    assert masks.kept(run("invert", own, start).mask) == count((0.5, 0.3)[level - 1], 1580)


# absolute


def test_absolute_of_grasp_is_the_variant_of_that_name():
    own, start = picked()
    variant, _ = picked(dataclasses.replace(ONE_SHOT, grasp_variant="absolute"))
    new = run("absolute", own, start)
    assert same(new.mask, variant.mask) and not same(new.mask, own.mask)
    assert same(new.weights, variant.weights)


def test_absolute_of_the_official_variant():
    spec = dataclasses.replace(ONE_SHOT, grasp_variant="official", rounds=1)
    own, start = picked(spec)
    model, data = plain_model(spec, (8, 8, 1), 10, 5), picking.batches(spec, DIGITS, 5)
    scores = score(model, "grasp", data, **picking.options(spec, 5))
    wanted = SCOPES["global"]({n: np.abs(s) for n, s in scores.items()}, 0.3, min_per_layer=0)
    assert same(run("absolute", own, start).mask, wanted) and not same(own.mask, wanted)


@pytest.mark.parametrize(
    "changes",
    [{"scorer": s} for s in SCORERS if not SCORERS.about(s).signed({})]
    + [{"grasp_variant": "absolute"}],
    ids=lambda c: next(iter(c.values())),
)
def test_absolute_is_refused_where_it_changes_nothing(changes):
    spec = dataclasses.replace(ONE_SHOT, **changes)
    with pytest.raises(UserError, match="'absolute' changes nothing .* never negative"):
        run("absolute", ticket(spec))


@pytest.mark.parametrize("name", ["invert", "absolute"])
def test_tickets_of_trained_weights_are_not_ranked_anew(name):
    with pytest.raises(UserError, match="it needs tickets of lth-oneshot, not of lth-imp"):
        run(name, ticket())


# random, by a scope


@pytest.mark.parametrize("scope", ["erk", "uniform", "global"])
def test_random_masks_keep_as_many_weights_in_all(scope):
    own = ticket()
    new = run(f"random_{scope}", own)
    assert masks.kept(new.mask) == masks.kept(own.mask)
    assert masks.overlap(new.mask, own.mask) < 0.95 and not same(new.mask, own.mask)
    start = dense(own.spec).weights
    assert all(np.array_equal(new.weights[n], start[n] * m) for n, m in new.mask.items())
    shares = [m.mean() for m in new.mask.values()]
    assert (max(shares) - min(shares) < 0.01) == (scope == "uniform")
    assert not same(run(f"random_{scope}", ticket(seed=6)).mask, new.mask)


def test_random_masks_leave_protected_kernels_whole():
    own = ticket(dataclasses.replace(SPEC, protect=("output*",)))
    whole = np.ones_like(own.mask["output/kernel"])
    own = dataclasses.replace(own, mask={**own.mask, "output/kernel": whole})
    new = run("random_global", own)
    assert new.mask["output/kernel"].all() and masks.kept(new.mask) == masks.kept(own.mask)


# values of the same kernels


def test_values_are_exchanged_within_kernels_under_the_same_mask():
    own, start = ticket(), dense(SPEC).weights
    free, signed, constant = (run(name, own) for name in ("reuse", "reuse_sign", "sign_only"))
    for name, m in own.mask.items():
        kept = own.weights[name][m == 1]
        for new in (free, signed, constant):
            assert np.array_equal(new.mask[name], m) and not new.weights[name][m == 0].any()
            assert new.weights[name].dtype == start[name].dtype
        values = free.weights[name][m == 1]
        assert np.isin(values, start[name]).all() and (values != kept).mean() > 0.9
        signs = signed.weights[name][m == 1]
        assert np.isin(np.abs(signs), np.abs(start[name])).all()
        assert np.array_equal(np.sign(signs), np.sign(kept))
        assert (np.sign(values) != np.sign(kept)).mean() > 0.2
        deviation = np.abs(constant.weights[name][m == 1])
        np.testing.assert_allclose(deviation, start[name].std(), rtol=1e-5)
        assert np.array_equal(np.sign(constant.weights[name][m == 1]), np.sign(kept))
    others = {n for n in own.weights if n not in own.mask}
    assert all(np.array_equal(free.weights[n], own.weights[n]) for n in others)


def test_another_order_is_the_same_ticket_on_other_batches(tmp_path):
    from lth_tf import experiments

    own, new = ticket(), run("other_order", ticket())
    assert same(own.mask, new.mask) and same(own.weights, new.weights)
    assert new.origin["order_seed"] != own.origin["seed"] == new.origin["seed"]
    s = dataclasses.replace(
        SPEC, levels=1, controls=("other_order",), train_steps=12, rewind_step=0, eval_every=6,
        validation_size=100, batch_size=20, compile="off", distribute="none",
    )  # fmt: skip
    rows = experiments.run(s, tmp_path, DIGITS)
    losses = {r["arm"]: r["validation_loss_min"] for r in rows if r["level"] == 1}
    assert losses["ticket"] != losses["other_order"]
    assert experiments.run(s, tmp_path, DIGITS) == rows  # what is finished is found again
