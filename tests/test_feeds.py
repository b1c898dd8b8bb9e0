"""feeds: batches are a function of (seed, step), splits are clean, scaling is exact."""

import numpy as np
import pytest

from lth_tf.compat import tf
from lth_tf.datasets import Dataset, augmentation, crops, scaling
from lth_tf.errors import UserError
from lth_tf.training import feeds


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
        found = scaling.scale(tf.constant(images), kind, mean, std, dtype)
        assert found.dtype == dtype and found.shape == images.shape
        np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


def test_scale_of_a_black_image():
    found = scaling.scale(np.zeros((1, 2, 2, 1), np.uint8), "l2", (0.1,), (0.2,), tf.float32)
    assert (found.numpy() == 0).all()


# Placement.


def test_place_on_one_device():
    data = dataset()
    images, labels = feeds.on_devices(
        (data.train_inputs, data.train_labels), tf.distribute.get_strategy()
    )
    assert images.dtype == tf.uint8 and labels.dtype == tf.int32
    assert (images.numpy() == data.train_inputs).all()
    assert (labels.numpy() == data.train_labels).all()


def test_place_on_two_devices():
    devices = [d.name for d in tf.config.list_logical_devices("CPU")][:2]
    strategy = tf.distribute.MirroredStrategy(devices)
    data = dataset()
    (labels,) = feeds.on_devices((data.train_labels,), strategy)
    copies = strategy.experimental_local_results(labels)
    assert [copy.device.rpartition("/device:")[2] for copy in copies] == ["CPU:0", "CPU:1"]
    assert all((copy.numpy() == data.train_labels).all() for copy in copies)


# Augmentation.


def splitmix(seed, step, place, count):
    """The numbers that SplitMix64 gives, written out with Python's integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden) % 2**64) + step) % 2**64)
    numbers = range(place * count + 1, place * count + count + 1)
    return [(mix((key + i * golden) % 2**64) >> 40) / 2**24 for i in numbers]


def test_splitmix_is_that_of_the_paper():
    # The first outputs for the seed 1234567, as the public reference code prints them.
    z, outputs = 1234567, []
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(crops._mix(tf.constant(z, tf.uint64)).numpy())
    assert outputs == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("compile", [False, True])
def test_numbers_are_a_function_of_seed_step_and_place(compile):
    draw = tf.function(crops.uniform, jit_compile=compile)
    for seed, step in ((0, 0), (5, 70_000), (2**64 - 1, 3)):
        found = draw(tf.constant(seed, tf.uint64), tf.constant(step), tf.constant([9, 0, 4]), 3)
        assert found.dtype == tf.float32
        assert found.numpy().tolist() == [splitmix(seed, step, place, 3) for place in (9, 0, 4)]


def test_numbers_are_uniform_and_independent():
    draws = [crops.uniform(s, t, tf.range(100), 4).numpy() for s in range(5) for t in range(40)]
    numbers = np.array(draws)  # [seed and step, place, count]
    assert 0 <= numbers.min() < 1e-4 and 1 - 1e-4 < numbers.max() < 1
    counts = np.histogram(numbers, 16, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 15 degrees of freedom
    for neighbour in (numbers[1:, :, 0], numbers[:-1, :, 1]):
        assert abs(np.corrcoef(numbers[:-1, :, 0].ravel(), neighbour.ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:, 1:, 0].ravel(), numbers[:, :-1, 0].ravel())[0, 1]) < 0.03


def pictures(n=7, h=6, w=5, channels=3, dtype=np.float32):
    return np.random.default_rng(2).normal(size=(n, h, w, channels)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flip_crop_moves_pixels_by_what_is_drawn(dtype):
    x = pictures(dtype=dtype)
    found = augmentation.augment(tf.constant(x), "flip_crop", 3, 11, first=20)
    assert found.dtype == dtype
    seen = set()
    for i, picture in enumerate(x):
        down, right, side = splitmix(3, 11, 20 + i, 3)
        down, right = int(9 * down) - 4, int(9 * right) - 4
        wanted = np.zeros_like(picture)
        for row in range(6):
            for column in range(5):
                if 0 <= row + down < 6 and 0 <= column + right < 5:
                    wanted[row, column] = picture[row + down, column + right]
        if side < 0.5:
            # The crop of the mirrored image, at the mirrored place, is the mirrored crop.
            wanted = wanted[:, ::-1]
        assert (found[i].numpy() == wanted).all()
        seen |= {down < 0, down > 0, right < 0, right > 0, side < 0.5}
    assert seen == {True, False}


def test_flip_crop_draws_each_shift_and_side_as_often():
    marked = np.zeros((2000, 9, 10, 1), np.float32)
    marked[:, 4, 4] = 1  # stays within the image; 5 columns are to the right of it
    found = np.argwhere(augmentation.augment(tf.constant(marked), "flip_crop", 1, 2).numpy())
    assert (found[:, 0] == np.arange(2000)).all()
    rows = np.bincount(found[:, 1], minlength=9)
    assert np.abs(rows - 2000 / 9).max() < 5 * np.sqrt(2000 / 9)
    # Not mirrored: columns 0 to 8; mirrored: 9 to 1.
    columns = np.bincount(found[:, 2], minlength=10)
    expected = np.array([1, *[2] * 8, 1]) * 2000 / 18
    assert np.abs(columns - expected).max() < 5 * np.sqrt(2000 / 9)


def bilinear(picture, top, left, tall, wide, mirrored):
    """The part's pixels between those of the picture, which goes on beyond its border."""
    h, w, _ = picture.shape
    wanted = np.zeros(picture.shape)
    for row in range(h):
        for column in range(w):
            y = np.clip(top + (row + 0.5) * tall / h - 0.5, 0, h - 1)
            x = np.clip(left + (column + 0.5) * wide / w - 0.5, 0, w - 1)
            above, before = int(y), int(x)
            below, after = min(above + 1, h - 1), min(before + 1, w - 1)
            y, x = y - above, x - before
            upper = (1 - x) * picture[above, before] + x * picture[above, after]
            lower = (1 - x) * picture[below, before] + x * picture[below, after]
            wanted[row, w - 1 - column if mirrored else column] = (1 - y) * upper + y * lower
    return wanted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resized_crop_interpolates_what_is_drawn(dtype):
    x = pictures(dtype=dtype)
    found = augmentation.augment(tf.constant(x), "resized_crop", 3, 11, first=20)
    assert found.dtype == dtype and found.shape == x.shape
    numbers = crops.uniform(3, 11, tf.range(20, 27), crops.BOX + 1)
    boxes = np.stack(crops.boxes(numbers, 6, 5), 1)
    for i, picture in enumerate(x):
        wanted = bilinear(picture, *boxes[i], mirrored=numbers[i, -1] < 0.5)
        np.testing.assert_allclose(found[i], wanted, atol=1e-5)


