"""scopes: exactly k weights, ties by position, nested masks; nothing empty or NaN in silence."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest

from lth_tf import masks
from lth_tf.errors import UserError
from lth_tf.scopes import SCOPES, count, top_k

ALL = pytest.mark.parametrize("scope", list(SCOPES))
EXACT = pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
SPREAD = pytest.mark.parametrize("scope", ["uniform", "erk"])
TIES = pytest.mark.parametrize("ties", [False, True])
SHAPES = [(20, 7), (3, 3, 2, 9), (5, 9, 4), (41,), (1, 20), (399, 1)]


def random_scores(rng, kernels=None, ties=False, scope="global"):
    """1 to 4 kernels of 20 to 400 weights; the first weight of each is never pruned.

    For uniform, which keeps it whole, a smaller one comes first.
    """
    shapes = [SHAPES[i] for i in rng.integers(6, size=kernels or rng.integers(1, 5))]
    if scope == "uniform":
        shapes = [(2, 2), *shapes]
    out = {}
    for i, shape in enumerate(shapes):
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


@EXACT
@TIES
def test_budget_is_exact(scope, ties):
    rng = np.random.default_rng(3)
    for i in range(400):
        scores = random_scores(rng, ties=ties, scope=scope)
        density = [0.05, 0.3, 0.35, 0.45, 0.55, 0.95, 1.0, rng.uniform(0.2, 1)][i % 8]
        if scope == "uniform":
            density = max(density, 0.3)
        mask = SCOPES[scope](scores, density)
        assert masks.kept(mask) == count(density, total(scores))


@pytest.mark.parametrize("sizes", [[10], [1, 9], [1, 3, 6]])
def test_global_budget_is_that_of_the_whole_however_it_is_divided(sizes):
    scores = {f"k{i}": np.array([2.0] + [1.0] * (n - 1)) for i, n in enumerate(sizes)}
    for j in range(35, 100, 10):  # halves, all of them
        assert masks.kept(SCOPES["global"](scores, j / 100)) == (j + 5) // 10


@TIES
def test_layerwise_budget_is_exact(ties):
    rng = np.random.default_rng(4)
    for _ in range(400):
        scores, density = random_scores(rng, ties=ties), rng.uniform(0.03, 1)
        mask = SCOPES["layerwise"](scores, density)
        assert kept_per_kernel(mask) == {n: count(density, s.size) for n, s in scores.items()}


@ALL
def test_dict_budgets(scope):
    rng = np.random.default_rng(5)
    for _ in range(300):
        scores = random_scores(rng, kernels=3, scope=scope)
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


@ALL
def test_keeps_the_highest(scope):
    rng = np.random.default_rng(6)
    for _ in range(100):
        scores = random_scores(rng, kernels=3, scope=scope)
        mask = SCOPES[scope](scores, rng.uniform(0.3, 0.9))
        groups = [list(scores)] if scope == "global" else [[n] for n in scores]
        for group in groups:
            flat = np.concatenate([scores[n].reshape(-1) for n in group])
            chosen = np.concatenate([mask[n].reshape(-1) for n in group]) != 0
            assert flat[chosen].min() > flat[~chosen].max(initial=-1)


@ALL
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


@ALL
def test_float64_scores(scope):
    scores = {"first": np.ones(1), "a": 1 + np.arange(10) * 2.0**-50}
    mask = SCOPES[scope](scores, {"first": 1.0, "a": 0.3})
    assert mask["a"].tolist() == [0] * 7 + [1] * 3


# Nesting.


@ALL
@TIES
def test_levels_are_nested_and_exact(scope, ties):
    rng = np.random.default_rng(8)
    for _ in range(30):
        scores = random_scores(rng, kernels=3, ties=ties, scope=scope)
        mask = masks.ones({n: s.shape for n, s in scores.items()})
        for level in range(1, 7):
            for s in scores.values():
                s.flat[1:] = rng.permutation(s.flat[1:])
            inner = SCOPES[scope](scores, 0.8**level, within=mask)
            assert masks.is_subset(inner, mask)
            if scope == "layerwise":
                wanted = {n: count(0.8**level, s.size) for n, s in scores.items()}
                assert kept_per_kernel(inner) == wanted
            else:
                assert masks.kept(inner) == count(0.8**level, total(scores))
            mask = inner


@pytest.mark.sampled(2)
@ALL
@pytest.mark.parametrize("own", [False, True])
def test_rounds_never_run_out_of_weights(scope, own):
    """20 to 100 rounds, one density or a density of each kernel, some of them protected."""
    rng = np.random.default_rng(12)
    for _ in range(25):
        shapes = [
            tuple(int(x) for x in rng.integers(1, 9, rng.integers(1, 5)))
            for _ in range(rng.integers(2, 7))
        ]
        guard = int(rng.integers(0, 3))
        scores = {f"k{i}": rng.random(shape) for i, shape in enumerate(shapes)}
        n = total(scores)
        # Enough at the end for the guard, for uniform's first kernel and for one weight in all.
        if own:
            last = {m: min((guard + 1) / s.size + rng.random(), 1) for m, s in scores.items()}
            last["k0"] = 1.0 if scope == "uniform" else last["k0"]
        else:
            least = sum(min(guard, s.size) for s in scores.values())
            least += scores["k0"].size if scope == "uniform" else 0
            last = dict.fromkeys(scores, min((least + len(scores)) / n, 1))
        rounds, mask, before = int(rng.integers(20, 101)), None, n
        exponential = rng.random() < 0.5
        for r in range(1, rounds + 1):
            each = {
                name: d ** (r / rounds) if exponential else 1 - (1 - d) * r / rounds
                for name, d in last.items()
            }
            scores = {name: rng.integers(0, 9, s.shape) / 9 for name, s in scores.items()}
            density = each if own else each["k0"]
            inner = SCOPES[scope](scores, density, within=mask, min_per_layer=guard)
            assert mask is None or masks.is_subset(inner, mask)
            for name, m in inner.items():
                assert m.sum() >= min(guard, m.size) and (m.all() or each[name] < 1)
            k = masks.kept(inner)
            if scope != "layerwise":
                exact = sum(Fraction(d) * scores[m].size for m, d in each.items())
                assert k == (count(float(exact), 1) if own else count(density, n))
            assert k <= before
            mask, before = inner, k


def test_densities_that_fall_by_less_than_rounding():
    # In floats 0.35 * 9 + 0.35 is below 0.35 * 10 = 3.5: added up, the second would ask for more.
    scores = {"a": np.arange(9.0), "b": np.array([9.0])}
    above = np.nextafter(0.35, 1)
    mask = SCOPES["global"](scores, {"a": above, "b": 0.35})
    SCOPES["global"](scores, {"a": 0.35, "b": 0.35}, within=mask)


@ALL
def test_pruned_weights_never_return_though_their_scores_are_highest(scope):
    within = {"a": np.array([0, 1, 0, 1, 1, 1], np.uint8), "b": np.array([[1, 0], [1, 0]])}
    scores = {n: np.where(m == 0, 100.0, 1.0) for n, m in within.items()}
    mask = SCOPES[scope](scores, 0.5, within=within)
    assert masks.is_subset(mask, within) and masks.kept(mask) == 5
    mask = SCOPES[scope](scores, 0.6, within=within, min_per_layer=2)
    assert masks.is_subset(mask, within) and masks.kept(mask) == 6


@ALL
def test_too_many_asked_for(scope):
    scores = {"a": np.arange(4.0)}
    within = {"a": np.array([0, 1, 1, 0], np.uint8)}
    with pytest.raises(UserError, match="cannot keep 3 weights: only 2 of 4"):
        SCOPES[scope](scores, 0.75, within=within)
    assert SCOPES[scope](scores, 0.5, within=within)["a"].tolist() == [0, 1, 1, 0]


@ALL
def test_protected_kernel_is_kept_whole_or_refused(scope):
    scores = {"b": np.zeros(3), "a": np.arange(4.0)}
    mask = SCOPES[scope](scores, {"a": 0.5, "b": 1.0})
    assert mask["a"].tolist() == [0, 0, 1, 1] and mask["b"].all()
    within = {"a": np.ones(4, np.uint8), "b": np.array([1, 1, 0], np.uint8)}
    with pytest.raises(UserError, match="cannot keep 3 weights"):
        SCOPES[scope](scores, {"a": 0.5, "b": 1.0}, within=within)


@ALL
def test_order_of_kernels_is_kept(scope):
    scores = {n: np.arange(1.0, 5) for n in "zma"}
    assert list(SCOPES[scope](scores, {"z": 0.8, "m": 1.0, "a": 0.5})) == list("zma")


# min_per_layer.


@ALL
@TIES
def test_guard_is_honoured_and_the_total_exact(scope, ties):
    rng = np.random.default_rng(9)
    refused = 0
    for _ in range(300):
        scores = random_scores(rng, kernels=3, ties=ties, scope=scope)
        low = rng.integers(len(scores))  # a kernel that would else lose everything
        scores[f"k{low}"] = scores[f"k{low}"] - 100
        within = {n: (rng.random(s.shape) < 0.5).astype(np.uint8) for n, s in scores.items()}
        within = None if rng.random() < 0.5 else within
        has = {n: s.size if within is None else within[n].sum() for n, s in scores.items()}
        guard = int(rng.integers(1, 60))
        least = {n: min(guard, has[n]) for n in scores}
        if scope == "uniform":
            least["k0"] = has["k0"]
        k = int(rng.integers(1, sum(has.values()) + 1))
        density = k / total(scores)
        if scope == "layerwise":
            counts = {n: count(density, s.size) for n, s in scores.items()}
            if any(counts[n] > has[n] for n in scores) or not any(counts.values()):
                continue
            mask = SCOPES[scope](scores, density, within=within, min_per_layer=guard)
            assert kept_per_kernel(mask) == {n: max(counts[n], least[n]) for n in scores}
            continue
        if sum(least.values()) > k:
            refused += 1
            with pytest.raises(UserError, match=f"too few for .*min_per_layer {guard};"):
                SCOPES[scope](scores, density, within=within, min_per_layer=guard)
            continue
        mask = SCOPES[scope](scores, density, within=within, min_per_layer=guard)
        assert masks.kept(mask) == k
        assert within is None or masks.is_subset(mask, within)
        for n, m in mask.items():
            assert m.sum() >= least[n]
            among = np.ones(m.shape) if within is None else within[n]
            assert (m == oracle(scores[n], m.sum(), among)).all()  # the highest of the kernel
    assert scope == "layerwise" or refused > 20


@TIES
def test_global_guard_takes_from_the_lowest_of_the_others(ties):
    """Greedy: the guard's places first, then whatever is highest, ties by position."""
    rng = np.random.default_rng(10)
    for _ in range(200):
        scores = random_scores(rng, kernels=3, ties=ties)
        scores["k1"] = scores["k1"] - rng.integers(0, 3)
        guard, density = int(rng.integers(0, 15)), rng.uniform(0.2, 0.9)
        first = {n: oracle(s, guard, np.ones(s.shape)) for n, s in scores.items()}
        flat = np.concatenate([s.reshape(-1) for s in scores.values()])
        taken = np.concatenate([m.reshape(-1) for m in first.values()])
        taken |= oracle(flat, count(density, flat.size) - taken.sum(), taken == 0)
        mask = SCOPES["global"](scores, density, min_per_layer=guard)
        assert (np.concatenate([m.reshape(-1) for m in mask.values()]) == taken).all()


