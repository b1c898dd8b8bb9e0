"""Streamed data: any step without replay, the same network input as from memory, clear errors."""

import ctypes
import dataclasses
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
import synthetic
from rich.console import Console

from lth_tf import datasets, experiments, masks, training
from lth_tf.bench import stream as bench_stream
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, crops, stream
from lth_tf.datasets.stream import Shard, Streamed
from lth_tf.errors import UserError
from lth_tf.experiments import picking
from lth_tf.spec import Spec
from lth_tf.training import Trainer, feeds, initial_weights
from lth_tf.training.feeds import Streaming

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


def label_of(serialised):
    return tf.train.Example.FromString(serialised).features.feature["label"].int64_list.value[0]


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


def batches(data, seed, step, count, resized=False, place=(0, 1)):
    train = feeds.shards(data, HELD)["train"]
    found = stream.training(data, train, BATCH, seed, step, resized, place)
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
    # Four shards have few orders, so some pairs are alike.
    assert np.median(np.abs(np.corrcoef(orders) - np.eye(9))) < 0.4


def test_any_step_is_reached_without_replay(toy):
    whole = batches(toy, 3, 0, 2 * STEPS + 2, resized=True)
    tf.random.set_seed(7)
    try:
        for step in (0, STEPS - 1, STEPS, STEPS + 3):
            for found, wanted in zip(batches(toy, 3, step, 2, True), whole[step:], strict=False):
                assert same(found, wanted)
    finally:
        tf.random.set_seed(None)


def test_skipped_records_are_not_decoded(toy, tmp_path):
    path = str(tmp_path / "one")
    with tf.io.TFRecordWriter(path) as file:
        for label in range(2 * BATCH):
            file.write(record(encoded(label).numpy() if label != 5 else b"no JPEG", label))
    shards = [Shard(path, 0, 2 * BATCH)]
    lane = stream.epochs(shards, 0, 0, 0, 1, 2 * BATCH).take(2 * BATCH)
    order = [label_of(r.numpy()) for r in lane]
    bad = order.index(5) // BATCH
    for step in (0, 1):
        found = iter(stream.training(toy, shards, BATCH, 0, step, False))
        if step <= bad:
            with pytest.raises(tf.errors.InvalidArgumentError):
                for _ in range(2):
                    next(found)
        else:
            assert next(found)[1].numpy().tolist() == order[BATCH:]