def test_boxes_fit_and_have_the_areas_and_ratios_of_the_paper():
    numbers = np.random.default_rng(0).random((20_000, crops.BOX)).astype(np.float32)
    top, left, tall, wide = (v.numpy() for v in crops.boxes(tf.constant(numbers), 80, 100))
    assert top.min() >= 0 and left.min() >= 0
    assert (top + tall).max() <= 80 + 1e-4 and (left + wide).max() <= 100 + 1e-4
    area, ratio = tall * wide / 8000, wide / tall
    assert 0.08 <= area.min() + 1e-6 and area.max() <= 1
    assert 0.75 - 1e-4 <= ratio.min() and ratio.max() <= 4 / 3 + 1e-4
    small = (area < 0.5) & (area > 0.1)  # where every ratio fits
    assert np.abs(np.histogram(area[small], 4)[0] / small.sum() - 0.25).max() < 0.02
    assert abs(np.log(ratio[small]).mean()) < 0.01
    # Places are even as well.
    down = (top / (80 - tall))[tall < 70]
    assert np.abs(np.histogram(down, 4, (0, 1))[0] / len(down) - 0.25).max() < 0.02


def test_box_of_an_image_into_which_none_fits():
    top, left, tall, wide = crops.boxes(np.zeros((1, crops.BOX), np.float32), 1000, 10)
    assert (float(top[0]), float(left[0]), float(tall[0]), float(wide[0])) == (495, 0, 10, 10)


@pytest.mark.parametrize("kind", ["flip_crop", "resized_crop"])
def test_augmentation_is_stateless_and_the_same_in_any_share(kind):
    x = tf.constant(pictures(8))
    graph = tf.function(lambda x, *place: augmentation.augment(x, kind, *place))
    whole = graph(x, 3, tf.constant(5), 0).numpy()
    tf.random.set_seed(1)
    halves = [graph(x[i : i + 4], 3, tf.constant(5), i).numpy() for i in (0, 4)]
    assert (np.concatenate(halves) == whole).all()
    assert (augmentation.augment(x, kind, 3, 6).numpy() != whole).any()
    assert (augmentation.augment(x, kind, 4, 5).numpy() != whole).any()
    compiled = tf.function(lambda x: augmentation.augment(x, kind, 3, 5), jit_compile=True)(x)
    np.testing.assert_allclose(compiled, whole, atol=0 if kind == "flip_crop" else 1e-4)
    assert augmentation.augment(x, "none", 3, 5) is x
