"""A machine: which GPUs each of several processes may use, and what its CPUs are quick at."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lth_tf.compat import tf


def gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        listed = environ["CUDA_VISIBLE_DEVICES"].split(",")
        # CUDA's own rule: what follows an invalid one does not count.
        valid = itertools.takewhile(lambda d: d and d != "-1", (d.strip() for d in listed))
        return list(valid)
    return [str(i) for i in range(len(tf.config.list_physical_devices("GPU")))]


def gpu_share(found: Sequence[str], slot: int, jobs: int) -> dict[str, str]:
    """Returns the environment variables that give a slot its share of the GPUs.

    All shares are of one size, for the number of replicas is part of an experiment. Where
    there are more slots than GPUs, some share one, and none may take all its memory.

    Args:
      found: the GPUs, as `gpus` returns them.
      slot: which of the processes that run at a time, from 0.
      jobs: how many run at a time.

    >>> gpu_share(["0", "1", "2", "3"], 1, 2), gpu_share(["0", "1", "2"], 1, 2)
    ({'CUDA_VISIBLE_DEVICES': '2,3'}, {'CUDA_VISIBLE_DEVICES': '1'})
    """
    if jobs == 1 or not found:
        return {}
    size = max(len(found) // jobs, 1)
    first = slot * size % len(found)
    share = {"CUDA_VISIBLE_DEVICES": ",".join(found[first : first + size])}
    return share | ({"TF_FORCE_GPU_ALLOW_GROWTH": "true"} if jobs > len(found) else {})


def slow_bfloat16(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a sentence where a precision is slow on the CPUs that compute, or ''.

    Args:
      precision: of an experiment.
      cpuinfo: where Linux tells of them; nothing is known without.
    """
    if precision != "mixed_bfloat16" or tf.config.list_physical_devices("GPU"):
        return ""
    try:
        flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return ""
    if not flags or {"amx_bf16", "avx512_bf16"} & set(flags):
        return ""
    return (
        "precision=mixed_bfloat16 is slow here: these CPUs have no instructions for bfloat16 "
        "(avx512_bf16, amx_bf16), and a step can take several times as long as in float32"
    )