def test_zero_lets_kernels_become_empty():
    scores = {"a": np.full(8, 9.0), "b": np.ones(4)}
    assert kept_per_kernel(SCOPES["global"](scores, 0.5, min_per_layer=0)) == {"a": 6, "b": 0}
    assert kept_per_kernel(SCOPES["global"](scores, 0.5, min_per_layer=1)) == {"a": 5, "b": 1}
    assert kept_per_kernel(SCOPES["global"](scores, 0.5, min_per_layer=3)) == {"a": 3, "b": 3}
    assert kept_per_kernel(SCOPES["layerwise"](scores, 0.1, min_per_layer=0)) == {"a": 1, "b": 0}
    assert kept_per_kernel(SCOPES["layerwise"](scores, 0.1, min_per_layer=2)) == {"a": 2, "b": 2}
    scores["c"] = np.ones(88)
    assert kept_per_kernel(SCOPES["uniform"](scores, 0.1, min_per_layer=0))["b"] == 0
    assert kept_per_kernel(SCOPES["uniform"](scores, 0.1, min_per_layer=1))["b"] == 1
    scores = {"a": np.ones((9, 9)), "b": np.ones(1)}
    assert kept_per_kernel(SCOPES["erk"](scores, 0.05, min_per_layer=0)) == {"a": 4, "b": 0}
    assert kept_per_kernel(SCOPES["erk"](scores, 0.05, min_per_layer=1)) == {"a": 3, "b": 1}


