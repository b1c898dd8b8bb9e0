"""datasets: what ships here is exact, what tfds prepared is read in order, the cache is safe."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import logging

from lth_tf import datasets
from lth_tf.datasets import cache, stream, tfds, tiny_imagenet
from lth_tf.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN, TEST = 90, 10  # examples of the tiny prepared set
MNIST_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def prepared_folder() -> str | None:
    """Returns where real prepared data are on this machine, or None."""
    given = os.environ.get("TFDS_DATA_DIR")
    beside = ROOT.parent / "shared" / "data"
    return given or (str(beside) if beside.is_dir() else None)


def real(name: str) -> datasets.Dataset:
    """Returns a real data set, or skips the test for the lack of it."""
    folder = prepared_folder()
    if folder is None:
        pytest.skip("no prepared data: TFDS_DATA_DIR is not set and ../shared/data is not there")
    if tfds.prepared(pathlib.Path(folder) / name) is None:
        pytest.skip(f"{name} is not prepared in {folder}")
    return datasets.load(name, folder)


@pytest.fixture(autouse=True, scope="module")
def _module_cache(tmp_path_factory):
    """No test reads or writes the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LTH_TF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A tfds folder with a data set 'mnist' 3.0.1 in several shards; label i % 10, pixels i."""
    from lth_tf import compat  # noqa: F401

    import tensorflow_datasets  # isort: skip

    core = tensorflow_datasets.core
    with core.registered.skip_registration():

        class Mnist(core.GeneratorBasedBuilder):
            VERSION = core.Version("3.0.1")

            def _info(self):
                image = tensorflow_datasets.features.Image(shape=(4, 4, 1))
                label = tensorflow_datasets.features.ClassLabel(num_classes=10)
                return core.DatasetInfo(
                    builder=self,
                    features=tensorflow_datasets.features.FeaturesDict(
                        {"image": image, "label": label}
                    ),
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(TRAIN),
                    "test": self._generate_examples(TEST),
                }

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 10}

    folder = tmp_path_factory.mktemp("tfds")
    config = tensorflow_datasets.download.DownloadConfig(num_shards=3)
    Mnist(data_dir=folder).download_and_prepare(download_config=config)
    source = folder / "mnist" / "3.0.1"
    assert len(list(source.glob("*train*"))) == 3
    # Written in order, read like the published sets, whose shards tfds would interleave.
    info = json.loads((source / tfds.INFO).read_text())
    assert info.pop("disableShuffling")
    (source / tfds.INFO).write_text(json.dumps(info))
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LTH_TF_CACHE", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Requests go to a port where nobody listens, on machines with a network too."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def assert_tiny(data: datasets.Dataset) -> None:
    for images, labels, count in (
        (data.train_inputs, data.train_labels, TRAIN),
        (data.test_inputs, data.test_labels, TEST),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape == (count, 4, 4, 1)
        assert (images == np.arange(count).reshape(-1, 1, 1, 1)).all()
        assert (labels == np.arange(count) % 10).all()


def assert_moments(data: datasets.Dataset, tolerance: float) -> None:
    """The constants are those of the training images, computed from exact histograms."""
    levels = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        pixels = data.train_inputs[..., channel].reshape(-1)
        share = np.bincount(pixels, minlength=256) / pixels.size
        assert mean == pytest.approx(share @ levels, abs=tolerance)
        variance = share @ (levels - share @ levels) ** 2
        assert std == pytest.approx(variance**0.5, abs=tolerance)


# Registry.


def test_names():
    assert list(datasets.DATASETS) == [
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet",
        "tiny_shakespeare", "imagenet2012",
    ]  # fmt: skip
    with pytest.raises(UserError, match="unknown data set 'minst'.*Did you mean 'mnist'"):
        datasets.load("minst")


def test_dataset_is_frozen_and_compares_by_identity():
    data = datasets.load("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.classes = 3
    assert data == data and data != datasets.load("digits")


# Digits.


def test_digits_shapes_and_types():
    data = datasets.load("digits")
    assert data.train_inputs.shape == (1437, 8, 8, 1)
    assert data.test_inputs.shape == (360, 8, 8, 1)
    assert data.train_inputs.dtype == data.test_inputs.dtype == np.uint8
    assert data.train_labels.shape == (1437,) and data.test_labels.shape == (360,)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.classes == 10
    assert data.train_inputs.min() == 0 and data.train_inputs.max() == 255


def test_digits_split_is_stratified_shuffled_and_disjoint():
    data = datasets.load("digits")
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (np.abs(test - (train + test) * 360 / 1797) < 1).all()
    assert len(np.unique(data.train_labels[:30])) > 5  # not sorted by class
    seen = [image.tobytes() for image in (*data.train_inputs, *data.test_inputs)]
    assert len(set(seen)) == 1797


def test_digits_moments():
    assert_moments(datasets.load("digits"), 5e-4)


def test_digits_are_those_of_scikit_learn():
    original = pytest.importorskip("sklearn.datasets").load_digits()
    data = datasets.load("digits")
    images = np.concatenate([data.train_inputs, data.test_inputs]).reshape(-1, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    ours = np.column_stack([np.rint(images * (16 / 255)).astype(int), labels])
    theirs = np.column_stack([original.data.astype(int), original.target])
    assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert (images == np.rint(ours[:, :64] * 255 / 16)).all()


# Folders of tensorflow-datasets.


def test_order_is_that_of_the_records(tiny, own_cache):
    assert_tiny(datasets.load("mnist", str(tiny)))


def test_tfds_is_silent_under_absl(tiny, own_cache, caplog):
    before = logging.get_verbosity()
    try:
        logging.set_verbosity(logging.INFO)
        datasets.load("mnist", str(tiny))
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
    assert not caplog.records


def test_folder_comes_from_argument_then_environment_then_home(tiny, monkeypatch):
    monkeypatch.setenv("HOME", "/home/nobody")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    assert tfds.resolve("/elsewhere") == pathlib.Path("/elsewhere")
    assert tfds.resolve(None) == tiny
    assert_tiny(datasets.load("mnist"))
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert tfds.resolve(None) == pathlib.Path("/home/nobody/tensorflow_datasets")
    with pytest.raises(UserError, match="gs://bucket.*not a local folder"):
        tfds.resolve("gs://bucket")


def test_newest_finished_version(tmp_path):
    assert tfds.prepared(tmp_path / "absent") is None
    for version in ("3.0.1", "3.0.10", "3.0.9", "backup"):
        (tmp_path / version).mkdir()
        (tmp_path / version / tfds.INFO).touch()
    (tmp_path / "4.0.0").mkdir()
    assert tfds.prepared(tmp_path) == "3.0.10"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_absent_data_fail_fast_and_say_what_to_do(name, tmp_path, own_cache, no_network):
    from lth_tf import compat  # noqa: F401  not part of what is timed

    folder = tmp_path / "data"
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        datasets.load(name, str(folder))
    assert time.monotonic() - start < 5
    for word in (name, str(folder), "no answer from", "--data_dir", "TFDS_DATA_DIR", "digits"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_lost_and_damaged_records(tiny, tmp_path, own_cache):
    shutil.copytree(tiny, tmp_path / "data")
    record = next((tmp_path / "data" / "mnist" / "3.0.1").glob("*test*"))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(UserError, match="mnist/3.0.1 cannot be read.*delete that folder"):
        datasets.load("mnist", str(tmp_path / "data"))
    record.unlink()
    with pytest.raises(UserError, match="mnist/3.0.1 cannot be read.*delete that folder"):
        datasets.load("mnist", str(tmp_path / "data"))
    assert not own_cache.exists()


# Tiny ImageNet.


def jpeg(pixels) -> bytes:
    """A JPEG of one colour, three channels or one grey one."""
    from lth_tf.compat import tf

    return tf.io.encode_jpeg(np.asarray(pixels, np.uint8)).numpy()


WNIDS = ["n03", "n01", "n02"]  # as published, not sorted


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> pathlib.Path:
    """A folder with tiny-imagenet-200 of 3 classes; image i of the 4 + 4 + 4 has the level i."""
    root = tmp_path_factory.mktemp("archive") / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x.JPEG\t0\t0\t1\t1\n")
        for i in range(4):
            channels = 1 if i == 2 else 3
            path = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            path.write_bytes(jpeg(np.full((64, 64, channels), 20 * label + i)))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(["n02", "n03", "n02", "n01"]):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(jpeg(np.full((64, 64, 3), i)))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root.parent


@pytest.fixture
def copied(archive, tmp_path, own_cache) -> pathlib.Path:
    """A copy of tiny-imagenet-200 to damage."""
    return pathlib.Path(shutil.copytree(archive, tmp_path / "data")) / "tiny-imagenet-200"


def assert_archive(data: datasets.Dataset) -> None:
    assert data.train_inputs.dtype == np.uint8 and data.train_inputs.shape == (12, 64, 64, 3)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    levels = data.train_inputs.reshape(12, -1)
    assert (levels == levels[:, :1]).all()  # the grey ones too, in three channels
    assert levels[:, 0].tolist() == [20 * label + i for label in range(3) for i in range(4)]
    assert data.test_labels.tolist() == [2, 0, 2, 1]
    assert (data.test_inputs == np.arange(4).reshape(4, 1, 1, 1)).all()
    assert data.classes == 200 and data.input_shape == (64, 64, 3)


def test_tiny_imagenet_is_found_beside_or_within(archive, own_cache, monkeypatch):
    assert_archive(datasets.load("tiny_imagenet", str(archive)))
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(tiny_imagenet, "decode", None)  # from the cache, by any path
    assert_archive(datasets.load("tiny_imagenet", str(archive / "tiny-imagenet-200")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(archive))
    assert_archive(datasets.load("tiny_imagenet"))


def test_tiny_imagenet_of_other_files_is_another_entry(copied, own_cache):
    datasets.load("tiny_imagenet", str(copied))
    shutil.copy(copied / "val/images/val_0.JPEG", copied / "train/n01/images/n01_9.JPEG")
    assert len(datasets.load("tiny_imagenet", str(copied)).train_labels) == 13
    lines = (copied / "val/val_annotations.txt").read_text()
    (copied / "val/val_annotations.txt").write_text(lines.replace("n02", "n01"))
    assert datasets.load("tiny_imagenet", str(copied)).test_labels.tolist() == [1, 0, 1, 1]
    assert len(list(own_cache.iterdir())) == 3


def replaced(path: str, old: str, new: str):
    return lambda root: (root / path).write_text((root / path).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "wnids.txt").unlink(), "neither .*wnids.txt.*unpack.*--data_dir"),
        (lambda root: (root / "wnids.txt").write_text(""), "wnids.txt is empty"),
        (lambda root: shutil.rmtree(root / "train/n01"), "no images in .*train/n01/images"),
        (
            lambda root: (root / "val/val_annotations.txt").unlink(),
            "val_annotations.txt cannot be read",
        ),
        (
            replaced("val/val_annotations.txt", "n03", "n77"),
            "line 2: 'n77' is none of the 3 classes",
        ),
        (replaced("val/val_annotations.txt", "\t", " "), "line 1: '' is none of the 3 classes"),
        (
            lambda root: (root / "val/images/val_3.JPEG").unlink(),
            "line 4: there is no image 'val_3.JPEG'",
        ),
        (
            lambda root: (root / "train/n02/images/n02_1.JPEG").write_bytes(b"GIF?"),
            "n02_1.JPEG cannot be decoded .*unpack",
        ),
        (
            lambda root: (root / "val/images/val_1.JPEG").write_bytes(jpeg(np.zeros((32, 64, 3)))),
            "val_1.JPEG has 32x64 pixels, not the 64x64",
        ),
    ],
)
def test_damaged_tiny_imagenet(copied, own_cache, damage, words):
    damage(copied)
    with pytest.raises(UserError, match=words) as caught:
        datasets.load("tiny_imagenet", str(copied.parent))
    assert "\n" not in str(caught.value)
    assert not own_cache.exists()


# ImageNet, in the form of tensorflow-datasets.


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> pathlib.Path:
    """A tfds folder with an imagenet2012 5.1.0 of 9 + 4 grey JPEGs of different sizes."""
    from lth_tf import compat  # noqa: F401

    import tensorflow_datasets  # isort: skip

    core, features = tensorflow_datasets.core, tensorflow_datasets.features
    with core.registered.skip_registration():

        class Imagenet2012(core.GeneratorBasedBuilder):
            VERSION = core.Version("5.1.0")

            def _info(self):
                kinds = {
                    "image": features.Image(encoding_format="jpeg"),
                    "label": features.ClassLabel(num_classes=1000),
                    "file_name": features.Text(),
                }
                return core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in ("train", "validation")}

            def _generate_examples(self, split):
                for i in range(9 if split == "train" else 4):
                    pixels = np.full((30 + i, 40, 3), 10 * i, np.uint8)
                    name = f"{split}_{i}.JPEG"
                    yield name, {"image": pixels, "label": 100 * i, "file_name": name}

    folder = tmp_path_factory.mktemp("imagenet")
    config = tensorflow_datasets.download.DownloadConfig(num_shards=2)
    Imagenet2012(data_dir=folder).download_and_prepare(download_config=config)
    return folder


def test_imagenet_is_streamed(imagenet):
    data = datasets.load("imagenet2012", str(imagenet))
    assert data.input_shape == (224, 224, 3) and data.classes == 1000
    assert [len(data.train), len(data.test)] == [2, 2]
    assert [stream.size(data.train), stream.size(data.test)] == [9, 4]
    images, labels = next(iter(stream.walk(data, data.train, 9, seed=0)))
    assert images.dtype == np.uint8 and images.shape == (9, 224, 224, 3)
    assert labels.dtype == np.int32 and sorted(labels) == [100 * i for i in range(9)]
    assert (images == (labels // 10).reshape(9, 1, 1, 1)).all()


def test_imagenet_that_is_not_there_or_not_complete(imagenet, tmp_path):
    with pytest.raises(UserError, match="is not in .*/imagenet2012.*image-net.org.*--data_dir"):
        datasets.load("imagenet2012", str(tmp_path))
    source = pathlib.Path(shutil.copytree(imagenet, tmp_path / "data")) / "imagenet2012/5.1.0"
    min(source.glob("*validation*")).unlink()
    with pytest.raises(UserError, match="1 of the 2 files of split 'validation' .*00000-of-00002"):
        datasets.load("imagenet2012", str(tmp_path / "data"))
    info = (source / tfds.INFO).read_text()
    (source / tfds.INFO).write_text(info.replace('"tfrecord"', '"array_record"'))
    with pytest.raises(UserError, match="stored as array_record; only tfrecord can be streamed"):
        datasets.load("imagenet2012", str(tmp_path / "data"))
    (source / tfds.INFO).write_text(info.replace('"validation"', '"test"'))
    with pytest.raises(UserError, match="no readable split 'validation'"):
        datasets.load("imagenet2012", str(tmp_path / "data"))


# The cache.


def test_second_read_does_without_tensorflow(tiny, own_cache):
    datasets.load("mnist", str(tiny))
    code = (
        "import sys; from lth_tf import datasets; "
        "print(int(datasets.load('mnist', sys.argv[1]).train_inputs.sum())); "
        "print({'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == [str(16 * sum(range(TRAIN))), "set()"]
    assert done.stderr == ""


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other arrays"])
def test_damaged_file_is_rebuilt(tiny, own_cache, damage):
    datasets.load("mnist", str(tiny))
    (path,) = own_cache.iterdir()
    good = path.read_bytes()
    if damage == "other arrays":
        with open(path, "wb") as file:
            np.savez(file, labels=np.arange(3))
    else:
        middle = len(good) // 2
        bad = {
            "truncated": good[:middle],
            "flipped": good[:200] + bytes([good[200] ^ 1]) + good[201:],
            "empty": b"",
        }
        path.write_bytes(bad[damage])
    assert cache.read(path, tfds.ARRAYS) is None
    assert_tiny(datasets.load("mnist", str(tiny)))
    assert list(own_cache.iterdir()) == [path]
    assert cache.read(path, tfds.ARRAYS) is not None


def test_other_folder_or_other_data_is_another_entry(tiny, tmp_path, own_cache):
    datasets.load("mnist", str(tiny))
    shutil.copytree(tiny, tmp_path / "data")
    datasets.load("mnist", str(tmp_path / "data"))
    assert len(list(own_cache.iterdir())) == 2
    info = tmp_path / "data" / "mnist" / "3.0.1" / tfds.INFO
    info.write_text(info.read_text() + "\n")
    datasets.load("mnist", str(tmp_path / "data"))
    assert len(list(own_cache.iterdir())) == 3


def test_same_folder_by_another_path_is_the_same_entry(tiny, tmp_path, own_cache):
    datasets.load("mnist", str(tiny))
    (tmp_path / "link").symlink_to(tiny)
    datasets.load("mnist", str(tmp_path / "link"))
    assert len(list(own_cache.iterdir())) == 1


def test_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # permissions would not stop root
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "file" / "cache"))
    assert_tiny(datasets.load("mnist", str(tiny)))


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    cache.write(tmp_path / "x.npz", {})
    assert not list(tmp_path.iterdir())


def test_cache_folder_names(monkeypatch):
    monkeypatch.setenv("HOME", "/home/nobody")
    monkeypatch.setenv("LTH_TF_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.folder() == pathlib.Path("/a")
    monkeypatch.delenv("LTH_TF_CACHE")
    assert cache.folder() == pathlib.Path("/b/lth_tf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == pathlib.Path("/home/nobody/.cache/lth_tf")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 50_000, '{"splits": 3}', "\xff"])
def test_information_that_is_damaged(tiny, imagenet, tmp_path, own_cache, text):
    for source, name in ((tiny, "mnist"), (imagenet, "imagenet2012")):
        shutil.copytree(source / name, tmp_path / name)
        (info,) = (tmp_path / name).glob(f"*/{tfds.INFO}")
        info.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="prepare (it|or copy that folder|or copy it) again"):
            datasets.load(name, str(tmp_path))
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("denied", ["mnist", "mnist/3.0.1"])
def test_folders_that_may_not_be_read_are_not_absent(tiny, own_cache, monkeypatch, denied):
    """To root nothing is denied, so that the system is asked in vain in many a container."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != str(tiny / denied) and access(path, mode)
    )
    with pytest.raises(UserError, match=f"{denied} cannot be read: permission denied"):
        datasets.load("mnist", str(tiny))


