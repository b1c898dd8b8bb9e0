"""Tiny ImageNet out of its unpacked archive: 200 classes, photographs of 64x64 pixels.

    tiny-imagenet-200/  wnids.txt  train/WNID/images/*.JPEG
                        val/images/*.JPEG  val/val_annotations.txt

Labels are the lines of wnids.txt, counted from 0. The test part is `val`: the labels of
the archive's own `test` were never published.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from lth_tf import storage
from lth_tf.datasets import cache, tfds
from lth_tf.errors import UserError, brief

FOLDER = "tiny-imagenet-200"
SHAPE = (64, 64, 3)
DECODING = b"1"  # part of the cache's key: change it whenever decode() gives other arrays

Files = list[tuple[pathlib.Path, int]]


def arrays(data_dir: str | None = None) -> dict[str, np.ndarray]:
    """Returns `tfds.ARRAYS` -> array, images uint8 [n, 64, 64, 3], labels int32 [n].

    Training images are in the order of wnids.txt and then of their names, those of `val`
    in the order of val_annotations.txt.

    Args:
      data_dir: the folder that has tiny-imagenet-200, or that folder; else see `tfds.resolve`.

    Raises:
      UserError: it is not there, not complete, or an image cannot be decoded.
    """
    folder = find(data_dir)
    wnids = _lines(folder / "wnids.txt")
    parts = {"train": train_files(folder, wnids), "test": val_files(folder, wnids)}
    labels = [str(label) for files in parts.values() for _, label in files]
    about = DECODING, os.fsencode(folder.resolve()), " ".join(labels).encode()
    images = (path for files in parts.values() for path, _ in files)
    path = cache.folder() / f"tiny_imagenet-{cache.key(*about, files=images)}.npz"
    found = cache.read(path, tfds.ARRAYS)
    if found is None:
        found = {}
        for part, files in parts.items():
            found[f"{part}_images"] = decode([file for file, _ in files])
            found[f"{part}_labels"] = np.array([label for _, label in files], np.int32)
        cache.write(path, found)
    return found


def find(data_dir: str | None) -> pathlib.Path:
    """Returns the folder tiny-imagenet-200.

    Raises:
      UserError: it is not there.
    """
    given = tfds.resolve(data_dir)
    for folder in (given, given / FOLDER):
        if (folder / "wnids.txt").is_file():
            return folder
    raise UserError(
        f"data set 'tiny_imagenet' is not in {given}: neither {FOLDER}/wnids.txt nor wnids.txt is "
        f"there; unpack {FOLDER}.zip (cs231n.stanford.edu/{FOLDER}.zip) and point --data_dir or "
        f"TFDS_DATA_DIR to the folder that has {FOLDER}"
    )


def train_files(folder: pathlib.Path, wnids: Sequence[str]) -> Files:
    """Returns the training images with their labels.

    Raises:
      UserError: a class has none.
    """
    files = []
    for label, wnid in enumerate(wnids):
        found = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not found:
            raise UserError(
                f"there are no images in {folder / 'train' / wnid / 'images'}, one of the "
                f"{len(wnids)} classes in wnids.txt; unpack {FOLDER}.zip again"
            )
        files += [(path, label) for path in found]
    return files


def val_files(folder: pathlib.Path, wnids: Sequence[str]) -> Files:
    """Returns the images of `val` with their labels.

    Raises:
      UserError: a line names no class of wnids.txt, or an image that is not there.
    """
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    there = {path.name for path in images.glob("*.JPEG")}
    files = []
    for number, line in enumerate(_lines(annotations), 1):
        name, wnid = [*line.split("\t"), ""][:2]  # a box follows
        if wnid not in labels:
            raise UserError(
                f"{annotations}, line {number}: {wnid!r} is none of the {len(wnids)} classes in "
                f"wnids.txt; a line is an image's name, a tab, its class, a tab and its box; "
                f"unpack {FOLDER}.zip again"
            )
        if name not in there:
            raise UserError(
                f"{annotations}, line {number}: there is no image {name!r} in {images}; unpack "
                f"{FOLDER}.zip again"
            )
        files.append((images / name, labels[wnid]))
    return files


def _lines(path: pathlib.Path) -> list[str]:
    try:
        found = path.read_text().splitlines()
        storage.require("\0" not in "".join(found), "it is no text")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); unpack {FOLDER}.zip again") from error
    if not found:
        raise UserError(f"{path} is empty; unpack {FOLDER}.zip again")
    return found


def decode(paths: Sequence[pathlib.Path]) -> np.ndarray:
    """Returns the images, uint8 [n, 64, 64, 3]; what is grey there is grey in three channels.

    Raises:
      UserError: a file is no JPEG, or of another size.
    """
    from lth_tf.compat import tf

    def image(path: pathlib.Path) -> np.ndarray:
        try:
            with tf.device("cpu:0"):
                found = tf.io.decode_jpeg(
                    path.read_bytes(), channels=3, dct_method="INTEGER_ACCURATE"
                ).numpy()
        except (OSError, tf.errors.OpError) as error:
            raise UserError(
                f"{path} cannot be decoded ({brief(error)}); unpack {FOLDER}.zip again"
            ) from error
        if found.shape != SHAPE:
            raise UserError(
                f"{path} has {found.shape[0]}x{found.shape[1]} pixels, not the 64x64 of Tiny "
                f"ImageNet; unpack {FOLDER}.zip again"
            )
        return found

    images = np.empty((len(paths), *SHAPE), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, found in enumerate(pool.map(image, paths)):
            images[i] = found
    return images
