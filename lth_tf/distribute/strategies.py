"""Replicas and workers: the tf.distribute strategy that a spec asks for, and who does what.

Every worker runs the same program. What it must not do for itself, because all have to know
the same or because files are the chief's, goes through `Workers`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from lth_tf.compat import heartbeats, tf
from lth_tf.distribute import cluster
from lth_tf.errors import UserError, brief
from lth_tf.spec import Spec

Arrays = Mapping[str, np.ndarray]
_WORDS = np.dtype("<u4")  # float64 holds each of them exactly

_BLOCKS = 1024, 2**18  # numbers that workers add up in one call

_joined: list[Any] = []  # the strategy of this process's cluster: there is one gRPC server


def resolve(spec: Spec) -> Spec:
    """Returns the spec with `distribute`, `devices` and `workers` as they turn out here.

    For multi_worker it joins the cluster; for mirrored on a machine without GPUs it makes
    logical CPUs, where nothing has been computed yet.

    Raises:
      UserError: devices that do not exist, or a batch that they do not divide; see `join`.
    """
    kind, devices = spec.distribute, spec.devices
    if kind == "multi_worker":
        strategy = join(spec)
        workers = place_of(strategy)[1]
        return dataclasses.replace(
            spec, workers=workers, devices=strategy.num_replicas_in_sync // workers
        )
    if kind == "auto":
        gpus = tf.config.list_logical_devices("GPU")
        if (devices or 1) > max(len(gpus), 1):
            raise _absent(devices, [d.name for d in gpus], "GPUs")
        devices = devices or len(gpus)
        kind = "mirrored" if devices > 1 else "none"
    if kind == "none":
        return dataclasses.replace(spec, distribute="none", devices=None)
    found = _local(devices)
    if (devices or 1) > len(found):
        raise _absent(devices, found, f"{found[0].split(':')[1]}s")
    devices = devices or len(found)
    _require_divisible(spec, devices, f"{devices} devices")
    return dataclasses.replace(spec, distribute="mirrored", devices=devices)


def _absent(asked: Any, found: list[str], what: str) -> UserError:
    there = f"{len(found)} ({', '.join(found)})" if found else "none"
    return UserError(
        f"devices {asked} are asked for, but of {what} this machine has {there}; give at most as "
        "many, or --distribute=none"
    )


def _require_divisible(spec: Spec, replicas: int, what: str) -> None:
    if spec.batch_size % replicas:
        raise UserError(
            f"batch_size {spec.batch_size} cannot be divided among {what}; give a multiple of "
            f"{replicas}, or other --devices"
        )


def _local(devices: int | None = None) -> list[str]:
    """This machine's GPUs; where it has none logical CPUs, made as many as are asked for."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU" and devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * devices
        with contextlib.suppress(RuntimeError):  # too late: something has been computed
            if not tf.config.get_logical_device_configuration(cpu):
                tf.config.set_logical_device_configuration(cpu, parts)
    return [d.name for d in tf.config.list_logical_devices(kind)]


def strategy_of(spec: Spec) -> Any:
    """Returns the tf.distribute strategy that a spec asks for.

    Raises:
      UserError: see `resolve` and `join`.
    """
    spec = resolve(spec)
    if spec.distribute == "none":
        return tf.distribute.get_strategy()
    if spec.distribute == "multi_worker":
        return join(spec)
    return _mirrored(tuple(_local(spec.devices)[: spec.devices]))


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """One strategy for the same devices: two number their collective operations alike."""
    reduction = tf.distribute.ReductionToOneDevice() if "CPU" in devices[0] else None
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def join(spec: Spec) -> Any:
    """Returns the strategy of the cluster that this process is a worker of.

    The workers meet first (`cluster.meet`), so that whoever is missing or was started with
    other flags is named. The first call must come before anything else is computed.

    Raises:
      UserError: there is no cluster, a worker is missing, or they do not agree.
    """
    if not _joined:
        here = cluster.resolve()
        if spec.workers and spec.workers != len(here.workers):
            raise UserError(
                f"workers {spec.workers} are asked for, but the cluster has {len(here.workers)}: "
                f"{', '.join(here.workers)}"
            )
        gpus = len(tf.config.list_physical_devices("GPU"))
        each, problem = spec.devices or max(gpus, 1), None
        try:
            if each > max(gpus, 1):
                raise _absent(each, [str(i) for i in range(gpus)], "GPUs")
            replicas = each * len(here.workers)
            _require_divisible(spec, replicas, f"{replicas} replicas")
        except UserError as error:
            problem = str(error)  # the others are waiting, and hear it, too
        statement = {**spec.identity(), "devices": each}
        cluster.meet(here, statement, spec.worker_timeout, problem)
        _joined.append(_connect(spec, here, each if gpus else 0))
    replicas = _joined[0].num_replicas_in_sync
    _require_divisible(spec, replicas, f"{replicas} replicas")
    return _joined[0]


