"""What this machine has, and for each known trouble whether it is there and its one fix.

Any package may be missing or broken, so nothing but the standard library is imported
here before a check asks for it, and a check that fails is itself a finding. It is one file,
though a long one, because its checks are short and know nothing of each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib
import importlib.metadata
import io
import json
import logging
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lth_tf.errors import UserError

VERSIONS = (
    "lth_tf", "tensorflow", "tf_keras", "keras", "tensorflow-model-optimization",
    "tensorflow-datasets", "numpy", "absl-py", "tensorboard", "safetensors", "importlib_resources",
)  # fmt: skip
SETTINGS = (
    "TF_USE_LEGACY_KERAS", "CUDA_VISIBLE_DEVICES", "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS",
    "XLA_FLAGS", "TF_FORCE_GPU_ALLOW_GROWTH", "TF_CPP_MIN_LOG_LEVEL", "TFDS_DATA_DIR",
    "LTH_TF_CACHE",
)  # fmt: skip
MODULES = {"absl-py": "absl"}  # of the distributions whose module is called otherwise
MIN_FREE = 10**9  # bytes
MIN_DRIVER = "525.60.13"  # what CUDA 12 asks of NVIDIA's driver on Linux
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">=": operator.ge,
    "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check says.

    Attributes:
      name: what was looked at.
      status: ok, warning or problem.
      found: what is there.
      fix: a command or a setting; empty if ok.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def report(workdir: str, dataset: str | None, data_dir: str | None, as_json: bool) -> int:
    """Prints what `examine` returns; returns the exit code, 1 if there is a problem.

    Args:
      workdir, dataset, data_dir: see `examine`.
      as_json: print one JSON object instead of lines.

    Raises:
      UserError: no such data set.
    """
    found = examine(workdir, dataset, data_dir)
    if as_json:
        print(json.dumps(found))
    else:
        show(found)
    return int(found["problems"] > 0)


def examine(workdir: str, dataset: str | None, data_dir: str | None) -> dict[str, Any]:
    """Looks at the machine; changes nothing.

    Args:
      workdir: the folder that experiments would write to.
      dataset: the data set that has to be there, if any.
      data_dir: see `lth_tf.datasets.load`.

    Returns:
      What can be written as JSON: versions, devices, data_sets, settings, findings, problems.

    Raises:
      UserError: no such data set.
    """
    datasets = load("lth_tf.datasets")
    if dataset and not isinstance(datasets, Exception):
        datasets.DATASETS[dataset]
    settings = {name: os.environ.get(name) for name in SETTINGS}  # imports change some
    load("lth_tf.compat")  # first: in the order that works, and quietly
    gpus = nvidia()
    found: dict[str, Any] = {}
    findings: list[Finding] = []
    for section, gather in {
        "versions": versions,
        "devices": lambda: devices(gpus),
        "data_sets": lambda: data_sets(data_dir),
        "settings": lambda: settings,
    }.items():
        found[section] = attempt(section, gather, findings) or {}
    for name, check in {
        "python": python,
        "packages": packages,
        "tf.keras": lambda: keras(settings["TF_USE_LEGACY_KERAS"]),
        "GPU": lambda: gpu(gpus),
        "temporary files": temporary,
        "workdir": lambda: room(workdir),
        "data set": lambda: data_set(dataset, data_dir),
        "cache": cache_folder,
    }.items():
        findings.extend(attempt(name, check, findings) or [])
    found["findings"] = [dataclasses.asdict(finding) for finding in findings]
    found["problems"] = sum(finding.status == "problem" for finding in findings)
    return found


def attempt(name: str, look: Callable[[], Any], findings: list[Finding]) -> Any:
    """Returns what `look` returns; or None, if it fails, which is then added to the findings.

    Args:
      name: of the finding that it would be.
      look: what is tried.
      findings: grows by one if that fails.
    """
    try:
        return look()
    except ImportError as error:
        found, fix = f"not looked at ({error})", "mend the packages first"
        findings.append(Finding(name, "warning", found, fix))
    except Exception as error:
        found = f"looking at it failed ({type(error).__name__}: {error})"
        fix = "report it with what lth-doctor --json prints"
        findings.append(Finding(name, "problem", found, fix))
    return None


def load(module: str) -> Any:
    """Returns the imported module, or the exception that importing it raised."""
    # When something is missing, tfmot prints to stdout, NumPy to stderr, and tfds logs a traceback.
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module)
    except Exception as error:
        return error
    finally:
        logging.disable(logging.NOTSET)


def needed(module: str) -> Any:
    """Returns the imported module; raises ImportError whatever the reason."""
    found = load(module)
    if isinstance(found, Exception):
        raise ImportError(f"{module} cannot be imported") from found
    return found


# What there is.


def version(distribution: str) -> str | None:
    """Returns the installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Returns name -> version, None where not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def nvidia() -> list[str]:
    """Returns the GPUs that NVIDIA's driver or the kernel shows, whatever TensorFlow sees."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, timeout=5, check=True)
        if lines := [
            line for line in done.stdout.decode(errors="replace").splitlines() if "," in line
        ]:
            return lines
    return sorted(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*"))


def devices(gpus: list[str]) -> dict[str, Any]:
    """Returns processors, memory and what TensorFlow sees, without initialising a device."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    found: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    with contextlib.suppress(OSError):
        if match := re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text()):
            found["memory_available_gb"] = round(int(match[1]) * 1024 / 1e9, 1)
    found["gpus"] = gpus
    tf = load("tensorflow")
    if not isinstance(tf, Exception):
        found["tensorflow_devices"] = [
            device.name.removeprefix("/physical_device:")
            for device in tf.config.list_physical_devices()
        ]
        found["tensorflow_built_for_cuda"] = tf.sysconfig.get_build_info().get("cuda_version")
        found["tensorflow_has_xla"] = tf.test.is_built_with_xla()
    return found