def test_walk_sees_each_record_once_in_an_order_of_the_seed_and_not_augmented(toy):
    orders = []
    for batch, seed in ((BATCH, 3), (7, 3), (BATCH, 4)):
        found = list(feeds.walk(toy, HELD, batch, seed))
        assert [len(y) for _, y in found[:-1]] == [batch] * (-(-TRAIN // batch) - 1)
        assert {(x.dtype, y.dtype) for x, y in found} == {(np.dtype("u1"), np.dtype("i4"))}
        orders.append(np.concatenate([y for _, y in found]).tolist())
        assert sorted(orders[-1]) == list(range(TRAIN))
    assert orders[0] == orders[1] != orders[2]
    middle = dict(zip(orders[2], np.concatenate([x for x, _ in found]), strict=True))
    for images, labels in batches(toy, 3, 0, 2):
        assert same(images, [middle[y] for y in labels])


# Workers.


def test_lanes_are_equal_parts_of_an_epoch(toy):
    shards = feeds.shards(toy, HELD)["train"]
    assert [s.length for s in shards] == [20, 25, 15, 10]
    assert [stream.lanes(shards, b) for b in (1, 2, 6, 12, 64)] == [1, 2, 2, 4, 4]
    assert [stream.lanes(shards * 9, b) for b in (256, 250, 8)] == [16, 2, 8]
    whole = {(s.path, s.first + i) for s in shards for i in range(s.length)}
    left_out = set()
    for epoch in range(4):
        found = []
        for number in range(4):
            columns = (c.numpy().tolist() for c in stream.lane(shards, 5, epoch, number, 4))
            pieces = list(zip(*columns, strict=True))
            assert sum(length for *_, length in pieces) == TRAIN // 4
            found += [(p.decode(), first + i) for p, first, n in pieces for i in range(n)]
        assert len(set(found)) == len(found) and set(found) < whole
        left_out.add(frozenset(whole - set(found)))
    assert len(left_out) > 1


@pytest.mark.slow
def test_any_number_of_workers_sees_the_same_batches(toy):
    # Two ends of an epoch are passed.
    step, count = STEPS - 2, STEPS + 3
    whole = batches(toy, 3, step, count, resized=True)
    # Four lanes: 2 and 4 divide them, 3 and 12 do not.
    for workers, some in ((2, [1]), (3, [1]), (4, range(4)), (12, [7])):
        share = BATCH // workers
        for w in some:
            mine = batches(toy, 3, step, count, True, (w, workers))
            for found, wanted in zip(mine, whole, strict=True):
                assert same(found, [array[w * share : (w + 1) * share] for array in wanted])


def test_a_worker_opens_the_files_of_its_lanes_only(toy, tmp_path):
    folder = pathlib.Path(shutil.copytree(pathlib.Path(toy.train[0].path).parent, tmp_path / "all"))
    shards = [s._replace(path=str(folder / pathlib.Path(s.path).name)) for s in toy.train]
    lanes = [{p.decode() for p in stream.lane(shards, 1, 0, g, 4)[0].numpy()} for g in range(4)]
    for place, own in (((2, 4), [2]), ((1, 2), [2, 3]), ((1, 3), [1, 2])):
        needed = set.union(*(lanes[g] for g in own))
        others = {s.path for s in shards} - needed
        assert others
        found = stream.training(toy, shards, BATCH, 1, 0, False, place)
        for path in others:
            os.rename(path, path + "~")
        assert len(list(found.take(80 // BATCH))) == 80 // BATCH  # the first epoch
        with pytest.raises(tf.errors.NotFoundError):
            list(found.take(5 * 80 // BATCH))  # in others the lanes are others
        for path in others:
            os.rename(path + "~", path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "part, workers, n", [("test", 1, 19), ("test", 2, 19), ("train", 3, 70), ("validation", 12, 10)]
)
def test_workers_evaluate_on_parts(toy, part, workers, n):
    shards, seen = feeds.shards(toy, HELD)[part], []
    for w in range(workers):
        found = list(stream.evaluation(toy, shards, BATCH, (w, workers)))
        assert [len(y) for _, y in found] == [BATCH // workers] * -(-n // BATCH)
        labels = np.concatenate([y for _, y in found])
        own = [int(y) for y in labels if y >= 0]
        assert abs(len(own) - n / workers) < 1 and own == labels[: len(own)].tolist()
        seen += own
    assert len(set(seen)) == len(seen) == n


def test_replicas_of_workers_see_the_pixels_of_one(toy, monkeypatch):
    """Two workers of two replicas each, one after the other in this process."""
    s = spec(augmentation="flip_crop")
    feed = Streaming(toy, s, tf.distribute.get_strategy())
    whole = feed.batch(feed.take(feed.begin(5, 6, 9), 0), 9, 5)
    shares = []
    for worker in range(2):
        monkeypatch.setattr(feeds, "index_and_count", lambda _: (worker, 2))  # noqa: B023
        extended = types.SimpleNamespace(_get_local_replica_id=lambda i: i % 2)
        strategy = types.SimpleNamespace(num_replicas_in_sync=4, extended=extended)
        feed = Streaming(toy, s, strategy)
        taken = feed.take(feed.begin(5, 6, 9), 0)
        assert len(taken[1]) == BATCH // 2 and feed.blocks("test") == 2
        for replica in (2 * worker, 2 * worker + 1):
            with tf.distribute.ReplicaContext(strategy, replica):
                shares.append(feed.batch(taken, 9, 5))
    assert same([np.concatenate(arrays) for arrays in zip(*shares, strict=True)], whole)


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


@pytest.mark.sampled(1)
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
    """The same examples but for the few that the first epoch leaves out, in its order."""
    (held,) = stream.evaluation(data, feeds.shards(data, HELD)["validation"], HELD)
    (test,) = stream.evaluation(data, data.test, stream.size(data.test))
    blocks = zip(*batches(data, seed, 0, STEPS), held, strict=True)
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
            "train": (data.train_inputs[:-HELD], data.train_labels[:-HELD]),
            "validation": (data.train_inputs[-HELD:], data.train_labels[-HELD:]),
            "test": (data.test_inputs, data.test_labels),
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


@pytest.mark.slow
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
    assert trainer.engine.steps.experimental_get_tracing_count() == 1


@pytest.mark.slow
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


@pytest.mark.sampled(1)
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


@pytest.mark.parametrize("label", [-1, 99])
def test_label_that_is_no_class(toy, tmp_path, label):
    path = str(tmp_path / "one")
    with tf.io.TFRecordWriter(path) as file:
        image = tf.io.encode_jpeg(np.zeros((40, 40, 3), np.uint8)).numpy()
        file.write(record(image, label))
    data = dataclasses.replace(toy, train=(Shard(path, 0, 1),))
    with pytest.raises(UserError, match=f"a label is not from 0 to {toy.classes - 1}"):
        list(feeds.walk(data, 0, 1, 0))


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


@pytest.mark.slow
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
    rows = experiments.one_shot(s, tmp_path / "run", data)
    assert [r["density"] for r in rows] == pytest.approx([0.5], abs=1e-3)


# At size.


def test_synthetic_set_is_read_as_imagenet(tmp_path):
    synthetic.write(tmp_path, 30, 4, pool=3, shapes=((37, 50), (50, 33)), size=2000)
    data = datasets.load("imagenet2012", str(tmp_path))
    assert [s.length for s in data.train] == [7, 8, 7, 8] and stream.size(data.test) == 2
    with pytest.raises(FileExistsError):
        synthetic.write(tmp_path, 30, 4)
    found = [tf.train.Example.FromString(r.numpy()) for r in stream.records(data.train)]
    jpegs = [e.features.feature["image"].bytes_list.value[0] for e in found]
    assert len(set(jpegs)) == 3 and all(1500 < len(jpeg) <= 2000 for jpeg in jpegs)
    assert {tf.io.decode_jpeg(j).shape.as_list()[0] for j in jpegs} == {37, 50}
    ((images, labels),) = stream.walk(data, data.train, 30, 0)
    assert images.shape == (30, 224, 224, 3) and images.std() > 30
    assert len(set(labels)) > 20 and 0 <= labels.min() and labels.max() < 1000


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")
def test_freed_memory_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    places = [libc.malloc(100_000) for _ in range(3000)]
    for place in places:
        libc.memset(place, 1, 100_000)
    for place in places[:-1]:  # the last one keeps the rest from going by itself
        libc.free(place)
    before = resident()
    stream.release()
    libc.free(places[-1])
    assert resident() < before - 200


@pytest.mark.slow
def test_bench_compares_input_and_training(toy):
    s = spec(train_steps=40, eval_every=2, batch_size=6)
    found = bench_stream.stream(s, toy, steps=3, rounds=1)
    assert list(found["images_per_second"]) == [
        "input", "input_resized_crop", "training", "training_streamed",
    ]  # fmt: skip
    assert all(rate > 0 for rate in found["images_per_second"].values())
    assert 0 < found["ratio_streamed"] and found["memory_mb"]["lowest"] > 50
    assert found["memory_mb"]["lowest"] <= found["memory_mb"]["highest"]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(bench_stream.stream_table(found))
    for word in ("input_resized_crop", "training_streamed", "memory"):
        assert word in shown.get(), word
    with pytest.raises(UserError, match="has 5 steps of batch_size 12; more than 5 are needed"):
        bench_stream.stream(spec(), toy, 3, 1)
    with pytest.raises(UserError, match="'digits' lies in memory; give one that is streamed"):
        bench_stream.stream(spec(dataset="digits"), datasets.load("digits"), 3, 1)
