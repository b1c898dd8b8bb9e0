"""masks: bits survive packing, a selection is exact, shuffling keeps counts and really shuffles."""

import numpy as np
import pytest

from lth_tf import masks

SHAPES = [(), (1,), (7,), (8,), (9,), (16,), (3, 5), (2, 3, 5), (3, 3, 3, 16), (0,), (0, 4)]


def random_mask(rng, shape, density=0.3):
    return (rng.random(shape) < density).astype(np.uint8)


# Packing.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_pack_round_trip(shape, density):
    m = np.asarray(random_mask(np.random.default_rng(1), shape, density))
    bits = masks.pack(m)
    assert bits.dtype == np.uint8 and bits.shape == ((m.size + 7) // 8,)
    back = masks.unpack(bits, shape)
    assert back.dtype == np.uint8 and back.shape == shape
    assert (back == m).all()


def test_pack_random_shapes():
    rng = np.random.default_rng(2)
    for _ in range(500):
        shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 5)))
        m = random_mask(rng, shape, rng.random())
        assert (masks.unpack(masks.pack(m), shape) == m).all()


def test_packed_layout():
    m = np.array([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]])
    assert masks.pack(m).tolist() == [0b10000001, 0b10000000]  # row-major, high bit first
    assert masks.pack(np.asfortranarray(m)).tolist() == [0b10000001, 0b10000000]
    assert masks.pack(np.array([1.0] * 8 + [0.0] * 8)).tolist() == [255, 0]  # empty last byte
    assert masks.unpack(np.array([255, 0], np.uint8), (16,)).tolist() == [1] * 8 + [0] * 8
    assert masks.pack(np.ones(9)).tolist() == [255, 128]  # unused bits are 0


@pytest.mark.parametrize(
    ("size", "shape"), [(1, (9,)), (2, (8,)), (0, (1,)), (1, (0,)), (3, (2, 5))]
)
def test_unpack_refuses_another_number_of_bytes(size, shape):
    with pytest.raises(ValueError, match=f"{size} bytes cannot hold"):
        masks.unpack(np.zeros(size, np.uint8), shape)


# Applying.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_apply_is_bit_exact(dtype):
    values = [1.5, -1.5, -0.0, 0.0, np.nan, np.inf, -np.inf, np.finfo(dtype).tiny]
    w = np.array(values * 2, dtype).reshape(4, 4)
    m = np.repeat([1, 0], 8).reshape(4, 4).astype(np.uint8)
    bits = f"u{w.itemsize}"
    before = w.copy()
    out = masks.apply({"k": m}, {"k": w})["k"]
    assert out.dtype == dtype and out.shape == w.shape
    assert (out.view(bits)[:2] == w.view(bits)[:2]).all()  # -0.0 and NaN that are kept stay
    assert (out.view(bits)[2:] == 0).all()  # pruned ones are +0.0, never -0.0 or NaN
    assert (w.view(bits) == before.view(bits)).all()


def test_apply_passes_what_has_no_mask():
    w = {"k": np.ones(2), "b": np.array([np.nan]), "count": np.array(3, np.int64)}
    out = masks.apply({"k": np.array([0, 1])}, w)
    assert list(out) == ["k", "b", "count"]
    assert out["k"].tolist() == [0, 1]
    assert out["b"] is w["b"] and out["count"] is w["count"]


def test_apply_keeps_whole_numbers_whole():
    out = masks.apply({"k": np.array([0, 1])}, {"k": np.array([5, 2**53 + 1])})["k"]
    assert out.dtype == np.int64 and out.tolist() == [0, 2**53 + 1]


# Shuffling.


def test_shuffle_keeps_counts_and_really_changes():
    rng = np.random.default_rng(3)
    for i in range(50):
        mask = {f"k{j}": random_mask(rng, (40, 11 + j), rng.uniform(0.1, 0.9)) for j in range(3)}
        before = {name: m.copy() for name, m in mask.items()}
        out = masks.shuffle(mask, np.random.default_rng(i))
        assert list(out) == list(mask)
        for name, m in mask.items():
            assert out[name].shape == m.shape and out[name].dtype == np.uint8
            assert set(np.unique(out[name])) <= {0, 1}
            assert out[name].sum() == m.sum()
            assert (out[name] != m).mean() > 0.05
            assert (m == before[name]).all()


def test_shuffle_is_a_function_of_the_generator():
    mask = {"a": random_mask(np.random.default_rng(0), (30, 30))}
    one, same, other = (masks.shuffle(mask, np.random.default_rng(s)) for s in (5, 5, 6))
    assert (one["a"] == same["a"]).all() and (one["a"] != other["a"]).any()


def test_shuffle_is_uniform():
    rng, mask = np.random.default_rng(4), {"k": np.array([[1, 1, 0], [0, 0, 0]], np.uint8)}
    share = np.mean([masks.shuffle(mask, rng)["k"] for _ in range(6000)], axis=0)
    assert np.abs(share - 1 / 3).max() < 0.03  # five standard deviations


# Counting.


def test_counts_against_sets():
    rng = np.random.default_rng(5)
    for _ in range(300):
        shapes = {f"k{i}": tuple(rng.integers(1, 5, 2)) for i in range(rng.integers(1, 4))}
        a, b = ({n: random_mask(rng, s, rng.random()) for n, s in shapes.items()} for _ in "ab")
        if rng.random() < 0.3:
            b = {n: b[n] | a[n] for n in a}
        x, y = ({(n, i) for n in m for i in np.flatnonzero(m[n])} for m in (a, b))
        total = sum(int(np.prod(s)) for s in shapes.values())
        assert masks.size(a) == total and masks.kept(a) == len(x)
        assert masks.density(a) == len(x) / total
        assert masks.is_subset(a, b) == (x <= y)
        assert masks.overlap(a, b) == (len(x & y) / len(x | y) if x | y else 1.0)


def test_density_counts_weights_not_kernels():
    assert masks.density({"big": np.zeros(99, np.uint8), "small": np.ones(1, np.uint8)}) == 0.01


def test_overlap_ends():
    a, b = {"k": np.array([1, 0, 0])}, {"k": np.array([0, 1, 1])}
    assert masks.overlap(a, a) == 1 and masks.overlap(a, b) == 0


def test_is_subset_wants_the_same_kernels():
    one = np.ones(2, np.uint8)
    assert not masks.is_subset({"a": one}, {"a": one, "b": one})
    assert not masks.is_subset({"a": one}, {"b": one})
    assert masks.is_subset({"a": one}, {"a": one})


def test_ones():
    mask = masks.ones({"a": (2, 3), "b": (4,)})
    assert list(mask) == ["a", "b"] and mask["a"].shape == (2, 3)
    assert mask["a"].dtype == np.uint8 and masks.kept(mask) == 10 and masks.density(mask) == 1.0
