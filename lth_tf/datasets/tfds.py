"""Image data sets out of a tensorflow-datasets folder, decoded once and then cached.

tensorflow_datasets is imported only to decode or to download: a cached read finds the
prepared version by listing the folder.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import numpy as np
from absl import logging

from lth_tf import edge, storage
from lth_tf.datasets import cache
from lth_tf.datasets.stream import Shard
from lth_tf.errors import UserError, brief

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
TEXTS = ("train", "validation", "test")
INFO = "dataset_info.json"  # tfds writes it last: a version folder that has it is finished
DECODING = b"1"  # part of the cache's key: change it whenever decode() gives other arrays


def arrays(name: str, data_dir: str | None = None) -> dict[str, np.ndarray]:
    """Returns the splits `train` and `test` of a data set with features image and label.

    The order is that of the records in the files. Reading for the first time
    initialises TensorFlow's devices: configure logical ones before.

    Args:
      name: as tensorflow-datasets calls it.
      data_dir: see `resolve`.

    Returns:
      ARRAYS -> array: images uint8 [n, height, width, channels], labels int32 [n].

    Raises:
      UserError: not in the folder and not to be downloaded, or not readable.
    """
    return _cached(name, data_dir, ARRAYS, decode)


def texts(name: str, data_dir: str | None = None) -> dict[str, np.ndarray]:
    """Returns the text of each split of a data set with the feature text.

    Args:
      name: as tensorflow-datasets calls it.
      data_dir: see `resolve`.

    Returns:
      TEXTS -> uint8 [n], the bytes of all examples of the split in their order.

    Raises:
      UserError: not in the folder and not to be downloaded, or not readable.
    """
    return _cached(name, data_dir, TEXTS, read_texts)


def _cached(
    name: str, data_dir: str | None, names: tuple[str, ...], read: Callable[..., dict]
) -> dict[str, np.ndarray]:
    """What is read of a prepared data set, kept for the next time."""
    folder = resolve(data_dir)
    version = prepared(folder / name)
    if version is None:
        download(name, folder)
        version = prepared(folder / name)
        if version is None:
            raise RuntimeError(f"tensorflow-datasets prepared {name!r}, but not in {folder}")
    source = folder / name / version
    # By the path alone, other data put there would go unnoticed.
    with storage.reading(source / INFO, "is damaged", "prepare or copy that folder again"):
        info = (source / INFO).read_bytes()
        records = sorted(p for p in source.iterdir() if p.is_file())
        about = DECODING, os.fsencode(source.resolve()), info
        path = cache.folder() / f"{name}-{version}-{cache.key(*about, files=records)}.npz"
    found = cache.read(path, names)
    if found is None:
        found = read(source)
        cache.write(path, found)
    return found


def resolve(data_dir: str | None) -> pathlib.Path:
    """Returns `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      UserError: that is no folder of this machine.
    """
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in given:
        raise UserError(f"data_dir {given!r} is not a local folder; copy the data to one")
    return edge.folder(given)


def prepared(folder: pathlib.Path) -> str | None:
    """Returns the newest version ('3.0.1') that is prepared in `folder`, or None.

    Raises:
      UserError: the folder is there, and this user may not look into it.
    """
    _require_readable(folder)
    versions = [path.parent.name for path in folder.glob(f"*/{INFO}")]
    versions = [v for v in versions if re.fullmatch(r"\d+\.\d+\.\d+", v)]
    return max(versions, key=lambda v: [int(n) for n in v.split(".")], default=None)


def _require_readable(folder: pathlib.Path) -> None:
    """Raises UserError for a folder, or one in it, that is there and cannot be looked into."""
    inner = [p for p in folder.iterdir() if p.is_dir()] if os.access(folder, os.R_OK) else []
    for each in (folder, *inner):
        if each.is_dir() and not os.access(each, os.R_OK | os.X_OK):
            raise UserError(
                f"the data in {each} cannot be read: permission denied; have its owner give it "
                "(chmod -R a+rX), or choose another --data_dir"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings of tfds get through, which under absl's app tells of every step it takes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@_quiet()
def decode(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns ARRAYS from a folder of prepared records, without network and in their order.

    Raises:
      UserError: records are missing or damaged.
    """
    from lth_tf.compat import tf  # before tfds, which would import tf in the wrong order

    import tensorflow_datasets as tfds  # isort: skip

    @tfds.decode.make_decoder()
    def accurate(encoded, feature):
        # tfds' own decoder takes libjpeg's fast transform, which darkens red and blue of a
        # CIFAR-10 kept as JPEG by 0.005. For PNG, which this op reads too, there is no difference.
        return tf.io.decode_jpeg(encoded, channels=feature.shape[-1], dct_method="INTEGER_ACCURATE")

    found = {}
    try:
        builder = tfds.builder_from_directory(source)
        # 8 calls, since tf.data takes longer to tune their number than to read all.
        in_order = tfds.ReadConfig(interleave_cycle_length=1, num_parallel_calls_for_decode=8)
        for split in ("train", "test"):
            with tf.device("cpu:0"):
                images, labels = builder.as_dataset(
                    split=split,
                    batch_size=-1,
                    shuffle_files=False,
                    as_supervised=True,
                    read_config=in_order,
                    decoders={"image": accurate()},
                )
            found[f"{split}_images"] = images.numpy()
            found[f"{split}_labels"] = labels.numpy().astype(np.int32)
    except Exception as error:  # a damaged dataset_info.json raises anything
        raise _unreadable(source, error) from error
    return found


@_quiet()
def read_texts(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns TEXTS from a folder of prepared records, without network.

    Raises:
      UserError: records are missing or damaged.
    """
    from lth_tf.compat import tf  # before tfds, as above

    import tensorflow_datasets as tfds  # isort: skip

    found = {}
    try:
        builder = tfds.builder_from_directory(source)
        for split in TEXTS:
            with tf.device("cpu:0"):
                examples = list(builder.as_dataset(split=split, shuffle_files=False))
            whole = b"".join(example["text"].numpy() for example in examples)
            found[split] = np.frombuffer(whole, np.uint8)
    except Exception as error:
        raise _unreadable(source, error) from error
    return found


def _unreadable(source: pathlib.Path, error: Exception) -> UserError:
    return UserError(
        f"the data in {source} cannot be read ({brief(error)}); delete that folder and prepare or "
        "copy it again"
    )


@_quiet()
def download(name: str, folder: pathlib.Path) -> None:
    """Downloads and prepares a data set in `folder`.

    Raises:
      UserError: it failed, whatever the reason.
    """
    from lth_tf import compat  # noqa: F401  before tfds, as above

    import requests  # isort: skip
    import tensorflow_datasets as tfds  # isort: skip

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = tfds.builder(name, data_dir=folder)
        # tfds retries a host that it cannot reach for minutes: ask once before.
        for url in list(builder.url_infos or ())[:1]:
            requests.head(url, timeout=10)
        builder.download_and_prepare()
    except Exception as error:
        asked = getattr(error, "request", None)  # of requests' errors, whose text is a maze
        why = f"no answer from {urlsplit(asked.url).hostname}" if asked else brief(error)
        raise UserError(
            f"data set {name!r} is not in {folder} and downloading it failed ({why}); "
            f"point --data_dir or TFDS_DATA_DIR to a folder that has {name}/<version> as "
            f"tensorflow-datasets prepares it, or run where there is a network, or use "
            f"--dataset=digits, which ships inside the package"
        ) from error


@_quiet()
def shards(source: pathlib.Path, split: str) -> tuple[Shard, ...]:
    """Returns the files of a prepared split and how many records they have.

    Raises:
      UserError: a file is missing, or they are no TFRecords of that split.
    """
    from lth_tf import compat  # noqa: F401  before tfds, as above

    import tensorflow_datasets as tfds  # isort: skip

    try:
        info = tfds.builder_from_directory(source).info
        files = info.splits[split].file_instructions
    except Exception as error:  # a damaged dataset_info.json raises anything
        raise UserError(
            f"the data in {source} have no readable split {split!r} ({brief(error)}); prepare or "
            f"copy that folder again"
        ) from error
    if info.file_format.value != "tfrecord":
        raise UserError(
            f"the data in {source} are stored as {info.file_format.value}; only tfrecord can be "
            f"streamed: prepare them again with file_format='tfrecord'"
        )
    if lost := [file.filename for file in files if not os.path.exists(file.filename)]:
        raise UserError(
            f"{len(lost)} of the {len(files)} files of split {split!r} are not in {source}, the "
            f"first is {os.path.basename(lost[0])}; copy them there, or prepare the folder again"
        )
    return tuple(Shard(file.filename, file.skip, file.take) for file in files)
