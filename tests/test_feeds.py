"""feeds: batches are a function of (seed, step), splits are clean, scaling is exact."""

import numpy as np
import pytest

from lth_tf import feeds
from lth_tf.compat import tf
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError


def dataset(n=50, test=7):
    """Every image is its own label's number, every label is unique."""
    labels = np.arange(n + test, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (n + test, 2, 2, 1))
    return Dataset(
        "toy", images[:n], labels[:n], images[n:], labels[n:], n + test, mean=(0.1,), std=(0.2,)
    )


# Order.


def test_every_epoch_is_a_permutation():
    orders = [feeds.epoch_order(0, epoch, 101) for epoch in range(20)]
    for order in orders:
        assert order.dtype == np.int32 and sorted(order) == list(range(101))
    assert len({order.tobytes() for order in orders}) == 20


def test_seeds_and_epochs_do_not_meet():
    orders = {feeds.epoch_order(s, e, 1000).tobytes() for s in range(10) for e in range(10)}
    assert len(orders) == 100


def test_first_place_is_uniform():
    seen = np.bincount([feeds.epoch_order(s, 0, 5)[0] for s in range(2000)], minlength=5)
    assert np.abs(seen - 400).max() < 5 * np.sqrt(400 * 0.8)


@pytest.mark.parametrize(("n", "batch"), [(10, 5), (10, 4), (100, 7), (7, 7), (9, 1)])
def test_an_epoch_sees_each_example_once(n, batch):
    per_epoch = n // batch
    rows = feeds.batch_indices(3, 0, 4 * per_epoch, n, batch)
    assert rows.dtype == np.int32 and rows.shape == (4 * per_epoch, batch)
    for epoch in range(4):
        seen = rows[epoch * per_epoch : (epoch + 1) * per_epoch].reshape(-1)
        assert len(set(seen)) == per_epoch * batch and set(seen) <= set(range(n))
        assert (seen == feeds.epoch_order(3, epoch, n)[: len(seen)]).all()


def test_what_an_epoch_leaves_out_changes():
    left = {
        frozenset(range(10)) - set(feeds.batch_indices(0, 2 * e, 2, 10, 4).reshape(-1).tolist())
        for e in range(30)
    }
    assert len(left) > 10 and all(len(two) == 2 for two in left)


def test_any_step_is_reached_without_replay():
    whole = feeds.batch_indices(5, 0, 200, 23, 4)
    rng = np.random.default_rng(0)
    for _ in range(100):
        first = int(rng.integers(0, 200))
        count = int(rng.integers(1, 201 - first))
        feeds.epoch_order.cache_clear()
        assert (feeds.batch_indices(5, first, count, 23, 4) == whole[first : first + count]).all()
    far = feeds.batch_indices(5, 10**9, 1, 23, 4)
    epoch, place = divmod(10**9, 5)
    assert (far[0] == feeds.epoch_order(5, epoch, 23)[4 * place : 4 * place + 4]).all()


def test_other_seeds_are_other_batches():
    a, b = (feeds.batch_indices(seed, 0, 10, 1000, 60) for seed in (0, 1))
    assert (a != b).mean() > 0.9


def test_batches_are_copies():
    rows = feeds.batch_indices(0, 0, 2, 10, 4)
    rows[:] = -1
    assert feeds.batch_indices(0, 0, 2, 10, 4).min() >= 0


# Splits.


def test_split_is_disjoint_and_complete():
    data = dataset()
    parts = feeds.split(data, 12, seed=0)
    assert list(parts) == ["train", "validation", "test"]
    train, held, test = (parts[name][1] for name in parts)
    assert (len(train), len(held), len(test)) == (38, 12, 7)
    assert sorted([*train, *held]) == list(range(50)) and test.tolist() == list(range(50, 57))
    for images, labels in parts.values():
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert (images[:, 0, 0, 0] == labels).all()  # images and labels go together


def test_split_depends_on_the_seed_alone():
    held = [tuple(feeds.split(dataset(), 12, seed)["validation"][1]) for seed in (0, 0, 1, 2)]
    assert held[0] == held[1] and len(set(held)) == 3


def test_split_is_drawn_from_all_classes():
    held = [feeds.split(dataset(), 25, seed)["validation"][1] for seed in range(40)]
    assert 20 < np.mean(held) < 29 and set(np.concatenate(held)) == set(range(50))


def test_split_is_not_that_of_the_order():
    held = feeds.split(dataset(), 12, seed=0)["validation"][1]
    assert set(held) != set(feeds.epoch_order(0, 0, 50)[:12])


def test_split_leaves_at_least_half():
    assert len(feeds.split(dataset(50), 25, 0)["train"][1]) == 25
    assert len(feeds.split(dataset(51), 25, 0)["train"][1]) == 26
    for n in (50, 51):
        with pytest.raises(UserError, match=f"more than half of the {n} .*'toy'; give at most 25"):
            feeds.split(dataset(n), 26, 0)


# Scaling.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["standard", "unit", "l2"])
def test_scale_against_numpy(kind, channels):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (20, 5, 4, channels)).astype(np.uint8)
    mean, std = (0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels]
    x = images / 255
    wanted = {
        "standard": (x - mean) / std,
        "unit": x,
        "l2": x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True)),
    }[kind]
    for dtype, tolerance in ((tf.float64, 1e-14), (tf.float32, 2e-6)):
        found = feeds.scale(tf.constant(images), kind, mean, std, dtype)
        assert found.dtype == dtype and found.shape == images.shape
        np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


def test_scale_of_a_black_image():
    found = feeds.scale(np.zeros((1, 2, 2, 1), np.uint8), "l2", (0.1,), (0.2,), tf.float32)
    assert (found.numpy() == 0).all()


# Placement.


def test_place_on_one_device():
    data = dataset()
    images, labels = feeds.place(
        (data.train_images, data.train_labels), tf.distribute.get_strategy()
    )
    assert images.dtype == tf.uint8 and labels.dtype == tf.int32
    assert (images.numpy() == data.train_images).all()
    assert (labels.numpy() == data.train_labels).all()


def test_place_on_two_devices():
    devices = [d.name for d in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2
    strategy = tf.distribute.MirroredStrategy(devices)
    data = dataset()
    (labels,) = feeds.place((data.train_labels,), strategy)
    copies = strategy.experimental_local_results(labels)
    assert [copy.device.rpartition("/device:")[2] for copy in copies] == ["CPU:0", "CPU:1"]
    assert all((copy.numpy() == data.train_labels).all() for copy in copies)