def data_sets(data_dir: str | None) -> dict[str, dict[str, Any]]:
    """Returns name -> version (None: not there), folder, and whether the cache has it decoded."""
    from lth_tf.datasets import DATASETS, cache, tfds

    found: dict[str, dict[str, Any]] = {}
    for name in DATASETS:
        if name == "digits":
            found[name] = {"version": "in the package", "folder": None, "cached": False}
            continue
        try:
            folder, stored = tfds.resolve(data_dir) / name, cache.folder()
        except UserError:
            continue  # data_set() or cache_folder() says so
        have = tfds.prepared(folder)
        cached = any(stored.glob(f"{name}-{have}-*.npz"))
        found[name] = {"version": have, "folder": str(folder), "cached": cached}
    return found


# Troubles.


def python() -> list[Finding]:
    """A Python for which there is no TensorFlow."""
    have = platform.python_version()
    wanted = importlib.metadata.metadata("lth_tf")["Requires-Python"] or ""
    if satisfies(have, wanted):
        return [Finding("python", "ok", have)]
    fix = f"make a virtualenv with Python {wanted} and install lth_tf there"
    return [Finding("python", "problem", f"{have}, but lth_tf needs {wanted}", fix)]


def packages() -> list[Finding]:
    """Packages missing, broken, or of versions that do not go together."""
    if version("lth_tf") is None:
        root = Path(__file__).resolve().parent.parent
        return [Finding("lth_tf", "problem", "not installed", pip("-e", str(root)))]
    ours = declared("lth_tf")
    modules = {name: load(MODULES.get(name, name.replace("-", "_"))) for name in ours}
    failed = {name for name in ours if isinstance(modules[name], Exception)}
    findings = []
    wants: dict[str, dict[str, str]] = {}
    for name, wanted in ours.items():
        have = version(name) or getattr(modules[name], "__version__", None)
        if name in failed:
            # What fails for the lack of another is mended with that one.
            if not failed & {*declared(name), lacking(modules[name])} - {name}:
                findings.append(broken(name, wanted, have, modules[name]))
        elif not satisfies(have, wanted):
            text = f"{have}, but lth_tf needs {wanted}"
            findings.append(Finding(name, "problem", text, pip(name + wanted)))
        else:
            for other, theirs in declared(name).items():
                wants.setdefault(other, {})[name] = theirs
    for name, by in wants.items():
        have = version(name)
        against = {other: wanted for other, wanted in by.items() if not satisfies(have, wanted)}
        if against:
            text = " and ".join(f"{other} needs {wanted}" for other, wanted in against.items())
            clauses = ",".join([ours.get(name, ""), *against.values()]).strip(",").split(",")
            fix = pip(name + ",".join(dict.fromkeys(clauses)))
            status = "problem" if "tf-keras" in against else "warning"
            findings.append(Finding(name, status, f"{have}, but {text}", fix))
    text = f"the {len(ours)} that lth_tf needs, in versions that go together"
    return findings or [Finding("packages", "ok", text)]


def broken(name: str, wanted: str, have: str | None, error: Exception) -> Finding:
    """Returns the finding for a package that cannot be imported.

    Args:
      name: of the distribution.
      wanted: the versions that lth_tf needs, as '>=2.21'.
      have: the installed version, if any.
      error: what importing it raised.
    """
    if have is None:
        return Finding(name, "problem", "not installed", pip(name + wanted))
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{have} is installed, but importing it fails ({type(error).__name__}: {first})"
    if lacking(error) not in ("", name):
        return Finding(name, "problem", text, pip(f"{name}=={have}"))  # installs what it lacks
    # With its dependencies, pip would raise those that the others hold down.
    return Finding(name, "problem", text, pip("--force-reinstall", "--no-deps", f"{name}=={have}"))


def lacking(error: Exception) -> str:
    """Returns which distribution was not found, as far as its module tells; '' if none."""
    module = ((isinstance(error, ModuleNotFoundError) and error.name) or "").split(".")[0]
    return next((name for name in MODULES if MODULES[name] == module), normal(module))


def keras(legacy: str | None) -> list[Finding]:
    """Keras 3 instead of tf_keras: none of its models can be pruned.

    Args:
      legacy: TF_USE_LEGACY_KERAS as it was before anything was imported.
    """
    needed("tf_keras")
    model = needed("tensorflow").keras.Model
    if legacy not in ("1", "true", "True"):
        text = f"TF_USE_LEGACY_KERAS={legacy}: where TensorFlow is imported first, it is Keras 3"
        return [Finding("tf.keras", "problem", text, "export TF_USE_LEGACY_KERAS=1")]
    if model.__module__.split(".")[0] != "tf_keras":
        text = "is Keras 3, since TensorFlow was imported before lth_tf"
        return [Finding("tf.keras", "problem", text, "import lth_tf before tensorflow")]
    return [Finding("tf.keras", "ok", f"is tf_keras {version('tf_keras')}")]


def gpu(gpus: list[str]) -> list[Finding]:
    """GPUs that TensorFlow does not see.

    Args:
      gpus: as `nvidia` returns them.
    """
    tf = needed("tensorflow")
    seen = tf.config.list_physical_devices("GPU")
    if seen or not gpus:
        text = f"TensorFlow sees {len(seen)}" if seen else "none; TensorFlow uses the CPU"
        return [Finding("GPU", "ok", text)]
    there = f"{len(gpus)} there ({gpus[0]}), but TensorFlow sees none"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"\s*(-.*)?", visible):
        text = f"{there}: CUDA_VISIBLE_DEVICES={shlex.quote(visible)} hides them"
        return [Finding("GPU", "warning", text, "unset CUDA_VISIBLE_DEVICES")]
    if not tf.test.is_built_with_cuda() or version("nvidia-cudnn-cu12") is None:
        fix = pip(f"tensorflow[and-cuda]=={tf.__version__}")
        return [Finding("GPU", "problem", f"{there}: the CUDA libraries are not installed", fix)]
    fix = f"install NVIDIA's driver, {MIN_DRIVER} or newer"
    return [Finding("GPU", "problem", f"{there} although the CUDA libraries are installed", fix)]


def room(workdir: str) -> list[Finding]:
    """A workdir that cannot be written, or a disk that is nearly full."""
    if why := refusal(Path(workdir)):
        text = f"{workdir!r} cannot be written ({why})"
        return [Finding("workdir", "problem", text, "--workdir=FOLDER that can be written")]
    free = shutil.disk_usage(nearest(Path(workdir))).free
    text = f"{workdir!r} can be written; {free / 1e9:.2f} GB are free there"
    if free < MIN_FREE:
        fix = "free some space, or --workdir=FOLDER on another disk"
        return [Finding("workdir", "problem", text, fix)]
    return [Finding("workdir", "ok", text)]


def temporary() -> list[Finding]:
    """No folder for temporary files, as in containers that are read-only."""
    try:
        text = f"{tempfile.gettempdir()!r} can be written"
    except OSError as error:
        fix = "export TMPDIR=FOLDER that can be written"
        return [Finding("temporary files", "problem", error.strerror or str(error), fix)]
    return [Finding("temporary files", "ok", text)]


def data_set(name: str | None, data_dir: str | None) -> list[Finding]:
    """The wanted data set is absent, or the folder of data sets is not a folder."""
    from lth_tf import datasets

    title = f"data set {name}" if name else "data sets"
    try:
        folder = datasets.tfds.resolve(data_dir)
    except UserError as error:
        return [Finding(title, "problem", str(error), "--data_dir=FOLDER of this machine")]
    if name is None:
        return []
    if name == "digits":
        images = datasets.load(name).train_inputs
        return [Finding(title, "ok", f"{len(images):,} images in the package")]
    if name == "tiny_imagenet":
        try:
            return [Finding(title, "ok", f"{datasets.tiny_imagenet.find(data_dir)}")]
        except UserError as error:
            fix = "unpack tiny-imagenet-200.zip; --data_dir=FOLDER that has it"
            return [Finding(title, "problem", str(error), fix)]
    if have := datasets.tfds.prepared(folder / name):
        return [Finding(title, "ok", f"{have} in {folder / name}")]
    fix = (
        f"export TFDS_DATA_DIR=FOLDER or --data_dir=FOLDER, where tensorflow-datasets has prepared "
        f"{name}/<version>; or be on a network at the first run; or --dataset=digits"
    )
    text = f"no finished version in {folder / name}"
    return [Finding(title, "problem", text, fix)]


