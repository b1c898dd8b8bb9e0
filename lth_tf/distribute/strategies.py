"""Replicas: the tf.distribute strategy that a spec asks for, and which part of it is here."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from lth_tf.compat import heartbeats, tf
from lth_tf.distribute import cluster, meeting
from lth_tf.errors import UserError, brief
from lth_tf.spec import Spec

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
        workers = index_and_count(strategy)[1]
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

    The workers meet first (`meeting.meet`), so that whoever is missing or was started with
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
        meeting.meet(here, statement, spec.worker_timeout, problem)
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


def index_and_count(strategy: Any) -> tuple[int, int]:
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
    index, count = index_and_count(strategy)
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
