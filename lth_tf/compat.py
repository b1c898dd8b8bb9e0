"""The only file that imports tf_keras and tfmot, in the order in which they work.

tfmot must come before anything touches `tf.keras`; otherwise `tf.keras` resolves to
Keras 3 and tfmot refuses every model with a misleading message.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

_SHARED = "/dev/shm"


def _beside() -> IO[bytes]:
    """A file without a name; where the system can, in memory: a container may have no /tmp."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def _temporary() -> Iterator[None]:
    """Within, Python has a temporary folder, without which TensorFlow cannot be imported.

    A container that is read-only has none but the shared memory, which is taken from then on;
    where there is not even that, whoever writes a temporary file fails then, and not now.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        shared = os.access(_SHARED, os.W_OK)
        tempfile.tempdir = _SHARED if shared else os.devnull
        yield
        if not shared:
            tempfile.tempdir = None
    else:
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what TensorFlow's C++ logs to stderr, which no level keeps it from doing.

    Someone who has set TF_CPP_MIN_LOG_LEVEL to 0 or 1, which is more than usual, gets everything.
    """
    asked = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    if asked in ("0", "1") or sys.stderr is None:  # closed by whoever started the process
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = asked or "2"
    sys.stderr.flush()
    with _beside() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            if asked is None:  # read by now, and not for child processes
                del os.environ["TF_CPP_MIN_LOG_LEVEL"]
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if line and not re.match(r"[IWE]\d{4} |WARNING: All log messages before", line):
                    print(line, file=sys.stderr)


@contextlib.contextmanager
def _brief() -> Iterator[None]:
    """Within, what is imported is imported in less time.

    Nothing that an import makes is garbage. And tfmot asks for a part of Keras 3 that it is
    better off without, for which all of Keras 3 would be read.
    """
    collects, absent = gc.isenabled(), "keras" not in sys.modules
    gc.disable()
    if absent:
        sys.modules["keras"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            sys.modules.pop("keras", None)
        if collects:
            gc.freeze()  # a million objects, through which each full collection would walk again
            gc.enable()


with _quiet(), _temporary(), _brief():
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    if os.path.expanduser("~") == "~":  # no home: Keras would make a folder of that name here
        os.environ.setdefault("KERAS_HOME", os.path.join(tempfile.gettempdir(), "keras"))
    import tensorflow_model_optimization as tfmot  # isort: skip
    import tensorflow as tf  # isort: skip
    import tf_keras as keras  # isort: skip
    from tensorflow_model_optimization.python.core.sparsity.keras import (  # isort: skip
        pruning_wrapper,
    )
    from tf_keras.src.engine.base_layer import AddLoss, AddMetric  # isort: skip
    from tf_keras.src.engine.base_layer_utils import (  # isort: skip
        from_saved_model,
        is_subclassed,
    )
    from tf_keras.src.engine.functional import Functional  # isort: skip
    from tf_keras.src.mixed_precision.autocast_variable import AutoCastVariable  # isort: skip
    from tf_keras.src.saving.legacy.saved_model.load import RevivedLayer  # isort: skip

    tf.config.list_physical_devices()  # looks for GPUs, and complains where there are none

PruneLowMagnitude = pruning_wrapper.PruneLowMagnitude

__all__ = [
    "AddLoss", "AddMetric", "AutoCastVariable", "Functional", "PruneLowMagnitude", "RevivedLayer",
    "all_digits", "from_saved_model", "heartbeats", "inlined", "is_keras_3", "is_subclassed",
    "keras", "os_errors", "tf", "tfmot",
]  # fmt: skip


def is_keras_3(thing: object) -> bool:
    """Says whether an object's class comes from Keras 3, which this package cannot prune."""
    return any(c.__module__.split(".")[0] == "keras" for c in type(thing).__mro__)


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Within, a tf.function that a layer calls is traced anew, with what the layer has now.

    It would keep the tensors that it sees, and has kept the variables that it saw before.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def all_digits() -> Iterator[None]:
    """Within, GPUs multiply float32 as such, not in TF32, whose ten bits change GraSP's masks."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def heartbeats(workers: int, seconds: float) -> None:
    """Has the workers of a cluster notice within `seconds` that one of them is gone.

    Before the strategy is made; TensorFlow has no public setting for it.
    """
    from tensorflow.python.distribute import collective_all_reduce_strategy as strategies
    from tensorflow.python.eager import context

    job = strategies.coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=workers)
    milliseconds = int(1000 * seconds)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=milliseconds,
        heartbeat_timeout_in_ms=milliseconds,
        shutdown_barrier_timeout_in_ms=milliseconds,
        coordinated_jobs=[job],
    )


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Turns TensorFlow's errors back into the OSErrors of which they keep the text only."""
    try:
        yield
    except tf.errors.OpError as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise
