"""doctor: a healthy machine passes; each trouble, provoked, is named with its one fix."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from lth_tf import doctor
from lth_tf.compat import tf
from lth_tf.datasets import DATASETS, tfds
from lth_tf.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIP = f"{sys.executable} -m pip install "


@pytest.fixture(autouse=True)
def _healthy(tmp_path, monkeypatch):
    """What the settings of whoever runs the tests would change."""
    for name in ("CUDA_VISIBLE_DEVICES", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def only(findings: list[doctor.Finding]) -> doctor.Finding:
    """The one finding there is; what is wrong has a fix, what is not has none."""
    (finding,) = findings
    assert bool(finding.fix) == (finding.status != "ok")
    return finding


def by_name(found: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in found["findings"]}


def pretend(folder: pathlib.Path, name: str, version: str, *requires: str) -> None:
    """Lets a folder of sys.path say that a distribution is installed in that version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {r}" for r in requires]))


def tool(prelude: str, *words: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs lth-doctor in a process in which `prelude` came first."""
    code = f"import sys; {prelude}; from lth_tf.tools import doctor; doctor.run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


# A healthy machine.


def test_healthy_machine(tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    start = time.monotonic()
    assert doctor.report("runs", "digits", None, as_json=False) == 0
    assert time.monotonic() - start < 10
    assert sorted(tmp_path.iterdir()) == before  # it changes nothing
    printed = capsys.readouterr().out
    names = [
        "python", *doctor.VERSIONS, *doctor.SETTINGS, *DATASETS, "cores", "memory_gb", "gpus",
        "tensorflow_devices", "tensorflow_has_xla", "packages", "tf.keras", "GPU", "workdir",
        "data set digits", "cache", "no problem found",
    ]  # fmt: skip
    assert [name for name in names if name not in printed] == []
    assert "not installed" not in printed and "fix:" not in printed
    assert f"not in {tmp_path}/tensorflow_datasets/mnist" in printed


def test_json_is_one_object_with_the_same(capsys):
    assert doctor.report("runs", None, None, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "versions", "devices", "data_sets", "settings", "findings", "problems"
    ]  # fmt: skip
    assert found["problems"] == 0
    assert found["versions"]["tensorflow"] == tf.__version__
    assert found["devices"]["cores"] >= 1 and "CPU:0" in found["devices"]["tensorflow_devices"]
    assert found["settings"]["TF_USE_LEGACY_KERAS"] == "1"
    assert {finding["status"] for finding in found["findings"]} == {"ok"}


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def fails(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "room", fails)
    monkeypatch.setattr(doctor, "devices", fails)
    found = doctor.examine("runs", None, None)
    assert found["problems"] == 2 and found["devices"] == {}
    for name in ("workdir", "devices"):
        assert "RuntimeError: boom" in by_name(found)[name]["found"]
        assert "--json" in by_name(found)[name]["fix"]


# Packages.


@pytest.mark.parametrize(
    ("have", "wanted", "answer"),
    [
        ("2.21.0", ">=2.21", True),
        ("2.21", "<=2.21.0", True),
        ("2.9.0", ">=2.21", False),
        ("2.22.0.dev20260101", "<2.22,>=2.21", False),
        ("2.21.0rc1", ">=2.21,<2.22", True),
        ("1.4.0", "~=1.2", True),
        ("2.3.1", "~=1.2", False),
        ("0.1.10", "~=0.1.1", True),
        ("0.2.0", "~=0.1.1", False),
        ("3.0", "!=3.0", False),
        ("3.0", "==3.0.0", True),
        ("3.1", ">3.1,!=3.1.*", False),
        ("anything", "", True),
        (None, ">=1", True),
    ],
)
def test_satisfies(have, wanted, answer):
    assert doctor.satisfies(have, wanted) is answer


def test_declared(tmp_path, monkeypatch):
    requires = ("A_b.c>=1,<2", "d (~=1.2)", "e[x,y] !=3", "f", 'g>=1; extra == "dev"')
    pretend(tmp_path, "some", "1.0", *requires)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.declared("some") == {"a-b-c": ">=1,<2", "d": "~=1.2", "e": "!=3", "f": ""}
    assert doctor.declared("no-such") == {}
    assert doctor.declared("lth_tf")["tf-keras"] == "<2.22,>=2.21"


@pytest.mark.parametrize(
    ("name", "version", "status", "said", "fix"),
    [
        ("numpy", "1.26.4", "problem", "1.26.4, but lth_tf needs >=2.0", "'numpy>=2.0'"),
        ("tf_keras", "2.20.1", "problem", "lth_tf needs <2.22,>=2.21", "'tf-keras<2.22,>=2.21'"),
        ("tensorflow", "2.22.0", "problem", "tf-keras needs", "'tensorflow>=2.21,<2.22'"),
        ("absl_py", "2.3.1", "warning", "model-optimization needs ~=1.2", "'absl-py>=1.4,~=1.2'"),
    ],
)
def test_versions_that_do_not_fit(name, version, status, said, fix, tmp_path, monkeypatch):
    pretend(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(doctor.packages())
    assert finding.name == doctor.normal(name) and finding.status == status
    assert said in finding.found and finding.fix == PIP + fix


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    """One that lth_tf does not really need, so that it is not there in truth."""
    requires = doctor.importlib.metadata.requires("lth_tf")
    pretend(tmp_path, "lth_tf", "0.1.0", *requires, "no-such-package>=3")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(doctor.packages())
    assert (finding.name, finding.status) == ("no-such-package", "problem")
    assert finding.found == "not installed" and finding.fix == PIP + "'no-such-package>=3'"


def test_package_that_lacks_another(tmp_path, monkeypatch):
    requires = doctor.importlib.metadata.requires("lth_tf")
    pretend(tmp_path, "lth_tf", "0.1.0", *requires, "halfway>=3", "wrecked")
    pretend(tmp_path, "halfway", "3.1")
    pretend(tmp_path, "wrecked", "1.0")
    (tmp_path / "halfway.py").write_text("import no_such_module\n")
    (tmp_path / "wrecked.py").write_text("print('noise')\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    halfway, wrecked = doctor.packages()
    assert "No module named 'no_such_module'" in halfway.found
    assert halfway.fix == PIP + "halfway==3.1"
    assert "ZeroDivisionError" in wrecked.found
    assert wrecked.fix == PIP + "--force-reinstall --no-deps wrecked==1.0"


def test_lth_tf_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert only(doctor.packages()).fix == PIP + f"-e {ROOT}"


@pytest.mark.parametrize("version", ["3.9.19", "3.14.0"])
def test_python_without_tensorflow(version, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: version)
    finding = only(doctor.python())
    assert finding.status == "problem" and version in finding.found
    assert "virtualenv with Python" in finding.fix and ">=3.10" in finding.fix


def test_keras_3_and_tfds_that_cannot_be_imported(tmp_path):
    """For real and through the tool, in one process, since TensorFlow takes long to load."""
    prelude = (
        "import tensorflow as tf; assert tf.keras.Model.__module__.startswith('keras.'); "
        # importlib_resources is what tfds 4.9.10 needs and does not declare.
        "sys.modules['tensorflow_datasets'] = sys.modules['importlib_resources'] = None"
    )
    words = ("--json", f"--data_dir={tmp_path}", "--dataset=mnist")
    done = tool(prelude, *words, TF_USE_LEGACY_KERAS="0")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    for name in ("tensorflow-datasets", "importlib-resources"):
        finding = by_name(found)[name]
        assert finding["status"] == "problem" and "None in sys.modules" in finding["found"]
        assert finding["fix"].startswith(PIP) and f"{name}==" in finding["fix"]
    finding = by_name(found)["tf.keras"]
    assert finding["status"] == "problem" and "TF_USE_LEGACY_KERAS=0" in finding["found"]
    assert finding["fix"] == "export TF_USE_LEGACY_KERAS=1"
    assert by_name(found)["data set mnist"]["status"] == "problem"
    assert found["problems"] == 4


def test_numpy_and_rich_that_cannot_be_imported():
    done = tool("sys.modules['numpy'] = sys.modules['rich'] = None")
    assert done.returncode == 1
    for name in ("numpy", "rich"):
        assert f"problem  {name}: " in done.stdout
        assert f"{PIP}--force-reinstall --no-deps {name}==" in done.stdout
    assert "warning  GPU: not looked at (tensorflow cannot be imported)" in done.stdout
    assert "warning  cache: not looked at" in done.stdout
    assert "ok       workdir" in done.stdout
    assert done.stdout.endswith("2 problems found\n")  # TensorFlow fails for want of NumPy only


@pytest.mark.parametrize(
    ("first", "errors"),
    [
        (
            "tensorflow",
            {
                "tensorflow": ImportError("libtensorflow_cc.so.2: no such file"),
                "tf_keras": ImportError("libtensorflow_cc.so.2: no such file"),
                "tensorflow_model_optimization": AttributeError("half imported"),
                "tensorflow_datasets": ModuleNotFoundError("no tensorflow", name="tensorflow.io"),
            },
        ),
        (
            "tf-keras",
            {
                "tf_keras": ModuleNotFoundError("no tf_keras", name="tf_keras"),
                "tensorflow_model_optimization": RecursionError("of TensorFlow's lazy loader"),
            },
        ),
    ],
)
def test_what_fails_for_the_lack_of_another_is_not_blamed(first, errors, monkeypatch):
    load = doctor.load
    monkeypatch.setattr(doctor, "load", lambda module: errors.get(module) or load(module))
    finding = only(doctor.packages())
    assert (finding.name, finding.status) == (first, "problem")


def test_absl_that_cannot_be_imported():
    done = tool("sys.modules['absl'] = None")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"run: {PIP}'absl-py~=1.4'" in done.stderr


def test_keras_3_through_the_order_of_imports(monkeypatch):
    class Model:
        __module__ = "keras.src.models.model"

    monkeypatch.setattr(tf.keras, "Model", Model)
    finding = only(doctor.keras("1"))
    assert finding.status == "problem" and finding.fix == "import lth_tf before tensorflow"


# GPUs.


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An nvidia-smi that shows a GPU, which TensorFlow does not see."""
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow does see a GPU here")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 470.57.02, 81920 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def test_gpu_without_cuda_libraries(driver, monkeypatch, capsys):
    if doctor.version("nvidia-cudnn-cu12"):
        pytest.skip("the CUDA libraries are installed")
    assert doctor.report("runs", None, None, as_json=False) == 1
    printed = capsys.readouterr().out
    assert "problem  GPU: 1 there (NVIDIA A100" in printed and "1 problem found" in printed
    assert f"fix: {PIP}'tensorflow[and-cuda]=={tf.__version__}'" in printed  # [..] is no markup


def test_gpu_with_an_old_driver(driver, tmp_path, monkeypatch):
    pretend(tmp_path, "nvidia_cudnn_cu12", "9.3.0.75")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(doctor.gpu(doctor.nvidia()))
    assert finding.status == "problem" and "470.57.02" in finding.found
    assert finding.fix == "install NVIDIA's driver, 525.60.13 or newer"


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpu_hidden_by_a_setting(value, driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    finding = only(doctor.gpu(doctor.nvidia()))
    assert finding.status == "warning" and finding.fix == "unset CUDA_VISIBLE_DEVICES"


def test_no_gpu_that_the_driver_knows(driver):
    driver.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert not any("No devices" in line for line in doctor.nvidia())
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because'\nexit 9\n")
    assert not any("failed" in line for line in doctor.nvidia())


# Folders.


def test_workdir_behind_a_file(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/runs", "file/runs/mnist"):
        finding = only(doctor.room(name))
        assert finding.status == "problem" and "Not a directory" in finding.found
        assert finding.fix.startswith("--workdir=")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder closed even to root")
def test_workdir_that_is_read_only():
    finding = only(doctor.room("/proc/runs"))
    assert finding.status == "problem" and finding.fix.startswith("--workdir=")


def test_workdir_that_is_a_dead_link(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    assert only(doctor.room("runs")).status == "problem"


def test_workdir_on_a_full_disk(monkeypatch):
    usage = type(shutil.disk_usage("."))(10**12, 10**12 - 10**8, 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = only(doctor.room("runs"))
    assert finding.status == "problem" and "0.10 GB are free" in finding.found
    assert "free some space" in finding.fix


def test_cache_behind_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "file" / "cache"))
    found = doctor.examine("runs", None, None)
    assert found["problems"] == 0
    assert by_name(found)["cache"]["status"] == "warning"
    assert by_name(found)["cache"]["fix"].startswith("export LTH_TF_CACHE=")


# Data sets.


def test_data_set_absent(tmp_path):
    finding = only(doctor.data_set("mnist", str(tmp_path / "data")))
    assert finding.status == "problem" and str(tmp_path / "data" / "mnist") in finding.found
    for word in ("TFDS_DATA_DIR=", "--data_dir=", "mnist/<version>", "--dataset=digits"):
        assert word in finding.fix


def test_data_sets_present(tmp_path, capsys):
    for name in ("mnist", "cifar10"):
        (tmp_path / "data" / name / "3.0.1").mkdir(parents=True)
        (tmp_path / "data" / name / "3.0.1" / tfds.INFO).touch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mnist-3.0.1-0123456789abcdef.npz").touch()
    assert doctor.report("runs", "mnist", str(tmp_path / "data"), as_json=False) == 0
    printed = capsys.readouterr().out
    assert f"3.0.1 in {tmp_path}/data/mnist, cached\n" in printed
    assert f"3.0.1 in {tmp_path}/data/cifar10\n" in printed
    assert f"not in {tmp_path}/data/fashion_mnist\n" in printed
    assert f"ok       data set mnist: 3.0.1 in {tmp_path}/data/mnist" in printed


def test_data_dir_in_a_cloud(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket")
    found = doctor.examine("runs", None, None)
    assert found["problems"] == 1
    assert "gs://bucket" in by_name(found)["data sets"]["found"]
    assert by_name(found)["data sets"]["fix"].startswith("--data_dir=")


def test_data_set_that_does_not_exist():
    with pytest.raises(UserError, match="unknown data set 'minst'.*Did you mean 'mnist'"):
        doctor.report("runs", "minst", None, as_json=False)
