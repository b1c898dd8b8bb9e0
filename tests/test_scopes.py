"""scopes: exactly k weights, ties by position, nested masks; nothing empty or NaN in silence."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lth_tf import masks
from lth_tf.errors import UserError
from lth_tf.scopes import SCOPES, count, top_k

BOTH = pytest.mark.parametrize("scope", list(SCOPES))


def random_scores(rng, kernels=None, ties=False):
    """1 to 4 kernels of 20 to 400 weights; the first weight of each is never pruned."""
    out = {}
    for i in range(kernels or rng.integers(1, 5)):
        shape = [(20, 7), (3, 3, 2, 9), (5, 9, 4), (41,), (1, 20), (399, 1)][rng.integers(6)]
        out[f"k{i}"] = rng.integers(0, 3, shape).astype(float) if ties else rng.random(shape)
        out[f"k{i}"].flat[0] = 9 + i
    return out


def kept_per_kernel(mask):
    return {name: int(m.sum()) for name, m in mask.items()}


def total(scores):
    return sum(s.size for s in scores.values())


# Counting.


def test_count_rounds_halves_up():
    assert [count(0.5, n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert count(0.35, 10) == 4 and count(0.25, 2) == 1 and count(1.0, 7) == 7


def test_count_is_the_nearest_whole_number():
    rng = np.random.default_rng(0)
    for _ in range(5000):
        d, n = rng.random(), int(rng.integers(1, 10**7))
        exact = Fraction(d) * n
        k = count(d, n)
        assert type(k) is int and abs(k - exact) <= Fraction(1, 2) + Fraction(1, 10**8)


# top_k.


def oracle(scores, k, eligible):
    """A stable sort, highest first: what top_k must equal to the last bit."""
    order = [i for i in np.argsort(-scores.reshape(-1), kind="stable") if eligible.reshape(-1)[i]]
    out = np.zeros(scores.size, np.uint8)
    out[order[:k]] = 1
    return out.reshape(scores.shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_top_k_is_a_stable_sort(dtype):
    rng = np.random.default_rng(1)
    for _ in range(4000):
        shape = tuple(rng.integers(1, 5, rng.integers(1, 4)))
        # Few distinct values, both zeros among them: ties everywhere.
        values = np.array([-2, -1, -0.0, 0.0, 0.5, 3], dtype)[: rng.integers(1, 7)]
        scores = rng.choice(values, shape)
        eligible = (rng.random(shape) < rng.random()).astype(np.uint8)
        if rng.random() < 0.5:
            eligible = np.ones(shape, np.uint8)
        k = int(rng.integers(0, eligible.sum() + 1))
        out = top_k(scores, k, None if eligible.all() else eligible)
        assert out.dtype == np.uint8 and out.shape == shape
        assert (out == oracle(scores, k, eligible)).all()


def test_top_k_without_ties():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scores = rng.permutation(200).reshape(10, 20) - 100.0
        k = int(rng.integers(0, 201))
        assert (top_k(scores, k) == (scores >= 100 - k)).all()


def test_top_k_sees_float64():
    scores = 1 + np.arange(8) * 2.0**-50  # all equal in float32
    assert top_k(scores, 3).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_top_k_leaves_its_arguments_alone():
    scores, eligible = np.array([3.0, 1.0, 2.0]), np.array([0, 1, 1], np.uint8)
    top_k(scores, 1, eligible)
    assert scores.tolist() == [3, 1, 2] and eligible.tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_top_k_refuses_what_has_no_rank(bad):
    with pytest.raises(UserError, match="2 of 4 scores are NaN or infinite"):
        top_k(np.array([1.0, bad, 2.0, bad]), 1)


def test_top_k_refuses_too_many():
    with pytest.raises(UserError, match="cannot keep 3 weights: only 2 of 4 are eligible"):
        top_k(np.arange(4.0), 3, np.array([1, 0, 0, 1]))
    assert top_k(np.arange(4.0), 2, np.array([1, 0, 0, 1])).tolist() == [1, 0, 0, 1]


# Budgets.


@pytest.mark.parametrize("ties", [False, True])
def test_global_budget_is_exact(ties):
    rng = np.random.default_rng(3)
    for i in range(600):
        scores = random_scores(rng, ties=ties)
        density = [0.05, 0.3, 0.35, 0.45, 0.55, 0.95, 1.0, rng.uniform(0.2, 1)][i % 8]
        mask = SCOPES["global"](scores, density)
        assert masks.kept(mask) == count(density, total(scores))


@pytest.mark.parametrize("sizes", [[10], [1, 9], [1, 3, 6]])
def test_global_budget_is_that_of_the_whole_however_it_is_divided(sizes):
    scores = {f"k{i}": np.array([2.0] + [1.0] * (n - 1)) for i, n in enumerate(sizes)}
    for j in range(35, 100, 10):  # halves, all of them
        assert masks.kept(SCOPES["global"](scores, j / 100)) == (j + 5) // 10


@pytest.mark.parametrize("ties", [False, True])
def test_layerwise_budget_is_exact(ties):
    rng = np.random.default_rng(4)
    for _ in range(400):
        scores, density = random_scores(rng, ties=ties), rng.uniform(0.03, 1)
        mask = SCOPES["layerwise"](scores, density)
        assert kept_per_kernel(mask) == {n: count(density, s.size) for n, s in scores.items()}


@BOTH
def test_dict_budgets(scope):
    rng = np.random.default_rng(5)
    for _ in range(300):
        scores = random_scores(rng, kernels=3)
        density = {name: rng.uniform(0.2, 1) for name in scores}
        density["k1"] = 1.0
        mask = SCOPES[scope](scores, density)
        assert list(mask) == list(scores)
        assert mask["k1"].all()
        if scope == "layerwise":
            wanted = {n: count(density[n], s.size) for n, s in scores.items()}
            assert kept_per_kernel(mask) == wanted
        else:
            share = math.fsum(density[n] * s.size for n, s in scores.items())
            assert masks.kept(mask) == math.floor(share + 0.5)


@BOTH
def test_keeps_the_highest(scope):
    rng = np.random.default_rng(6)
    for _ in range(100):
        scores = random_scores(rng, kernels=3)
        mask = SCOPES[scope](scores, rng.uniform(0.3, 0.9))
        groups = [[n] for n in scores] if scope == "layerwise" else [list(scores)]
        for group in groups:
            flat = np.concatenate([scores[n].reshape(-1) for n in group])
            chosen = np.concatenate([mask[n].reshape(-1) for n in group]) != 0
            assert flat[chosen].min() > flat[~chosen].max()


@BOTH
def test_density_one_keeps_all(scope):
    scores = random_scores(np.random.default_rng(7))
    assert masks.density(SCOPES[scope](scores, 1.0)) == 1.0
    assert masks.density(SCOPES[scope](scores, 1)) == 1.0


# Ties.


def test_equal_scores_go_by_position():
    scores = {"a": np.ones((2, 3)), "b": np.ones((2, 2))}
    layerwise = SCOPES["layerwise"](scores, 0.5)
    assert layerwise["a"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert layerwise["b"].tolist() == [[1, 1], [0, 0]]
    ranked = SCOPES["global"](scores, 0.7)
    assert ranked["a"].all() and ranked["b"].tolist() == [[1, 0], [0, 0]]
    with pytest.raises(UserError, match="nothing would be left of b"):
        SCOPES["global"](scores, 0.5)


def test_order_of_kernels_breaks_ties_not_their_names():
    scores = {"z": np.array([1.0, 2.0]), "a": np.array([2.0, 1.0])}
    mask = SCOPES["global"](scores, 0.75)
    assert mask["z"].tolist() == [1, 1] and mask["a"].tolist() == [1, 0]


@BOTH
def test_float64_scores(scope):
    scores = {"a": 1 + np.arange(10) * 2.0**-50}
    assert SCOPES[scope](scores, 0.3)["a"].tolist() == [0] * 7 + [1] * 3


# Nesting.


@BOTH
@pytest.mark.parametrize("ties", [False, True])
def test_levels_are_nested_and_exact(scope, ties):
    rng = np.random.default_rng(8)
    for _ in range(30):
        scores = random_scores(rng, kernels=3, ties=ties)
        mask = masks.ones({n: s.shape for n, s in scores.items()})
        for level in range(1, 7):
            for s in scores.values():
                s.flat[1:] = rng.permutation(s.flat[1:])
            inner = SCOPES[scope](scores, 0.8**level, within=mask)
            assert masks.is_subset(inner, mask)
            if scope == "global":
                assert masks.kept(inner) == count(0.8**level, total(scores))
            else:
                wanted = {n: count(0.8**level, s.size) for n, s in scores.items()}
                assert kept_per_kernel(inner) == wanted
            mask = inner


@BOTH
def test_pruned_weights_never_return_though_their_scores_are_highest(scope):
    within = {"a": np.array([0, 1, 0, 1, 1, 1], np.uint8), "b": np.array([[1, 0], [1, 0]])}
    scores = {n: np.where(m == 0, 100.0, 1.0) for n, m in within.items()}
    mask = SCOPES[scope](scores, 0.5, within=within)
    assert masks.is_subset(mask, within) and masks.kept(mask) == 5


@BOTH
def test_too_many_asked_for(scope):
    scores = {"a": np.arange(4.0)}
    within = {"a": np.array([0, 1, 1, 0], np.uint8)}
    with pytest.raises(UserError, match="cannot keep 3 weights: only 2 of 4"):
        SCOPES[scope](scores, 0.75, within=within)
    assert SCOPES[scope](scores, 0.5, within=within)["a"].tolist() == [0, 1, 1, 0]


@BOTH
def test_protected_kernel_is_kept_whole_or_refused(scope):
    scores = {"a": np.arange(4.0), "b": np.zeros(3)}
    mask = SCOPES[scope](scores, {"a": 0.5, "b": 1.0})
    assert mask["a"].tolist() == [0, 0, 1, 1] and mask["b"].all()
    within = {"a": np.ones(4, np.uint8), "b": np.array([1, 1, 0], np.uint8)}
    with pytest.raises(UserError, match="cannot keep 3 weights"):
        SCOPES[scope](scores, {"a": 0.5, "b": 1.0}, within=within)


@BOTH
def test_order_of_kernels_is_kept(scope):
    scores = {n: np.arange(1.0, 5) for n in "zma"}
    assert list(SCOPES[scope](scores, {"z": 0.5, "m": 1.0, "a": 0.5})) == list("zma")


# Refusals.


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_without_rank(scope, bad):
    scores = {"a": np.arange(4.0), "b": np.array([1.0, bad])}
    for density in (0.5, 1.0, {"a": 0.5, "b": 1.0}):
        with pytest.raises(UserError, match="1 of .* scores are NaN or infinite"):
            SCOPES[scope](scores, density)


def test_empty_kernel():
    with pytest.raises(UserError, match="nothing would be left of b, c"):
        SCOPES["global"]({n: np.full(2, s) for n, s in (("a", 9.0), ("b", 2.0), ("c", 1.0))}, 0.33)
    with pytest.raises(UserError, match="nothing would be left of b"):
        SCOPES["layerwise"]({"a": np.arange(100.0), "b": np.arange(4.0)}, 0.1)


@BOTH
@pytest.mark.parametrize("density", [0, -0.1, 1.01, 20, float("nan"), float("inf")])
def test_density_out_of_range(scope, density):
    for given in (density, {"a": density}):
        with pytest.raises(UserError, match=r"density .* \(kernel 'a'\) is out of range"):
            SCOPES[scope]({"a": np.arange(4.0)}, given)


@BOTH
def test_densities_must_fit_the_kernels(scope):
    scores = {"a": np.arange(4.0), "b": np.arange(4.0)}
    with pytest.raises(UserError, match=r"no density given for the kernels \['b'\]"):
        SCOPES[scope](scores, {"a": 0.5})
    with pytest.raises(UserError, match=r"unknown kernels \['c'\]; the kernels are \['a', 'b'\]"):
        SCOPES[scope](scores, {"a": 0.5, "b": 0.5, "c": 0.5})
