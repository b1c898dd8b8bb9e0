"""Who the workers of a run are: what TF_CONFIG, Slurm or Kubernetes says of them."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from lth_tf.errors import UserError

PORT = "2222"
SLURM = (
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE",
    "SLURMD_NODENAME", "SLURM_LOCALID",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, and which of them this process is.

    Attributes:
      workers: "host:port" of each, the chief's first.
      index: which of them this process is, from 0.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def chief(self) -> bool:
        """Whether this is the worker that writes the files."""
        return self.index == 0


def resolve(environ: Mapping[str, str] = os.environ) -> Cluster:
    """Returns the cluster that TF_CONFIG describes, or else Slurm, or else Kubernetes.

    Args:
      environ: environment variables.

    Raises:
      UserError: none of the three is there; or the one that is there is wrong.
    """
    if environ.get("TF_CONFIG"):
        return _tf_config(environ["TF_CONFIG"])
    if "SLURM_JOB_ID" in environ:
        return _slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ)
    raise UserError(
        "several workers need a cluster, and nothing says who they are: set TF_CONFIG on each, "
        "start them with srun in a Slurm job, or as an Indexed Job of Kubernetes with "
        "LTH_TF_SERVICE and LTH_TF_WORKERS; to try it on this machine: "
        "python -m lth_tf.tools.launch_local --workers=2 -- COMMAND"
    )


def _tf_config(text: str) -> Cluster:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"TF_CONFIG {text!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"TF_CONFIG {text!r} is not an object with 'cluster' and 'task'")
    for key, example in (
        ("cluster", '{"worker": ["host:port", ...]}'),
        ("task", '{"type": "worker", "index": 0}'),
    ):
        if not config.get(key) or not isinstance(config[key], dict):
            raise UserError(f'TF_CONFIG {text!r} has no "{key}", which looks like {example}')
    kinds = config["cluster"]
    for kind, addresses in kinds.items():
        if kind not in ("chief", "worker"):
            raise UserError(
                f"TF_CONFIG names tasks of kind {kind!r}, but here all workers train and evaluate "
                "alike: only 'worker' and one 'chief' are allowed; leave the others out"
            )
        if not isinstance(addresses, list):
            raise UserError(f"TF_CONFIG's {kind!r} is {addresses!r}, not a list of host:port")
    chiefs = kinds.get("chief", [])
    if "chief" in kinds and len(chiefs) != 1:
        raise UserError(f"TF_CONFIG names {len(chiefs)} chiefs; name exactly one, or none")
    workers = _checked([*chiefs, *kinds.get("worker", [])], "TF_CONFIG")
    kind, index = (str(config["task"].get(key)) for key in ("type", "index"))
    if kind not in kinds or not index.isdecimal() or int(index) >= len(kinds[kind]):
        there = ", ".join(f"{k} 0 to {len(a) - 1}" for k, a in kinds.items() if a)
        raise UserError(
            f"TF_CONFIG's cluster lacks this task, type {kind!r} and index {index}; it has {there}"
        )
    return Cluster(workers, int(index) + (len(chiefs) if kind == "worker" else 0))


def _checked(addresses: Sequence[Any], source: str) -> tuple[str, ...]:
    """The addresses, each once and host:port; raises UserError where they are not."""
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        ipv6 = host.startswith("[") and host.endswith("]")
        bare, wrong = (host[1:-1], " \t\n/[]@") if ipv6 else (host, " \t\n/[]@:")
        if not bare or set(bare) & set(wrong) or not _is_port(port):
            raise UserError(
                f"{source} has the address {address!r}; give host:port with a port of 1 to 65535"
            )
        if addresses.count(address) > 1:
            raise UserError(f"{source} has the address {address!r} twice; each worker has its own")
    if not addresses:
        raise UserError(f"{source} names no worker; give the host:port of each")
    return tuple(addresses)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= 65535


def _port(environ: Mapping[str, str]) -> int:
    port = environ.get("LTH_TF_PORT", PORT)
    if not _is_port(port):
        raise UserError(f"LTH_TF_PORT is {port!r}; it must be a port of 1 to 65535")
    return int(port)


def _slurm(environ: Mapping[str, str]) -> Cluster:
    missing = [name for name in SLURM if name not in environ]
    if missing:
        raise UserError(
            f"this is Slurm job {environ['SLURM_JOB_ID']}, but no task of it that srun started "
            f"({', '.join(missing)} not set): put srun before the command"
        )
    from lth_tf.compat import tf

    before = {name: os.environ.get(name) for name in SLURM}
    os.environ.update({name: environ[name] for name in SLURM})  # the resolver looks there only
    try:
        tasks = int(environ["SLURM_STEP_NUM_TASKS"])
        spec = tf.distribute.cluster_resolver.SlurmClusterResolver(
            # Slurm hands out the GPUs, if there are any; the resolver fails where there are none.
            port_base=_port(environ), gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
        ).cluster_spec()  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"what Slurm says of this step is not understood: {error}") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    workers = _checked(spec.as_dict()["worker"], "Slurm")
    # By the node's name, not SLURM_PROCID: the resolver sorts n10 before n2, and tasks may have
    # been dealt out to the nodes in turn (--distribution=cyclic).
    port = _port(environ) + int(environ["SLURM_LOCALID"])
    here = f"{environ['SLURMD_NODENAME']}:{port}"
    if here not in workers:
        raise UserError(f"this task is at {here}, but Slurm's step has {', '.join(workers)}")
    return Cluster(workers, workers.index(here))


def _kubernetes(environ: Mapping[str, str]) -> Cluster:
    index, host = environ["JOB_COMPLETION_INDEX"], environ.get("HOSTNAME") or socket.gethostname()
    for name, what in (
        ("LTH_TF_SERVICE", "the name of the headless service"),
        ("LTH_TF_WORKERS", "how many workers there are, the Job's completions"),
    ):
        if not environ.get(name):
            raise UserError(f"JOB_COMPLETION_INDEX is {index}, but {name} is not set: {what}")
    count = environ["LTH_TF_WORKERS"]
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise UserError(
            f"LTH_TF_WORKERS is {count!r} and JOB_COMPLETION_INDEX {index!r}; the first is the "
            "Job's completions, the second is below it"
        )
    job, dash, own = host.rpartition("-")
    if not job or own != index:
        raise UserError(
            f"this pod is called {host!r}, not '<job>-{index}' as those of an Indexed Job are: set "
            "completionMode: Indexed and neither hostname nor hostNetwork"
        )
    port = _port(environ)
    names = [f"{job}-{i}.{environ['LTH_TF_SERVICE']}:{port}" for i in range(int(count))]
    return Cluster(_checked(names, "the Job"), int(index))
