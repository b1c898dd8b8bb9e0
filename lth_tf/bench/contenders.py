"""Measurements of speed and memory: contenders alternate in one process, medians are reported."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import distribute, masks, models, pruning
from lth_tf.compat import keras, tf, tfmot
from lth_tf.datasets import Dataset, Streamed, scaling
from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scopes import SCOPES
from lth_tf.scorers import SCORERS
from lth_tf.scorers.network import Reused
from lth_tf.spec import Spec
from lth_tf.training import OPTIMIZERS, State, Trainer, Weights, initial_weights, policy
from lth_tf.training.checkpoints import save
from lth_tf.training.feeds import CHUNK

DENSITY = 0.2
SCALE_DENSITIES = 1.0, 0.2, 0.05
Contender = Callable[[], None]


def alternate(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each round; one unmeasured call comes first.

    In a round each runs once, so that whatever else the machine does hits all alike.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def alone(spec: Spec) -> Spec:
    """Returns the spec on one replica; raises UserError where it asks for others."""
    if spec.distribute not in ("auto", "none") or spec.devices:
        raise UserError(
            "this compares what one replica does; leave --distribute and --devices out, or use "
            "lth-bench scale"
        )
    return dataclasses.replace(spec, distribute="none")


def train(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares training loops on the same model, data, batch size and optimizer.

    lth_tf: this package's loop, a mask of density 0.2 in force. fit: `model.fit` of the
    plain Keras model on normalised float32 NumPy arrays. fit_100: the same with
    steps_per_execution=100, and jit_compile where it is not hopeless (CPU convolutions).
    tfmot_fit: `prune_low_magnitude` at the same density under `fit`.

    Args:
      spec: model, optimizer, batch size, precision.
      dataset: images and labels.
      steps: how many each contender does per round.
      rounds: how often.

    Returns:
      steps_per_second by name (medians), and ratio_NAME, the median over rounds of
      lth_tf's speed over the other's.
    """
    if isinstance(dataset, Streamed):
        raise UserError(f"dataset {spec.dataset!r} is streamed; `fit` is fed from memory here")
    trainer = Trainer(alone(spec), dataset)
    weights, scores = _initial(trainer)
    mask = SCOPES["layerwise"](scores, DENSITY)
    trainer.train(masks.apply(mask, weights), mask, 0, 0)  # puts them in

    images = scaling.scale(
        dataset.train_inputs, spec.normalization, dataset.mean, dataset.std, tf.float32
    ).numpy()
    repeats = -(-steps * spec.batch_size // len(images))
    x = np.concatenate([images] * repeats)[: steps * spec.batch_size]
    y = np.concatenate([dataset.train_labels] * repeats)[: steps * spec.batch_size]

    def plain() -> Any:
        with policy(spec.precision):
            return models.build(spec, trainer.input_shape, trainer.classes, spec.seed)

    def fit(model: Any, callbacks: tuple = (), **options: Any) -> Contender:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(OPTIMIZERS[spec.optimizer](spec.learning_rate, spec), loss, **options)
        return lambda: model.fit(
            x, y, batch_size=spec.batch_size, verbose=0, callbacks=list(callbacks)
        )

    compiled = "conv" not in pruning.kinds(trainer.model).values() or bool(
        tf.config.list_logical_devices("GPU")
    )
    schedule = tfmot.sparsity.keras.ConstantSparsity(1 - DENSITY, 0, frequency=100)
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(plain(), pruning_schedule=schedule)
    seconds = alternate(
        {
            "lth_tf": _advancing(trainer, steps),
            "fit": fit(plain()),
            "fit_100": fit(plain(), steps_per_execution=100, jit_compile=compiled),
            "tfmot_fit": fit(wrapped, (tfmot.sparsity.keras.UpdatePruningStep(),)),
        },
        rounds,
    )
    result: dict[str, Any] = {
        "model": spec.model,
        "dataset": spec.dataset,
        "batch_size": spec.batch_size,
        "fit_100_jit_compile": compiled,
        "steps_per_second": {
            name: steps / statistics.median(values) for name, values in seconds.items()
        },
    }
    for name in ("fit", "fit_100", "tfmot_fit"):
        ratios = [b / a for a, b in zip(seconds["lth_tf"], seconds[name], strict=True)]
        result[f"ratio_{name}"] = statistics.median(ratios)
    return result


def _initial(trainer: Trainer) -> tuple[Weights, Scores]:
    """Initial weights of a trainer's network, and their magnitudes."""
    spec = trainer.spec
    weights, kernels = initial_weights(spec, trainer.input_shape, trainer.classes, spec.seed)
    return weights, SCORERS["magnitude"](None, {name: weights[name] for name in kernels})


def _advancing(trainer: Trainer, steps: int) -> Contender:
    block = min(CHUNK, trainer.spec.eval_every)

    def run() -> None:
        for step in range(0, steps, block):
            trainer.advance(step, min(step + block, steps), trainer.spec.seed)

    return run


def two_replicas(spec: Spec) -> Spec:
    """Returns the spec on two devices, which it makes of a CPU where nothing is computed yet."""
    two = dataclasses.replace(spec, distribute="mirrored", devices=2, compile="off")
    return distribute.resolve(two)


def scale(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares one replica with two, which add up all of their gradients or what a mask keeps.

    Without GPUs the two are logical CPUs on the same cores, so that what two replicas
    gain is not to be seen there; what packing gains or costs is.

    Args:
      spec: model, optimizer, batch size, precision.
      dataset: images and labels.
      steps: how many each contender does per round.
      rounds: how often.

    Returns:
      steps_per_second and bytes_per_step by name (replicas, way, density); ratio_packed
      by density, the median over rounds of packed over plain speed; payload, the
      bytes of packed over those of the kept entries and the other trainable weights alone.
    """
    one = Trainer(dataclasses.replace(alone(spec), compile="off"), dataset)
    trainers = {"1": one}
    for way in ("plain", "packed"):
        trainers[f"2 {way}"] = Trainer(
            dataclasses.replace(two_replicas(spec), communication=way), dataset
        )
    weights, scores = _initial(one)
    trainable = {id(v) for v in one.model.trainable_variables}
    width = 8 if spec.precision == "float64" else 4
    others = sum(
        weights[name].size
        for name, v in pruning.weights(one.model).items()
        if id(v) in trainable and name not in scores
    )
    result: dict[str, Any] = {
        "model": spec.model,
        "dataset": spec.dataset,
        "batch_size": spec.batch_size,
        "steps_per_second": {},
        "bytes_per_step": {},
        "ratio_packed": {},
        "payload": {},
    }
    for density in SCALE_DENSITIES:
        mask = SCOPES["layerwise"](scores, density)
        for trainer in trainers.values():
            trainer.train(masks.apply(mask, weights), mask, 0, 0)  # puts them in
        contenders = {name: _advancing(trainer, steps) for name, trainer in trainers.items()}
        seconds = alternate(contenders, rounds)
        for name, values in seconds.items():
            key = f"{name}, density {density:g}"
            result["steps_per_second"][key] = steps / statistics.median(values)
            result["bytes_per_step"][key] = trainers[name].reduction.bytes(mask)
        ratios = zip(seconds["2 plain"], seconds["2 packed"], strict=True)
        result["ratio_packed"][f"{density:g}"] = statistics.median(a / b for a, b in ratios)
        least = width * (sum(int(np.count_nonzero(m)) for m in mask.values()) + others)
        packed = trainers["2 packed"].reduction.bytes(mask)
        result["payload"][f"{density:g}"] = packed / least
    return result


def checkpoints(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Measures what checkpoints cost a training, on the file system of temporary files.

    Args:
      spec: the experiment, with its checkpoint_every.
      dataset: images and labels.
      steps: of a training, evaluations included.
      rounds: how many trainings.

    Returns:
      checkpoints (of a training), seconds_per_checkpoint (median) and its megabytes; seconds
      of a training (median); share, of those in checkpoints.
    """
    trainer = Trainer(spec, dataset)
    weights, scores = _initial(trainer)
    mask = masks.ones({name: score.shape for name, score in scores.items()})
    trainer.train(weights, mask, 0, min(steps, spec.eval_every))  # traces and compiles
    taken: list[float] = []
    own = trainer._variables

    def variables() -> dict[str, np.ndarray]:
        taken.append(time.perf_counter())
        return own()

    trainer._variables = variables  # type: ignore[method-assign]
    seconds, size = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def keep(state: State) -> None:
            save(folder, state)
            taken[-1] = time.perf_counter() - taken[-1]

        for _ in range(rounds):
            began = time.perf_counter()
            trainer.train(weights, mask, 0, steps, keep=keep)
            seconds.append(time.perf_counter() - began)
        size = max((path.stat().st_size for path in folder.iterdir()), default=0)
    if not taken:
        raise UserError(f"no checkpoint within {steps} steps; give --block more than that")
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "steps": steps,
        "checkpoints": len(taken) // rounds,
        "seconds_per_checkpoint": statistics.median(taken),
        "megabytes": size / 2**20,
        "seconds": statistics.median(seconds),
        "share": sum(taken) / sum(seconds),
    }


def score(spec: Spec, input_shape: tuple[int, ...], classes: int, rounds: int) -> dict[str, Any]:
    """Compares scorers with one gradient of the same samples, on random images.

    gradient: of the plain Keras model in training mode, its own BatchNormalization, in one
    tf.function. The others are the spec's scorers; grasp_10x has ten times the samples in
    ten micro-batches, synflow is one of its 100 rounds, all take the weights from the model and
    bring the scores back.

    Args:
      spec: model, samples_per_class, score_batch_size, temperature.
      input_shape, classes: of the data set.
      rounds: how often.

    Returns:
      seconds by name (medians), ratio_seconds (median over rounds of the ratio to gradient),
      peak_memory_mb of a process of its own, and the same above one that only builds the model.
    """
    contenders = _scorers(alone(spec), input_shape, classes)
    seconds = alternate({n: c for n, c in contenders.items() if n != "nothing"}, rounds)
    peaks = {}
    for name in contenders:
        child = (
            "import json, sys; from lth_tf.bench import contenders as bench; "
            "bench.once(*map(json.loads, sys.argv[1:]))"
        )
        arguments = map(json.dumps, (name, spec.as_dict(), input_shape, classes))
        command = [sys.executable, "-c", child, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = float(done.stdout.split()[-1])
    return {
        "model": spec.model,
        "samples": spec.samples_per_class * classes,
        "seconds_by_name": {name: statistics.median(s) for name, s in seconds.items()},
        "ratio_seconds": {
            name: statistics.median(b / a for a, b in zip(seconds["gradient"], s, strict=True))
            for name, s in seconds.items()
        },
        "peak_memory_mb": peaks,
        "above_model_mb": {name: peak - peaks["nothing"] for name, peak in peaks.items()},
    }


def once(name: str, spec: dict[str, Any], input_shape: list[int], classes: int) -> None:
    """Runs a contender of `score` twice and prints the peak memory of this process in MB."""
    contender = _scorers(Spec.from_dict(spec), tuple(input_shape), classes)[name]
    for _ in range(2):
        contender()
    try:  # what a parent sees of its child on Linux includes its own peak
        with open("/proc/self/status") as file:
            print(next(int(x.split()[1]) for x in file if x.startswith("VmHWM")) / 2**10)
    except OSError:
        print(_megabytes(resource.getrusage(resource.RUSAGE_SELF)))


def _scorers(spec: Spec, input_shape: tuple[int, ...], classes: int) -> dict[str, Contender]:
    model = models.build(spec, input_shape, classes, spec.seed)
    reused, kernels = Reused(model), pruning.kernels(model)
    samples, rng = spec.samples_per_class * classes, np.random.default_rng(0)

    @functools.cache
    def batches(factor: int) -> list:
        images = rng.normal(size=(samples * factor, *input_shape)).astype(np.float32)
        labels = (np.arange(samples * factor) % classes).astype(np.int32)
        parts = -(-samples * factor // spec.score_batch_size)
        return list(
            zip(np.array_split(images, parts), np.array_split(labels, parts), strict=True)
        )

    @tf.function
    def differentiate(images: Any, labels: Any) -> list:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return tape.gradient(loss, model.trainable_variables)

    def gradient() -> None:
        for images, labels in batches(1):
            for g in differentiate(tf.constant(images), tf.constant(labels)):
                g.numpy()

    def of(name: str, factor: int = 1) -> Contender:
        def run() -> None:
            values = {n: v.numpy() for n, v in kernels.items()}
            SCORERS[name](reused, values, batches(factor) if factor else None)

        return run

    return {
        "nothing": lambda: None,
        "gradient": gradient,
        "snip": of("snip"),
        "grasp": of("grasp"),
        "grasp_10x": of("grasp", 10),
        "synflow": of("synflow", 0),
        "magnitude": of("magnitude", 0),
        "random": of("random", 0),
    }


def start(spec: Spec, data_dir: str | None, rounds: int) -> dict[str, Any]:
    """Measures a whole lth-imp that trains 100 steps, in child processes.

    Its seconds bound from above those from the start to the first training step.

    Returns:
      seconds (median, data already cached) and peak_memory_mb (largest).
    """
    alone(spec)
    command = [
        sys.executable, "-m", "lth_tf.tools.imp", "--levels=0", "--train_steps=100",
        "--distribute=none",
        f"--model={spec.model}", f"--dataset={spec.dataset}", f"--batch_size={spec.batch_size}",
        f"--validation_size={spec.validation_size}",
        *([f"--data_dir={data_dir}"] if data_dir else []),
    ]  # fmt: skip
    seconds, peaks = [], []
    for i in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            taken, peak = _child([*command, f"--workdir={folder}"])
        if i:  # the first fills the caches
            seconds.append(taken)
            peaks.append(peak)
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "seconds": statistics.median(seconds),
        "peak_memory_mb": max(peaks),
    }


def _child(command: list[str]) -> tuple[float, float]:
    """Runs a process to its end; returns its seconds and its peak memory in MB."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    taken = time.perf_counter() - began
    return taken, _megabytes(usage)


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