def _connect(spec: Spec, here: cluster.Cluster, gpus: int) -> Any:
    heartbeats(len(here.workers), spec.worker_timeout)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(here.workers)}),
        task_type="worker",
        task_id=here.index,
        num_accelerators={"GPU": gpus} if gpus else {},
        rpc_layer="grpc",
    )
    try:
        with lost():
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError as error:  # of a process that has computed something already
        raise UserError(
            f"this process cannot join a cluster any more ({error}); make the strategy first"
        ) from error


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """Within, that another worker has gone is a UserError, not what TensorFlow makes of it."""
    try:
        yield
    except tf.errors.OpError as error:
        kind = type(error).__name__.removesuffix("Error")
        found = re.search(r"aborted by: *(.+)", str(error))
        told = found or "/task:" in str(error)
        gone = kind in ("Unavailable", "Aborted", "Cancelled") or kind == "Internal" and told
        if kind != "DeadlineExceeded" and not (_joined and gone):
            raise
        raise UserError(
            f"a worker has ended or does not answer ({found[1] if found else brief(error)}); what "
            "it printed says why; start the same command on all workers again to go on"
        ) from error


def place_of(strategy: Any) -> tuple[int, int]:
    """Returns this process's number among the workers, the chief's is 0, and how many there are."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0, 1
    resolver = strategy.cluster_resolver
    here, tasks = (resolver.task_type, resolver.task_id), resolver.cluster_spec()
    kinds = [kind for kind in ("chief", "worker") if kind in tasks.jobs]
    workers = [(kind, index) for kind in kinds for index in tasks.task_indices(kind)] or [here]
    replicas = len(workers) * len(strategy.extended.worker_devices)
    if replicas != strategy.num_replicas_in_sync or here not in workers:
        raise UserError(
            f"the strategy has {strategy.num_replicas_in_sync} replicas, but its cluster now has "
            f"{len(workers)} workers and this is {here[0]} {here[1]}; leave TF_CONFIG as it was "
            "when the strategy was made"
        )
    return workers.index(here), len(workers)


def first_replica(strategy: Any) -> int:
    """Returns the number, among all replicas, of this process's first one."""
    index, count = place_of(strategy)
    return index * (strategy.num_replicas_in_sync // count)


def is_own(variable: Any) -> bool:
    """Whether each replica has a value of its own of a variable, in `variable.values`.

    Only the moving statistics of BatchNormalization are such; read, they are the mean.
    """
    each = variable.synchronization == tf.VariableSynchronization.ON_READ
    return each and isinstance(variable, tf.distribute.DistributedValues)


_scoring: contextvars.ContextVar[Any] = contextvars.ContextVar("scoring", default=None)


@contextlib.contextmanager
def scoring(strategy: Any) -> Iterator[None]:
    """Within, scorers use a strategy's devices; its scope would make models of its replicas."""
    token = _scoring.set(strategy)
    try:
        yield
    finally:
        _scoring.reset(token)


def scored_on() -> Any:
    """Returns the strategy that scorers use: of `scoring`, else the one whose scope this is."""
    return _scoring.get() or tf.distribute.get_strategy()


class Workers:
    """The processes of a strategy, most often one; its methods are called by all of them.

    Args:
      strategy: theirs.

    Attributes:
      index, count: this process's number, the chief's is 0, and how many there are.
      chief: whether this is the one that reads and writes files.
    """

    def __init__(self, strategy: Any):
        self._strategy = strategy
        self.index, self.count = place_of(strategy)
        self.chief = self.index == 0
        self._add = tf.function(lambda values: strategy.run(_added, (values,)))

    def share(self, make: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
        """Returns, everywhere, what `make` returns at the chief: arrays and JSON-ready values.

        Raises:
          UserError: `make` raised one; it is raised everywhere.
        """
        if self.count == 1:
            return make()
        arrays, (problem, value) = self.tell(self._outcome(make) if self.chief else ({}, None), 0)
        if problem is not None:
            raise UserError(problem)
        return arrays, value

    @staticmethod
    def _outcome(make: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
        try:
            arrays, value = make()
        except UserError as error:
            return {}, [str(error), None]
        return arrays, [None, value]

    def tell(self, own: tuple[Arrays, Any], source: int) -> tuple[Arrays, Any]:
        """Returns what worker `source` gave: arrays and JSON-ready values."""
        if self.count == 1:
            return own
        mine = self.index == source
        content = _packed(*own) if mine else b""
        size = int(self._total(np.array([len(content)], np.float64), mine)[0])
        words = np.zeros(-(-size // 4), _WORDS)
        if mine:
            words.view(np.uint8)[:size] = np.frombuffer(content, np.uint8)
        return _unpacked(self._total(words, mine).tobytes()[:size])

    def each(self, own: tuple[Arrays, Any]) -> list[tuple[Arrays, Any]]:
        """Returns what every worker gave, in the order of the workers."""
        return [self.tell(own, source) for source in range(self.count)]

    def agree(self, do: Callable[[], Any]) -> Any:
        """Returns what `do` returns here, where it succeeds on every worker.

        Raises:
          UserError: it raised one on some worker; it is raised everywhere.
        """
        if self.count == 1:
            return do()
        result, problem = None, None
        try:
            result = do()
        except UserError as error:
            problem = str(error)
        problems = [value for _, value in self.each(({}, problem))]
        for worker, found in enumerate(problems):
            if found:
                raise UserError(found if worker == self.index else f"worker {worker}: {found}")
        return result

    def add(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the sums over the workers of what each gives: float arrays of equal shapes."""
        if self.count == 1:
            return values
        flat = np.concatenate([np.ravel(value) for value in values]).astype(np.float64)
        ends = np.cumsum([value.size for value in values])[:-1]
        parts = np.split(self._total(flat, True), ends)
        return [
            part.reshape(value.shape).astype(value.dtype)
            for part, value in zip(parts, values, strict=True)
        ]

    def _total(self, values: np.ndarray, mine: bool) -> np.ndarray:
        """The sum over the workers of values [n], in float64; 0 counts for what is not `mine`."""
        # In blocks of two sizes, since there is a graph for each.
        size = _BLOCKS[len(values) > _BLOCKS[0]]
        total = np.empty_like(values)
        for start in range(0, len(values), size):
            part = values[start : start + size]
            block = np.zeros(size)
            if mine:
                block[: len(part)] = part
            total[start : start + size] = self._add_block(block)[: len(part)]
        return total

    def _add_block(self, block: np.ndarray) -> np.ndarray:
        first, zeros = first_replica(self._strategy), np.zeros_like(block)
        given = self._strategy.experimental_distribute_values_from_function(
            lambda c: tf.constant(block if c.replica_id_in_sync_group == first else zeros)
        )
        with lost():
            found = self._strategy.experimental_local_results(self._add(given))
        return found[0].numpy()


@functools.lru_cache(maxsize=1)
def workers_of(strategy: Any) -> Workers:
    """Returns the strategy's workers, the same at every call."""
    return Workers(strategy)


def _packed(arrays: Arrays, value: Any) -> bytes:
    text = json.dumps(value).encode()
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return len(text).to_bytes(8, "little") + text + safetensors.numpy.save(contiguous)


def _unpacked(content: bytes) -> tuple[dict[str, np.ndarray], Any]:
    end = 8 + int.from_bytes(content[:8], "little")
    return safetensors.numpy.load(content[end:]), json.loads(content[8:end])


def _added(values: Any) -> Any:
    # A copy, which has a device; an argument has none.
    here = tf.identity(values)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)
