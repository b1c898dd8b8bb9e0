"""Streamed data: any step without replay, the same network input as from memory, clear errors."""

import dataclasses

import numpy as np
import pytest

from lth_tf import experiment, feeds, masks, picking, training
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, crops, stream
from lth_tf.datasets.stream import Shard, Streamed
from lth_tf.errors import UserError
from lth_tf.feeds import Streaming
from lth_tf.spec import Spec
from lth_tf.training import Trainer, initial_weights

HELD, BATCH = 10, 12
TRAIN = 80 - HELD
STEPS = TRAIN // BATCH  # of an epoch
BASE = Spec(
    dataset="imagenet2012",
    model="lenet_20_10",
    validation_size=HELD,
    batch_size=BATCH,
    train_steps=12,
    eval_every=4,
    optimizer="sgd",
    learning_rate=0.01,
    compile="off",
)


def spec(**changes):
    return dataclasses.replace(BASE, **changes)


def encoded(number):
    """A JPEG of random pixels, 20 to 40 rows and columns, string []."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (*rng.integers(20, 41, 2), 3)).astype(np.uint8)
    # With fewer pixels of colour than of light, those at the border would depend on the crop.
    return tf.io.encode_jpeg(pixels, chroma_downsampling=False)


def record(image, label):
    """A serialised example as tensorflow-datasets writes it."""
    values = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "file_name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"n01.JPEG"])),
    }
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString()


@pytest.fixture(scope="module", autouse=True)
def _small_buffers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHUFFLE", 15)
        patch.setattr(stream, "READERS", 3)
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Streamed:
    """80 + 19 JPEGs of different sizes in 5 shards; every label is unique."""
    return written(tmp_path_factory.mktemp("toy"), 99)


def written(folder, classes):
    shards = []
    for number, length in enumerate((20, 25, 15, 20, 19)):
        shards.append(Shard(str(folder / f"{number}.tfrecord"), 0, length))
        with tf.io.TFRecordWriter(shards[-1].path) as file:
            for label in range(stream.size(shards[:-1]), stream.size(shards)):
                file.write(record(encoded(label).numpy(), label % classes))
    return Streamed(
        "toy", tuple(shards[:4]), tuple(shards[4:]), classes, (0.5,) * 3, (0.25,) * 3, (16, 16, 3)
    )


def batches(data, seed, step, count, resized=False):
    train = feeds.shards(data, HELD)["train"]
    found = stream.training(data, train, BATCH, seed, step, resized)
    return list(found.take(count).as_numpy_iterator())


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Parts.


def test_cut():
    shards = [Shard("a", 0, 5), Shard("b", 3, 2), Shard("c", 0, 4)]
    for count in range(12):
        kept, held = stream.cut(shards, count)
        assert (stream.size(kept), stream.size(held)) == (11 - count, count)
        both = [(s.path, s.first + i) for s in (*kept, *held) for i in range(s.length)]
        assert both == [(s.path, s.first + i) for s in shards for i in range(s.length)]
        assert all(shard.length for shard in (*kept, *held))


def test_validation_part_is_the_end_of_the_training_set(toy):
    parts = feeds.shards(toy, HELD)
    assert list(parts) == ["train", "validation", "test"]
    labels = {
        name: [int(y) for _, ys in stream.evaluation(toy, found, BATCH) for y in ys if y >= 0]
        for name, found in parts.items()
    }
    assert sorted(labels["train"]) == list(range(70)) and labels["test"] == list(range(80, 99))
    assert labels["validation"] == list(range(70, 80))
    with pytest.raises(UserError, match="validation_size 41 is more than half of the 80 .*most 40"):
        feeds.shards(toy, 41)


# Order.


def test_an_epoch_sees_each_record_once_in_an_order_of_its_own(toy):
    orders = []
    for seed in (0, 1, 2**40):
        labels = np.concatenate([y for _, y in batches(toy, seed, 0, 3 * STEPS)])
        for epoch in labels.reshape(3, STEPS * BATCH):
            assert len(set(epoch)) == STEPS * BATCH and set(epoch) <= set(range(TRAIN))
            orders.append(tuple(epoch))
    assert len(set(orders)) == 9
    assert len({frozenset(order) for order in orders}) > 1  # what is left out changes
    assert np.abs(np.corrcoef(orders) - np.eye(9)).max() < 0.6


@pytest.mark.parametrize("resized", [False, True])
def test_any_step_is_reached_without_replay(toy, resized):
    whole = batches(toy, 3, 0, 2 * STEPS + 2, resized)
    tf.random.set_seed(7)
    try:
        for step in (0, 1, STEPS - 1, STEPS, STEPS + 3):
            for found, wanted in zip(batches(toy, 3, step, 2, resized), whole[step:], strict=False):
                assert same(found, wanted)
    finally:
        tf.random.set_seed(None)


def test_skipped_records_are_not_decoded(toy, tmp_path):
    path = str(tmp_path / "one")
    with tf.io.TFRecordWriter(path) as file:
        for label in range(2 * BATCH):
            file.write(record(encoded(label).numpy() if label != 5 else b"no JPEG", label))
    shards = [Shard(path, 0, 2 * BATCH)]
    order = [int(tf.io.parse_single_example(r, {"label": tf.io.FixedLenFeature([], tf.int64)})
                 ["label"]) for r in stream.epochs(shards, 0, 0, 1, 2 * BATCH)]  # fmt: skip
    bad = order.index(5) // BATCH
    for step in (0, 1):
        found = iter(stream.training(toy, shards, BATCH, 0, step, False))
        if step <= bad:
            with pytest.raises(tf.errors.InvalidArgumentError):
                for _ in range(2):
                    next(found)
        else:
            assert next(found)[1].numpy().tolist() == order[BATCH:]


def test_walk_is_the_first_epoch_and_not_augmented(toy):
    found = list(feeds.walk(toy, HELD, BATCH, seed=3))
    assert [len(labels) for _, labels in found] == [BATCH] * STEPS + [TRAIN % BATCH]
    for batch, wanted in zip(found, batches(toy, 3, 0, STEPS), strict=False):
        assert batch[0].dtype == np.uint8 and batch[1].dtype == np.int32
        assert same(batch, wanted)
    assert sorted(np.concatenate([labels for _, labels in found])) == list(range(TRAIN))


# Pixels.


def resize(part, size):
    """Bilinear, without smoothing, centres over centres; rounded."""
    at = [np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1) for n in part.shape[:2]]
    weights = [np.maximum(0, 1 - np.abs(at[i][:, None] - np.arange(part.shape[i]))) for i in (0, 1)]
    return np.rint(np.einsum("ij,jkc,lk->ilc", weights[0], part, weights[1]))


def decoded(label):
    pixels = tf.io.decode_jpeg(encoded(label), dct_method="INTEGER_ACCURATE")
    return pixels.numpy().astype(float)


def test_central_part(toy):
    images, labels = next(stream.evaluation(toy, toy.test, 16).as_numpy_iterator())
    for image, label in zip(images, labels, strict=True):
        full = decoded(label)
        side = round(min(full.shape[:2]) * 7 / 8)
        top, left = ((n - side) // 2 for n in full.shape[:2])
        wanted = resize(full[top : top + side, left : left + side], 16)
        assert np.abs(image - wanted).max() <= 1


def test_random_part_is_what_augmentation_draws(toy):
    step, sides = STEPS + 1, set()
    ((images, labels),) = batches(toy, 3, step, 1, resized=True)
    numbers = crops.uniform(3, step, tf.range(BATCH), crops.BOX + 1)
    for image, label, row in zip(images, labels, numbers, strict=True):
        full = decoded(label)
        box = crops.boxes(row[None, :-1], *full.shape[:2])
        top, left, tall, wide = (round(float(value[0])) for value in box)
        wanted = resize(full[top : top + tall, left : left + wide], 16)
        sides.add(bool(row[-1] < 0.5))
        assert np.abs(image - (wanted[:, ::-1] if row[-1] < 0.5 else wanted)).max() <= 1
    assert sides == {True, False}


def test_evaluation_fills_up_its_last_batch(toy):
    found = list(stream.evaluation(toy, toy.test, BATCH).as_numpy_iterator())
    assert [len(labels) for _, labels in found] == [BATCH, BATCH]
    assert found[1][1].tolist() == [*range(92, 99), *[-1] * 5]
    assert not found[1][0][7:].any()


# Feeds and training.


def strategies():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    yield tf.distribute.get_strategy()
    yield tf.distribute.MirroredStrategy(devices)


@pytest.mark.parametrize("augmentation", ["none", "flip_crop", "resized_crop"])
@pytest.mark.parametrize("streamed", [True, False])
def test_one_and_two_replicas_see_the_same_pixels(toy, streamed, augmentation):
    data = toy if streamed else in_memory(toy)
    found = []
    for strategy in strategies():
        feed = feeds.feed(data, spec(augmentation=augmentation), strategy)
        x, y = strategy.run(feed.batch, (feed.take(feed.begin(5, 6, 9), 0), 9, 5))
        found.append([np.concatenate(strategy.experimental_local_results(v)) for v in (x, y)])
    assert found[0][0].shape == (BATCH, 16, 16, 3) and same(*found)


def in_memory(data, seed=0):
    """The same examples, the training part in the order of its first epoch."""
    (held,) = stream.evaluation(data, feeds.shards(data, HELD)["validation"], HELD)
    (test,) = stream.evaluation(data, data.test, stream.size(data.test))
    blocks = zip(*feeds.walk(data, HELD, BATCH, seed), held, strict=True)
    train = [np.concatenate(arrays) for arrays in blocks]
    return Dataset("toy", *train, *map(np.array, test), data.classes, data.mean, data.std)


def start(s, data):
    weights, kernels = initial_weights(s, data.input_shape, data.classes, 0)
    return weights, masks.ones({name: weights[name].shape for name in kernels})


def test_streamed_equals_resident_bit_for_bit(toy, monkeypatch):
    s = spec(train_steps=STEPS, eval_every=2)
    streamed = Trainer(s, toy).train(*start(s, toy), 0, STEPS)
    data = in_memory(toy)
    monkeypatch.setattr(
        feeds, "split", lambda *_: {
            "train": (data.train_images[:TRAIN], data.train_labels[:TRAIN]),
            "validation": (data.train_images[TRAIN:], data.train_labels[TRAIN:]),
            "test": (data.test_images, data.test_labels),
        }
    )  # fmt: skip
    monkeypatch.setattr(feeds, "epoch_order", lambda seed, epoch, n: np.arange(n, dtype=np.int32))
    resident = Trainer(s, data).train(*start(s, toy), 0, STEPS)
    assert all(np.array_equal(streamed.weights[n], w) for n, w in resident.weights.items())
    assert len(streamed.rows) == len(resident.rows) == 4
    for a, b in zip(streamed.rows, resident.rows, strict=True):
        assert a["loss"] == b["loss"]
        for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
            wanted = None if b[name] is None else pytest.approx(b[name], rel=1e-6)
            assert a[name] == wanted  # other blocks, so other sums


def test_killed_and_resumed_equals_whole(toy):
    s = spec(augmentation="resized_crop")
    weights, mask = start(s, toy)
    trainer = Trainer(s, toy)
    whole = trainer.train(weights, mask, 0, 12, seed=4, capture=5)
    resumed = Trainer(s, toy).train(whole.captured, mask, 5, 12, seed=4)
    again = trainer.train(weights, mask, 0, 12, seed=4)
    for other in (resumed, again):
        assert all(np.array_equal(w, other.weights[n]) for n, w in whole.weights.items())
    # Neither another seed nor another beginning makes another graph.
    other = trainer.train(weights, mask, 2, 12, seed=5)
    assert any((w != other.weights[n]).any() for n, w in whole.weights.items())
    assert trainer._chunk.experimental_get_tracing_count() == 1


def test_two_replicas_and_xla_are_the_same_mathematics(toy):
    found = []
    for changes in ({}, {"distribute": "mirrored"}, {"compile": "on"}):
        s = spec(precision="float64", train_steps=3, eval_every=2, **changes)
        found.append(Trainer(s, toy).train(*start(s, toy), 0, 3))
    for other in found[1:]:
        for name, w in found[0].weights.items():
            np.testing.assert_allclose(other.weights[name], w, rtol=1e-9, atol=1e-12)
        for a, b in zip(found[0].rows, other.rows, strict=True):
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-10)
            assert a["test_accuracy"] == b["test_accuracy"]


@pytest.mark.parametrize("streamed", [True, False])
def test_evaluation_is_not_augmented(toy, streamed):
    data = toy if streamed else in_memory(toy)
    found = []
    for augmentation in ("none", "flip_crop", "resized_crop"):
        feed = feeds.feed(data, spec(augmentation=augmentation), tf.distribute.get_strategy())
        for part in ("train", "validation", "test"):
            found.append(feed.examples(feed.block(feed.part(part), 0), part))
    for i, block in enumerate(found):
        assert same(block, found[i % 3])


# Errors.


def damaged(toy, tmp_path, damage):
    """The set with a changed copy of its second shard."""
    path = tmp_path / "damaged"
    with open(toy.train[1].path, "rb") as file:
        path.write_bytes(damage(file.read()))
    shards = list(toy.train)
    shards[1] = Shard(str(path), 0, shards[1].length)
    return dataclasses.replace(toy, train=tuple(shards))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-50], "DataLossError"),
        (lambda content: content[:1000] + b"xxxx" + content[1004:], "DataLossError"),
        (lambda content: b"", "FailedPreconditionError"),  # fewer records than promised
    ],
)
def test_records_that_cannot_be_read(toy, tmp_path, damage, words):
    data = damaged(toy, tmp_path, damage)
    with pytest.raises(UserError, match=f"'toy' in .* cannot be read or decoded .{words}.*again"):
        list(feeds.walk(data, HELD, BATCH, 0))


def test_training_on_what_cannot_be_read(toy, tmp_path):
    lost = Shard(str(tmp_path / "not"), 0, 20)
    trainer = Trainer(BASE, dataclasses.replace(toy, train=(*toy.train[:3], lost)))
    assert not np.isnan(trainer.evaluate("test")).any()
    with pytest.raises(UserError, match="'toy' in .* cannot be read or decoded .NotFoundError"):
        trainer.evaluate("validation")
    with pytest.raises(UserError, match="'toy' in .* cannot be read or decoded .NotFoundError"):
        trainer.advance(0, 4, 0)
    assert trainer.feed._at is None


def test_image_that_is_none(toy, tmp_path):
    path = str(tmp_path / "one")
    with tf.io.TFRecordWriter(path) as file:
        for image in (b"\xff\xd8\xff\xe0 not a JPEG", b"GIF89a"):
            file.write(record(image, 0))
    for first in (0, 1):
        data = dataclasses.replace(toy, train=(Shard(path, first, 1),))
        with pytest.raises(UserError, match="cannot be read or decoded .InvalidArgumentError"):
            list(feeds.walk(data, 0, 1, 0))


def test_refuses(toy):
    with pytest.raises(UserError, match="batch_size 71 exceeds the 70 training examples"):
        Trainer(spec(batch_size=71), toy)
    with pytest.raises(UserError, match="more than half"):
        Trainer(spec(validation_size=41), toy)
    assert issubclass(training.DivergedError, UserError)


def test_feed_goes_on_where_it_was(toy):
    feed = Streaming(toy, BASE, tf.distribute.get_strategy())
    (first,) = feed.begin(0, 2, 0)
    first.get_next(), first.get_next()
    assert feed.begin(2, 4, 0)[0] is first
    assert feed.begin(2, 4, 0)[0] is not first  # it is at step 4 now
    assert feed.begin(4, 5, 1)[0] is not first


def test_scores_are_taken_on_the_first_of_each_class_that_the_stream_has(tmp_path):
    data = written(tmp_path, 5)
    s = Spec(
        recipe="one_shot", dataset="imagenet2012", model="lenet_20_10", validation_size=HELD,
        batch_size=BATCH, train_steps=4, eval_every=4, compile="off", scope="global",
        samples_per_class=3, score_batch_size=6, density=(0.5,),
    )  # fmt: skip
    found = picking.batches(s, data, seed=0)
    assert [len(labels) for _, labels in found] == [5, 5, 5]
    assert all(sorted(labels) == [0, 1, 2, 3, 4] for _, labels in found)
    parts = [zip(*part, strict=True) for part in feeds.walk(data, HELD, 6, 0)]
    walked = [pair for part in parts for pair in part]
    for label in range(5):
        first = [x for x, y in walked if y == label][:3]
        taken = [x[list(y).index(label)] for x, y in found]
        for x in first:
            away = np.abs(np.stack(taken) - (x / 255 - 0.5) / 0.25).max((1, 2, 3))
            assert away.min() < 1e-5 < np.sort(away)[1]
    with pytest.raises(UserError, match="samples_per_class 40 cannot be had: class 0 has"):
        picking.batches(dataclasses.replace(s, samples_per_class=40), data, 0)
    rows = experiment.one_shot(s, tmp_path / "run", data)
    assert [r["density"] for r in rows] == pytest.approx([0.5], abs=1e-3)