def test_records_that_were_replaced_are_another_entry(tiny, tmp_path, own_cache):
    """By others of the same size, and then with the same time."""
    shutil.copytree(tiny, tmp_path / "data")
    datasets.load("mnist", str(tmp_path / "data"))
    record = sorted((tmp_path / "data" / "mnist" / "3.0.1").glob("*train*"))[0]
    os.utime(record, (1, 1))
    datasets.load("mnist", str(tmp_path / "data"))
    assert len(list(own_cache.iterdir())) == 2


def test_no_flipped_bit_of_the_cache_is_loaded_or_blocks(tmp_path):
    """Of the directory of the archive, too, which has no checksum of its own."""
    path, arrays = tmp_path / "x.npz", {"a": np.arange(3), "b": np.arange(3) + 7}
    cache.write(path, arrays)
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        found = cache.read(path, arrays)
        assert found is None or all((found[n] == a).all() for n, a in arrays.items())
    path.write_bytes(whole.replace(b"a.npy", b"c.npy").replace(b"b.npy", b"a.npy")
                     .replace(b"c.npy", b"b.npy"))  # fmt: skip
    assert cache.read(path, arrays) is None


# What is given in memory.


def made(**changes):
    rng = np.random.default_rng(0)
    given = {
        "train_inputs": rng.integers(0, 256, (20, 4, 4, 1), np.uint8),
        "train_labels": np.arange(20) % 3,
        "test_inputs": rng.integers(0, 256, (6, 4, 4, 1), np.uint8),
        "test_labels": np.arange(6) % 3,
        "classes": 3, "mean": (0.5,), "std": (0.3,),
    }  # fmt: skip
    return datasets.Dataset("own", **{**given, **changes})


