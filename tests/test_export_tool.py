"""lth-export: from a workdir to a folder, or one sentence about what there is instead."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from test_tools import tool

from lth_tf import datasets, experiments, exporters
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.tickets import load_ticket, load_trained


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """Levels 0 and 1 with a control off level 1; level 2 has a ticket but is not trained."""
    work = tmp_path_factory.mktemp("export") / "work"
    spec = Spec(
        dataset="digits",
        model="lenet_20_10",
        levels=2,
        train_steps=40,
        eval_every=20,
        validation_size=100,
        controls=("reinit",),
        control_levels=(1,),
        compile="off",
    )
    experiments.imp(spec, work, datasets.load("digits"))
    (work / "replicate_00" / "level_02" / "trained.safetensors").unlink()
    return work


@pytest.fixture(scope="module")
def runs(workdir) -> dict[str, tuple[int, str, str]]:
    """Name -> exit code, stdout and stderr of a run; the runs follow each other."""
    work, level = f"--workdir={workdir}", "--level=1"
    commands = {
        "trained": [work, level],
        "again": [work, level],
        "ticket": [work, level, "--what=ticket", "--replicate=0", "--format=saved_model"],
        "branch": [work, level, "--branch=reinit", f"--output={workdir.parent / 'out' / 'net'}"],
        "no workdir": [f"--workdir={workdir}x", level],
        "no level": [work, "--level=7"],
        "unfinished": [work, "--level=2"],
        "format": [work, level, "--format=saved_modle"],
        "no level flag": [work],
        "what": [work, level, "--what=trianed"],
    }
    found = {}
    for name, words in commands.items():
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            tool("export") as export,
            flagsaver.flagsaver(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            patch.setattr(sys, "argv", ["lth-export", *words])
            export.run()
        found[name] = ended.value.code or 0, out.getvalue(), err.getvalue()
    return found


def weights_in(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {n: v.numpy() for n, v in tf.saved_model.load(str(folder)).weights.items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == w.tobytes() for name, w in expected.items())


# What it writes.


def test_trained_weights_go_into_the_levels_folder(workdir, runs):
    code, out, err = runs["trained"]
    level = workdir / "replicate_00" / "level_01"
    assert code == 0 and not err
    assert_equal(
        weights_in(level / "export_saved_model_trained"),
        load_trained(level / "trained.safetensors"),
    )
    place, density, export, dense = out.splitlines()
    assert place == str(level / "export_saved_model_trained")
    assert density == f"density {load_ticket(level / 'ticket.safetensors').density:.4f}"
    found = re.fullmatch(r"export: ([\d,]+) bytes, ([\d,]+) as tar.gz", export)
    raw, packed = (int(n.replace(",", "")) for n in found.groups())
    files = [p for p in (level / "export_saved_model_trained").rglob("*") if p.is_file()]
    assert raw == sum(p.stat().st_size for p in files) and 0 < packed < raw
    size = (workdir / "replicate_00" / "level_00" / "trained.safetensors").stat().st_size
    assert dense.startswith(f"dense weights: {size:,} bytes, ")


def test_ticket_is_the_start(workdir, runs):
    level = workdir / "replicate_00" / "level_01"
    assert runs["ticket"][0] == 0, runs["ticket"]
    ticket = load_ticket(level / "ticket.safetensors")
    assert_equal(weights_in(level / "export_saved_model_ticket"), ticket.weights)


def test_branch_and_output(workdir, runs):
    assert runs["branch"][0] == 0, runs["branch"]
    branch = workdir / "replicate_00" / "level_01" / "branch_reinit"
    folder = workdir.parent / "out" / "net"
    assert_equal(weights_in(folder), load_trained(branch / "trained.safetensors"))
    assert json.loads((folder / "ticket.json").read_text())["origin"]["arm"] == "reinit"


def test_an_export_does_not_disturb_the_workdir(workdir, runs):
    """Exports are no trainings, and nothing half-written lies about."""
    names = {str(f.relative_to(workdir / "replicate_00")) for f in experiments.finished(workdir)}
    assert names == {"level_00", "level_01", "level_01/branch_reinit"}
    assert not list(workdir.rglob(".export*"))


# What it says.


@pytest.mark.parametrize(
    "run, message",
    [
        ("again", r"error: '.*/level_01/export_saved_model_trained' exists; delete it or"),
        ("no workdir", r"error: '.*/workx' is not a workdir: it has no spec.json; give the folder"),
        (
            "no level",
            r"error: 'replicate_00/level_07' does not exist in '.*/work'; finished: "
            r"level 0, 1; branch reinit at level 1\n",
        ),
        (
            "unfinished",
            r"error: 'replicate_00/level_02' is not finished in '.*/work'; finished: "
            r"level 0, 1; branch reinit at level 1; lth-imp on this workdir goes on",
        ),
        (
            "format",
            r"error: unknown export format 'saved_modle'; there are: saved_model. Did you mean "
            r"'saved_model'\?",
        ),
        ("no level flag", r"--level must have a value"),
        ("what", r"value should be one of <trained\|ticket>"),
    ],
)
def test_a_mistake_is_one_sentence(runs, run, message):
    code, out, err = runs[run]
    assert code == 1 and re.search(message, err), err
    assert "Traceback" not in err
    assert not err.startswith("error: ") or (err.count("\n") == 1 and not out)


def test_find_names_what_there_is(workdir, tmp_path):
    assert exporters.find(workdir, 0, 1) == workdir / "replicate_00" / "level_01"
    with pytest.raises(
        UserError, match="'replicate_01/level_00' does not exist.*only in replicate_00"
    ):
        exporters.find(workdir, 1, 0)
    with pytest.raises(UserError, match="'replicate_00/level_00/branch_reinit' does not exist"):
        exporters.find(workdir, 0, 0, "reinit")
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(UserError, match="finished: nothing yet"):
        exporters.find(tmp_path, 0, 0)
