"""Data sets: in memory as numpy arrays, or streamed from disk where they do not fit.

`digits` ships here, Tiny ImageNet comes from its archive, the others come through tfds.
Nothing here imports TensorFlow until a data set has to be read for the first time.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lth_tf.datasets import checks, tfds, tiny_imagenet
from lth_tf.datasets.stream import Streamed
from lth_tf.errors import UserError
from lth_tf.registry import Registry


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels, in the order of their source.

    Attributes:
      name: its key in DATASETS.
      train_inputs, test_inputs: [n, ...]: images as uint8 [n, height, width, channels], or
        floats, or integers of another type, see `scaling.scaled`.
      train_labels, test_labels: what the task makes of them; for classification integers [n] or
        [n, 1], 0 to classes - 1, which become int32 [n]; for language integers [n, t].
      classes: how many numbers a network puts out.
      mean, std: along the last axis, of the training inputs; of images as pixels from 0 to 1.
      task: what a network is trained for, a key of `tasks.TASKS`.
    """

    name: str
    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str = "classification"

    def __post_init__(self) -> None:
        """Raises UserError for what no network can be trained on."""
        for field, value in checks.checked(self).items():
            object.__setattr__(self, field, value)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input; of an image height, width and channels."""
        return tuple(self.train_inputs.shape[1:])


DATASETS: Registry[Callable[[str | None], Dataset | Streamed]] = Registry("data set")


def require(given: Any) -> None:
    """Raises UserError for what is no data set."""
    if not isinstance(given, (Dataset, Streamed)):
        raise UserError(
            f"dataset must be what lth_tf.datasets.load returns, not {type(given).__name__}"
        )


def load(name: str, data_dir: str | None = None) -> Any:
    """Returns the data set of that name: a Dataset, or Streamed where that is too large.

    Args:
      name: a key of DATASETS.
      data_dir: the folder of tensorflow-datasets; by default $TFDS_DATA_DIR, else
        ~/tensorflow_datasets.

    Raises:
      UserError: no such data set, or it is not in the folder and cannot be downloaded.

    >>> load("digits").train_inputs.shape
    (1437, 8, 8, 1)
    """
    return DATASETS[name](data_dir)


def _images(name: str, arrays: Mapping[str, np.ndarray], **about: Any) -> Dataset:
    """A Dataset of `tfds.ARRAYS`."""
    parts: dict[str, Any] = {key.replace("images", "inputs"): a for key, a in arrays.items()}
    return Dataset(name, **parts, **about)


@DATASETS.register("digits")
def digits(data_dir: str | None = None) -> Dataset:
    """1,437 + 360 handwritten digits of 8x8 pixels, out of the package; `data_dir` is not used.

    Source: Alpaydin and Kaynak (1998), UCI; licence, scaling and split are in digits.md.
    """
    file = importlib.resources.files("lth_tf.datasets").joinpath("digits.npz")
    with file.open("rb") as stream, np.load(stream) as stored:
        arrays = {name: stored[name] for name in tfds.ARRAYS}
    for name in ("train_labels", "test_labels"):
        arrays[name] = arrays[name].astype(np.int32)
    return _images("digits", arrays, classes=10, mean=(0.3054,), std=(0.3760,))


@DATASETS.register("mnist")
def mnist(data_dir: str | None = None) -> Dataset:
    """60,000 + 10,000 handwritten digits of 28x28 pixels (LeCun, Cortes and Burges, 1998)."""
    arrays = tfds.arrays("mnist", data_dir)
    return _images("mnist", arrays, classes=10, mean=(0.1307,), std=(0.3081,))


@DATASETS.register("fashion_mnist")
def fashion_mnist(data_dir: str | None = None) -> Dataset:
    """60,000 + 10,000 clothes of 28x28 pixels (Xiao, Rasul and Vollgraf, 2017)."""
    arrays = tfds.arrays("fashion_mnist", data_dir)
    return _images("fashion_mnist", arrays, classes=10, mean=(0.2860,), std=(0.3530,))


@DATASETS.register("cifar10")
def cifar10(data_dir: str | None = None) -> Dataset:
    """50,000 + 10,000 photographs of 32x32 pixels in colour (Krizhevsky, 2009)."""
    arrays = tfds.arrays("cifar10", data_dir)
    return _images(
        "cifar10",
        arrays,
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


@DATASETS.register("cifar100")
def cifar100(data_dir: str | None = None) -> Dataset:
    """50,000 + 10,000 photographs of 32x32 pixels in colour, 100 fine labels (Krizhevsky, 2009)."""
    return _images(
        "cifar100",
        tfds.arrays("cifar100", data_dir),
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


@DATASETS.register("tiny_imagenet")
def tiny(data_dir: str | None = None) -> Dataset:
    """100,000 + 10,000 photographs of 64x64 pixels in colour (Stanford's CS231n, 2015).

    1.4 GB of memory; `data_dir` is or has the folder tiny-imagenet-200.
    """
    return _images(
        "tiny_imagenet",
        tiny_imagenet.arrays(data_dir),
        classes=200,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    )


LENGTH = 64  # characters of an example of tiny_shakespeare


@DATASETS.register("tiny_shakespeare")
def tiny_shakespeare(data_dir: str | None = None) -> Dataset:
    """16,556 + 871 pieces of 64 characters of Shakespeare's plays (Karpathy, 2015).

    The task is 'language': what follows each character. Characters are numbered in the order of
    their codes, the 65 of the whole text; pieces follow each other without overlap. The training
    part is the text that tensorflow-datasets has for training, then that for validation.
    """
    texts = tfds.texts("tiny_shakespeare", data_dir)
    alphabet = np.unique(np.concatenate(list(texts.values())))
    pieces = {name: _pieces(np.searchsorted(alphabet, text)) for name, text in texts.items()}
    inputs, labels = (
        np.concatenate([pieces[name][i] for name in ("train", "validation")]) for i in range(2)
    )
    return Dataset(
        "tiny_shakespeare", inputs, labels, *pieces["test"], classes=len(alphabet), mean=(0.0,),
        std=(1.0,), task="language",
    )  # fmt: skip


def _pieces(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels int32 [n, LENGTH] of a text, each label the number after its input."""
    n = (len(numbers) - 1) // LENGTH
    inputs, labels = (
        numbers[first : first + n * LENGTH].reshape(n, LENGTH).astype(np.int32) for first in (0, 1)
    )
    return inputs, labels


@DATASETS.register("imagenet2012")
def imagenet2012(data_dir: str | None = None) -> Streamed:
    """1,281,167 + 50,000 photographs in colour, at 224x224 pixels (Russakovsky et al., 2015).

    The test part is the validation set: the labels of the test set were never published.
    """
    folder = tfds.resolve(data_dir) / "imagenet2012"
    version = tfds.prepared(folder)
    if version is None:
        raise UserError(
            f"data set 'imagenet2012' is not in {folder}, and nobody may download it without an "
            f"account: get its archives at image-net.org, have tensorflow-datasets prepare them "
            f"(see its catalogue under imagenet2012), and point --data_dir or TFDS_DATA_DIR to the "
            f"folder that has imagenet2012/<version>"
        )
    return Streamed(
        "imagenet2012",
        train=tfds.shards(folder / version, "train"),
        test=tfds.shards(folder / version, "validation"),
        classes=1000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        input_shape=(224, 224, 3),
    )