def test_labels_of_any_integer_type_and_of_a_column_are_taken():
    for labels in (np.arange(20) % 3, (np.arange(20) % 3).astype(np.uint8)[:, None],
                   list(np.arange(20) % 3)):  # fmt: skip
        found = made(train_labels=labels)
        assert found.train_labels.dtype == np.int32 and found.train_labels.shape == (20,)
        assert (found.train_labels == np.arange(20) % 3).all()
    kept = np.arange(20, dtype=np.int32) % 3
    assert made(train_labels=kept).train_labels is kept


NAN = np.zeros((20, 4, 4, 1), np.float32)
NAN[7, 0] = np.nan


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_labels": np.arange(20) % 4}, "the train label 3; with 3 classes .* from 0 to 2"),
        ({"test_labels": np.arange(6) - 1}, "the test label -1; with 3 classes"),
        ({"train_labels": np.zeros((20, 3))}, r"labels of shape \[20, 3\] and type float64"),
        ({"train_labels": np.zeros(20)}, "type float64; give one whole number"),
        ({"train_labels": np.zeros(19, int)}, "20 train inputs and 19 labels"),
        ({"classes": 1, "train_labels": np.zeros(20, int)}, r"1 class\(es\); a network needs two"),
        ({"std": (0.0,)}, r"the std \[0.0\]; give finite numbers above 0"),
        ({"std": (0.1, 0.2)}, r"a std of 2 number\(s\); give one"),
        ({"mean": (np.nan,)}, r"the mean \[nan\]; give finite numbers"),
        ({"test_inputs": np.zeros((6, 4, 5, 1), np.uint8)}, r"test inputs of \[4, 5, 1\]"),
        ({"test_inputs": np.zeros((6, 4, 4, 1))}, r"type uint8, but test .* float64; give both"),
        ({"train_inputs": NAN, "test_inputs": NAN[:6]}, "NaN or infinite, the first in example 7"),
        ({"train_inputs": np.zeros((0, 4, 4, 1))}, r"train inputs of shape \[0, 4, 4, 1\]"),
        ({"train_inputs": np.full((20, 2), "a")}, "train inputs of type <U1"),
    ],
)
def test_data_that_nothing_can_be_learnt_of_are_refused_where_they_enter(changes, message):
    with pytest.raises(UserError, match="data set 'own' has .*" + message):
        made(**changes)