@EXACT
@pytest.mark.parametrize("guard", [None, 0, 3])
def test_the_smallest_density_named_is_the_smallest(scope, guard):
    rng = np.random.default_rng(11)
    named = 0
    for _ in range(100):
        scores = random_scores(rng, kernels=int(rng.integers(1, 4)))
        n = total(scores)
        try:
            SCOPES[scope](scores, 1.2 / n, min_per_layer=guard)
        except UserError as error:
            if found := re.search(r"possible is (\S+) \((\d+) of (\d+) unprotected", str(error)):
                named += 1
                assert int(found[3]) == n
                mask = SCOPES[scope](scores, float(found[1]), min_per_layer=guard)
                assert masks.kept(mask) == pytest.approx(int(found[2]), rel=2e-3)
                with pytest.raises(UserError):
                    SCOPES[scope](scores, (int(found[2]) - 1) / n, min_per_layer=guard)
    assert named == (100 if guard or scope == "uniform" else 0)


# uniform and erk.


def hamilton(k, weight):
    """k places in proportion to `weight`: largest remainders, the earlier first."""
    exact = [Fraction(k * w, sum(weight)) for w in weight]
    places = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (places[i] - exact[i], i))
    for i in order[: k - sum(places)]:
        places[i] += 1
    return places


def erk_by_hand(shapes, k):
    """Evci et al.: whoever is most above density 1 becomes dense, until nobody is."""
    shapes = dict(shapes)
    dense = {}
    while shapes:
        eps = Fraction(k - sum(dense.values()), sum(sum(s) for s in shapes.values()))
        densest = max(shapes, key=lambda n: Fraction(sum(shapes[n]), math.prod(shapes[n])))
        if eps * sum(shapes[densest]) <= math.prod(shapes[densest]):
            places = hamilton(k - sum(dense.values()), [sum(s) for s in shapes.values()])
            return dense | dict(zip(shapes, places, strict=True)), eps
        dense[densest] = math.prod(shapes.pop(densest))
    return dense, None


