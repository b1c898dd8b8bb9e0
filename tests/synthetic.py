"""An ImageNet-shaped data set of noise, to measure with: python tests/synthetic.py --folder=F.

It looks to lth_tf like ImageNet as tensorflow-datasets prepares it: `--data_dir=F
--dataset=imagenet2012`. The images are JPEGs of about 500 x 375 pixels and 110 kB whose power
falls with the square of the frequency, as that of photographs does (Field 1987), so that
reading and decoding them takes as long. A pool of them is used again under other labels.
"""

import argparse
import pathlib

import numpy as np

from lth_tf.compat import tf

import tensorflow_datasets as tfds  # isort: skip

CLASSES = 1000
POOL = 64  # different images
SHAPES = ((375, 500), (500, 375), (333, 500), (375, 500))
BYTES = 110_000  # of a JPEG, about


def pixels(seed, shape):
    """Returns uint8 [h, w, 3]: random phases, amplitude 1 / frequency, channels much alike."""
    rng = np.random.default_rng(seed)
    h, w = shape
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = np.inf
    fields = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(4, h, w))) / frequency, s=shape)
    fields /= fields.std((1, 2), keepdims=True)
    mixed = 0.95 * fields[:1] + 0.3 * fields[1:]
    return np.clip(120 + 60 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def encoded(image, size):
    """Returns the JPEG of the highest quality that takes at most `size` bytes."""
    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        if len(tf.io.encode_jpeg(image, quality=middle).numpy()) <= size:
            low = middle
        else:
            high = middle
    return tf.io.encode_jpeg(image, quality=low).numpy()


def write(folder, records, shards, *, pool=POOL, shapes=SHAPES, size=BYTES):
    """Writes imagenet2012/5.1.0 into a folder.

    Args:
      folder: of tensorflow-datasets.
      records, shards: of the training set; the validation set has a 25th of the records and
        an 8th of the files, at least one.
      pool: how many different images.
      shapes: rows and columns, in turn.
      size: most bytes of a JPEG.
    """
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "file_name": tfds.features.Text(),
        }
    )
    target = pathlib.Path(folder) / "imagenet2012" / "5.1.0"
    target.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        dataset_name="imagenet2012",
        data_dir=target,
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    images = [encoded(pixels(i, shapes[i % len(shapes)]), size) for i in range(pool)]
    rng, infos = np.random.default_rng(0), []
    sizes = {"train": (records, shards), "validation": (-(-records // 25), -(-shards // 8))}
    for split, (count, files) in sizes.items():
        lengths = np.diff(np.arange(files + 1) * count // files)
        for number, length in enumerate(lengths):
            path = f"imagenet2012-{split}.tfrecord-{number:05d}-of-{files:05d}"
            with tf.io.TFRecordWriter(str(target / path)) as file:
                for i in range(length):
                    example = {
                        "image": images[rng.integers(pool)],
                        "label": rng.integers(CLASSES),
                        "file_name": f"{split}_{number}_{i}.JPEG",
                    }
                    file.write(features.serialize_example(features.encode_example(example)))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths.tolist(),
                num_bytes=sum(f.stat().st_size for f in target.glob(f"*-{split}.*")),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features, split_infos=infos, filename_template=template,
        description="Noise in the shape of ImageNet.", check_data=False,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where imagenet2012/ is written")
    parser.add_argument("--records", type=int, default=20_000, help="of the training set")
    parser.add_argument("--shards", type=int, default=64, help="files of the training set")
    given = parser.parse_args()
    write(given.folder, given.records, given.shards)
