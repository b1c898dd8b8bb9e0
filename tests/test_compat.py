"""One Keras, whoever was imported first, and a quiet terminal."""

import os
import subprocess
import sys

from lth_tf.compat import is_keras_3, keras


def test_this_keras_is_keras_2():
    assert keras.__version__.startswith("2.")
    assert not is_keras_3(keras.Sequential())


def test_pruning_works_when_keras_3_came_first():
    program = (
        "import tensorflow as tf; tf.keras.layers.Dense\n"
        "from lth_tf.compat import is_keras_3, keras\n"
        "from lth_tf.pruning import prune\n"
        "assert is_keras_3(tf.keras.Sequential())\n"
        "prune(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))\n"
    )
    plain = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=plain
    )
    assert done.returncode == 0, done.stderr


def test_importing_leaves_the_terminal_alone():
    program = "import sys; import lth_tf.pruning; print('said', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "said\n"