def test_erk_is_the_published_procedure():
    rng = np.random.default_rng(13)
    saturated = 0
    for _ in range(500):
        shapes = {
            f"k{i}": tuple(int(x) for x in rng.integers(1, 12, rng.integers(1, 5)))
            for i in range(rng.integers(1, 9))
        }
        scores = {n: rng.random(s) for n, s in shapes.items()}
        k = int(rng.integers(1, total(scores) + 1))
        kept = kept_per_kernel(SCOPES["erk"](scores, k / total(scores), min_per_layer=0))
        wanted, _ = erk_by_hand(shapes, k)
        assert kept == wanted and sum(kept.values()) == k
        saturated += sum(kept[n] == scores[n].size for n in kept) > 2
    assert saturated > 100


def layers(depth=3):
    """A residual network's kernels, 4-D and 2-D."""
    shapes, inputs = {"stem": (3, 3, 3, 16)}, 16
    for width in (16, 32, 64):
        for i in range(depth):
            shapes[f"{width}/{i}/a"] = (3, 3, inputs, width)
            shapes[f"{width}/{i}/b"] = (3, 3, width, width)
            if inputs != width:
                shapes[f"{width}/{i}/shortcut"] = (1, 1, inputs, width)
            inputs = width
    return shapes | {"output": (64, 10)}


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_erk_is_in_proportion_where_not_dense(density):
    rng = np.random.default_rng(14)
    scores = {n: rng.random(s) for n, s in layers().items()}
    mask = SCOPES["erk"](scores, density)
    assert masks.kept(mask) == count(density, total(scores))
    _, eps = erk_by_hand(layers(), masks.kept(mask))
    eps = math.inf if eps is None else float(eps)
    for m in mask.values():
        raw = sum(m.shape) / m.size
        assert abs(m.sum() - min(eps * raw, 1) * m.size) < 1
    dense = {name for name, m in mask.items() if m.all()}
    wanted = {0.05: set(), 0.1: {"output", "32/0/shortcut"}}
    wanted[0.2] = wanted[0.1] | {"stem", "64/0/shortcut"}
    assert dense == wanted.get(density, dense)


def test_er_by_hand():
    # 300-100-10: n_in + n_out is 1084, 400, 110. Half of the output layer's 1000 is out of reach.
    scores = {"a": np.ones((784, 300)), "b": np.ones((300, 100)), "c": np.ones((100, 10))}
    kept = kept_per_kernel(SCOPES["erk"](scores, 7970 / 266_200))
    assert kept == {"a": 5420, "b": 2000, "c": 550}  # five times that
    kept = kept_per_kernel(SCOPES["erk"](scores, 15_840 / 266_200))
    assert kept == {"a": 10_840, "b": 4000, "c": 1000}  # ten times, and 1100 do not fit