def cache_folder() -> list[Finding]:
    """A cache that cannot be written: each start decodes the data set again."""
    from lth_tf.datasets import cache

    fix = "export LTH_TF_CACHE=FOLDER that can be written"
    try:
        folder = cache.folder()
    except UserError as error:
        return [Finding("cache", "warning", str(error), fix)]
    if why := refusal(folder):
        text = f"{str(folder)!r} cannot be written ({why}): each start decodes the data set again"
        return [Finding("cache", "warning", text, fix)]
    return [Finding("cache", "ok", f"{str(folder)!r} can be written")]


# Files and versions.


def nearest(folder: Path) -> Path:
    """Returns the folder, or the nearest above it that exists (as a file or a dead link too)."""
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def refusal(folder: Path) -> str:
    """Returns why nothing can be written there, '' if something can; leaves no trace."""
    there = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions say nothing to root
            return ""
    except OSError as error:
        return f"{there}: {os.strerror(error.errno or 0)}"


def normal(name: str) -> str:
    """Returns the one spelling of a distribution's name: 'tf_keras' is 'tf-keras'."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(distribution: str) -> dict[str, str]:
    """Returns what a distribution requires, name -> '>=2.21,<2.22'; extras and markers left out."""
    found = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires(distribution) or ():
            if match := re.fullmatch(r"([\w.-]+)\s*(?:\[.*?\])?\s*\(?([^;()]*)\)?\s*", line):
                found[normal(match[1])] = match[2].replace(" ", "")
    return found


def satisfies(have: str | None, wanted: str) -> bool:
    """Says whether a version is in the range; one that is not known is.

    >>> satisfies("2.21.0", ">=2.21,<2.22"), satisfies("2.3.1", "~=1.2"), satisfies("3", "<3")
    (True, False, False)
    """
    for sign, text in re.findall(r"([~=!<>]=|<|>)(\d[\w.]*)(?![\w.*])", wanted if have else ""):
        given, bound = numbers(have or ""), numbers(text)
        if sign == "~=":
            same = text.count(".")
            if given < bound or given[:same] != bound[:same]:
                return False
        elif not SIGNS[sign](given, bound):
            return False
    return True


def numbers(text: str) -> tuple[int, ...]:
    """Returns the first four numbers of a version: '2.21.0rc1' gives (2, 21, 0, 0)."""
    release = re.match(r"[\d.]*", text)
    found = [int(part) for part in re.findall(r"\d+", release[0] if release else "")]
    return tuple((found + [0] * 4)[:4])


def pip(*words: str) -> str:
    """Returns the command that installs into the environment of this very Python."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


# Showing.


def show(found: dict[str, Any]) -> None:
    """Prints what `examine` returned, one line an entry, so that a fix can be copied."""
    for title in ("versions", "devices", "data_sets", "settings"):
        _print(title.replace("_", " "), "bold")
        for name, value in found[title].items():
            _print(f"  {name:30} {_text(value, title)}")
    _print("findings", "bold")
    for finding in found["findings"]:
        style = {"ok": "green", "warning": "yellow", "problem": "bold red"}[finding["status"]]
        _print(f"  {finding['status']:8} {finding['name']}: {finding['found']}", style)
        if finding["fix"]:
            _print(f"           fix: {finding['fix']}")
    count = found["problems"]
    _print(f"{count or 'no'} problem{'s' * (count > 1)} found")


def _text(value: Any, title: str) -> str:
    if title == "data_sets":
        if value["folder"] is None:
            return value["version"]
        if value["version"] is None:
            return f"not in {value['folder']}"
        return f"{value['version']} in {value['folder']}" + ", cached" * value["cached"]
    if isinstance(value, list):
        return "; ".join(value) or "none"
    absent = {"versions": "not installed", "settings": "not set"}
    return absent.get(title, "none") if value is None else str(value)


def _print(line: str, style: str = "") -> None:
    try:
        from rich.console import Console
    except ImportError:  # then that is among the findings
        print(line)
    else:
        Console(soft_wrap=True).print(line, style=style, markup=False, highlight=False)