# The real sets, where they are.


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "train", "test", "train_counts", "tolerance"),
    [
        ("mnist", (60000, 28, 28, 1), (10000, 28, 28, 1), MNIST_COUNTS, 5e-4),
        ("fashion_mnist", (60000, 28, 28, 1), (10000, 28, 28, 1), [6000] * 10, 5e-4),
        # Copies of CIFAR-10 that were stored as JPEG have slightly smoother colours.
        ("cifar10", (50000, 32, 32, 3), (10000, 32, 32, 3), [5000] * 10, 2e-3),
        ("cifar100", (50000, 32, 32, 3), (10000, 32, 32, 3), [500] * 100, 2e-3),
    ],
)
def test_real_sets(name, train, test, train_counts, tolerance):
    data = real(name)
    assert data.name == name and data.classes == len(train_counts)
    assert data.train_inputs.shape == train and data.test_inputs.shape == test
    assert data.train_inputs.dtype == data.test_inputs.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert np.bincount(data.train_labels).tolist() == train_counts
    assert data.test_labels.shape == test[:1] and len(np.unique(data.test_labels)) == data.classes
    assert_moments(data, tolerance)
    start = time.monotonic()
    again = real(name)
    assert time.monotonic() - start < 2  # from the cache
    assert (again.train_inputs == data.train_inputs).all()
    assert (again.test_labels == data.test_labels).all()
