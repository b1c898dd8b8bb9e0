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
from lth_tf.datasets import cache, tfds
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
        (data.train_images, data.train_labels, TRAIN),
        (data.test_images, data.test_labels, TEST),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape == (count, 4, 4, 1)
        assert (images == np.arange(count).reshape(-1, 1, 1, 1)).all()
        assert (labels == np.arange(count) % 10).all()


def assert_moments(data: datasets.Dataset, tolerance: float) -> None:
    """The constants are those of the training images, computed from exact histograms."""
    levels = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        pixels = data.train_images[..., channel].reshape(-1)
        share = np.bincount(pixels, minlength=256) / pixels.size
        assert mean == pytest.approx(share @ levels, abs=tolerance)
        variance = share @ (levels - share @ levels) ** 2
        assert std == pytest.approx(variance**0.5, abs=tolerance)


# Registry.


def test_names():
    assert list(datasets.DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10"]
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
    assert data.train_images.shape == (1437, 8, 8, 1)
    assert data.test_images.shape == (360, 8, 8, 1)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.shape == (1437,) and data.test_labels.shape == (360,)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.classes == 10
    assert data.train_images.min() == 0 and data.train_images.max() == 255


def test_digits_split_is_stratified_shuffled_and_disjoint():
    data = datasets.load("digits")
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (np.abs(test - (train + test) * 360 / 1797) < 1).all()
    assert len(np.unique(data.train_labels[:30])) > 5  # not sorted by class
    seen = [image.tobytes() for image in (*data.train_images, *data.test_images)]
    assert len(set(seen)) == 1797


def test_digits_moments():
    assert_moments(datasets.load("digits"), 5e-4)


def test_digits_are_those_of_scikit_learn():
    original = pytest.importorskip("sklearn.datasets").load_digits()
    data = datasets.load("digits")
    images = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
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


# The cache.


def test_second_read_does_without_tensorflow(tiny, own_cache):
    datasets.load("mnist", str(tiny))
    code = (
        "import sys; from lth_tf import datasets; "
        "print(int(datasets.load('mnist', sys.argv[1]).train_images.sum())); "
        "print({'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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


# The real sets, where they are.


@pytest.mark.parametrize(
    ("name", "train", "test", "train_counts", "tolerance"),
    [
        ("mnist", (60000, 28, 28, 1), (10000, 28, 28, 1), MNIST_COUNTS, 5e-4),
        ("fashion_mnist", (60000, 28, 28, 1), (10000, 28, 28, 1), [6000] * 10, 5e-4),
        # Copies of CIFAR-10 that were stored as JPEG have slightly smoother colours.
        ("cifar10", (50000, 32, 32, 3), (10000, 32, 32, 3), [5000] * 10, 2e-3),
    ],
)
def test_real_sets(name, train, test, train_counts, tolerance):
    data = real(name)
    assert data.name == name and data.classes == 10
    assert data.train_images.shape == train and data.test_images.shape == test
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert np.bincount(data.train_labels).tolist() == train_counts
    assert data.test_labels.shape == test[:1] and len(np.unique(data.test_labels)) == 10
    assert_moments(data, tolerance)
    start = time.monotonic()
    again = real(name)
    assert time.monotonic() - start < 2  # from the cache
    assert (again.train_images == data.train_images).all()
    assert (again.test_labels == data.test_labels).all()