@SPREAD
def test_equal_remainders_go_to_the_earlier_kernel(scope):
    scores = {n: np.ones(10) for n in "zam"}
    assert list(kept_per_kernel(SCOPES["erk"](scores, 20 / 30)).values()) == [7, 7, 6]
    assert list(kept_per_kernel(SCOPES["uniform"](scores, 15 / 30)).values()) == [10, 3, 2]
    assert SCOPES[scope](scores, 0.5)["m"].tolist()[:2] == [1, 1]  # and in it by position


def test_uniform_is_dense_first_and_equal_elsewhere():
    rng = np.random.default_rng(15)
    for _ in range(200):
        scores = random_scores(rng, kernels=3)
        first, *others = [s.size for s in scores.values()]
        k = int(rng.integers(first, total(scores) + 1))
        kept = kept_per_kernel(SCOPES["uniform"](scores, k / total(scores), min_per_layer=0))
        assert list(kept.values()) == [first, *hamilton(k - first, others)]


def test_uniform_is_refused_where_the_first_kernel_is_too_large():
    scores = {"a": np.ones(50), "b": np.ones(150)}
    with pytest.raises(UserError, match=re.escape(
        "49 weights are too few for the first kernel 'a', which stays dense (50); the smallest "
        "density possible is 0.25 (50 of 200 unprotected weights)"
    )):  # fmt: skip
        SCOPES["uniform"](scores, 0.245, min_per_layer=0)
    with pytest.raises(UserError, match=r"is 0.255 \(51 of"):
        SCOPES["uniform"](scores, 0.245)
    with pytest.raises(UserError, match=r"stays dense \(50\) and min_per_layer 20;.*0.35 \(70 of"):
        SCOPES["uniform"](scores, 0.3, min_per_layer=20)
    assert kept_per_kernel(SCOPES["uniform"](scores, 0.255)) == {"a": 50, "b": 1}
    scores = {"a": np.ones(20_001), "b": np.ones(80_000)}
    with pytest.raises(UserError, match=r"0.2001 \(20001 of 100001"):  # 0.2000 would not do
        SCOPES["uniform"](scores, 0.1, min_per_layer=0)


@SPREAD
def test_protected_kernels_take_no_part(scope):
    rng = np.random.default_rng(16)
    for _ in range(200):
        scores = random_scores(rng, kernels=4)
        density = {n: rng.uniform(0.1, 1) for n in scores} | {"k2": 1.0}
        if scope == "uniform":
            density["k0"] = 1.0  # dense as it is, and no other in its place
        mask = SCOPES[scope](scores, density, min_per_layer=0)
        assert mask["k2"].all()
        free = {n: s for n, s in scores.items() if density[n] < 1}
        k = math.floor(math.fsum(density[n] * s.size for n, s in free.items()) + 0.5)
        weight = [s.size if scope == "uniform" else sum(s.shape) for s in free.values()]
        places = dict(zip(free, hamilton(k, weight), strict=True))
        if all(places[n] <= s.size for n, s in free.items()):
            assert {n: int(mask[n].sum()) for n in free} == places
        assert sum(mask[n].sum() for n in free) == k


def test_what_does_not_fit_goes_to_the_others():
    # Sums of dims 5, 11, 22; 2 of a's 6 are gone, so that 46 are divided 4 : 14 : 28.
    scores = {"a": np.ones((2, 3)), "b": np.ones((6, 5)), "c": np.ones((8, 14))}
    within = {n: np.ones(s.shape, np.uint8) for n, s in scores.items()}
    within["a"][0, :2] = 0
    kept = kept_per_kernel(SCOPES["erk"](scores, 46 / 148, within=within))
    assert kept == {"a": 4, "b": 14, "c": 28}
    # uniform: what is left of the first kernel stays; 10 of b's 30 are fewer than its share.
    within["b"][:4] = 0
    kept = kept_per_kernel(SCOPES["uniform"](scores, 90 / 148, within=within))
    assert kept == {"a": 4, "b": 10, "c": 76}


@SPREAD
def test_shares_within_bounds(scope):
    """Some t has every share within one of t * weight, clipped to [guard, eligible]."""
    rng = np.random.default_rng(17)
    for _ in range(200):
        scores = random_scores(rng, kernels=4)
        within = {
            n: (rng.random(s.shape) < rng.random()).astype(np.uint8) for n, s in scores.items()
        }
        guard = int(rng.integers(0, 9))
        has = {n: int(m.sum()) for n, m in within.items()}
        low = np.array([min(guard, x) for x in has.values()])
        if scope == "uniform":
            low[0] = has["k0"]
        k = int(rng.integers(max(low.sum(), 1), sum(has.values()) + 1))
        mask = SCOPES[scope](scores, k / total(scores), within=within, min_per_layer=guard)
        kept = np.array(list(kept_per_kernel(mask).values()))
        weight = [s.size if scope == "uniform" else sum(s.shape) for s in scores.values()]

        def shares(t, low=low, has=has, weight=weight):
            return np.clip(t * np.array(weight), low, list(has.values()))

        below, above = 0.0, 1e4
        for _ in range(80):
            middle = (below + above) / 2
            below, above = (middle, above) if shares(middle).sum() < k else (below, middle)
        exact = shares(above)
        assert kept.sum() == k and (abs(kept - exact) < 1 + 1e-6).all()


# Refusals.


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_without_rank(scope, bad):
    scores = {"a": np.arange(2.0), "b": np.array([1.0, bad, 2.0, 3.0])}
    for density in (0.7, 1.0, {"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0}):
        with pytest.raises(UserError, match="1 of .* scores are NaN or infinite"):
            SCOPES[scope](scores, density)


def test_empty_kernel():
    with pytest.raises(UserError, match="nothing would be left of b, c"):
        SCOPES["global"]({n: np.full(2, s) for n, s in (("a", 9.0), ("b", 2.0), ("c", 1.0))}, 0.33)
    scores = {"a": np.arange(100.0), "b": np.arange(4.0)}
    with pytest.raises(UserError, match="nothing would be left of b.* min_per_layer"):
        SCOPES["layerwise"](scores, 0.1)
    with pytest.raises(UserError, match="nothing would be left of b"):
        SCOPES["uniform"]({"first": np.ones(1), **scores}, 0.1)
    with pytest.raises(UserError, match="nothing would be left of b"):
        SCOPES["erk"]({"a": np.ones((9, 9)), "b": np.ones(1)}, 0.05)


@ALL
def test_a_kernel_that_within_has_emptied(scope):
    scores = {"a": np.arange(4.0), "b": np.arange(4.0)}
    within = {"a": np.ones(4, np.uint8), "b": np.zeros(4, np.uint8)}
    density = {"a": 1.0, "b": 0.1}
    with pytest.raises(UserError, match="nothing would be left of b"):
        SCOPES[scope](scores, density, within=within)
    for guard in (0, 2):
        mask = SCOPES[scope](scores, density, within=within, min_per_layer=guard)
        assert kept_per_kernel(mask) == {"a": 4, "b": 0}


@ALL
@pytest.mark.parametrize("guard", [None, 0, 1])
def test_a_density_that_keeps_nothing(scope, guard):
    with pytest.raises(UserError, match="none of the 20 weights would be kept"):
        SCOPES[scope]({"a": np.ones(10), "b": np.ones(10)}, 0.02, min_per_layer=guard)


@ALL
def test_guard_out_of_range(scope):
    with pytest.raises(UserError, match="min_per_layer -1 is out of range"):
        SCOPES[scope]({"a": np.ones(10)}, 1.0, min_per_layer=-1)


@ALL
@pytest.mark.parametrize("density", [0, -0.1, 1.01, 20, float("nan"), float("inf")])
def test_density_out_of_range(scope, density):
    for given in (density, {"a": density}):
        with pytest.raises(UserError, match=r"density .* \(kernel 'a'\) is out of range"):
            SCOPES[scope]({"a": np.arange(4.0)}, given)


@ALL
def test_densities_must_fit_the_kernels(scope):
    scores = {"a": np.arange(4.0), "b": np.arange(4.0)}
    with pytest.raises(UserError, match=r"no density given for the kernels \['b'\]"):
        SCOPES[scope](scores, {"a": 0.5})
    with pytest.raises(UserError, match=r"unknown kernels \['c'\]; the kernels are \['a', 'b'\]"):
        SCOPES[scope](scores, {"a": 0.5, "b": 0.5, "c": 0.5})
