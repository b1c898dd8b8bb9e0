"""The command-line tools as a user meets them."""

import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import lth_tf.flags
from lth_tf.analysis import read_summary
from lth_tf.datasets import DATASETS
from lth_tf.experiments import read_spec
from lth_tf.spec import fields_of
from lth_tf.tickets import load_ticket

NETWORK = [
    "--dataset=digits", "--model=lenet_20_10", "--validation_size=100", "--train_steps=20",
    "--eval_every=10", "--batch_size=30", "--compile=off",
]  # fmt: skip
TINY = [*NETWORK, "--levels=2"]
PICKED = [*NETWORK, "--scorer=snip", "--compression=2,5", "--samples_per_class=3"]


@contextlib.contextmanager
def tool(name):
    """A tool's module; while it is here, its flags are the only ones."""
    others = [
        (module, flag)
        for module, some in flags.FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl")
        for flag in some
    ]
    flags.FLAGS.remove_flag_values([flag.name for _, flag in others])
    kept = set(flags.FLAGS)
    sys.modules.pop(f"lth_tf.tools.{name}", None)
    try:
        yield importlib.import_module(f"lth_tf.tools.{name}")
    finally:
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - kept)
        for module, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def run(monkeypatch, capsys, *words, name="imp"):
    """Exit code, stdout and stderr of a tool, in this process."""
    monkeypatch.setattr(sys, "argv", [f"lth-{name}", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "120")
    with tool(name) as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.run()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def trained(workdir):
    """Time at which each file of a finished training was written."""
    return {
        p: p.stat().st_mtime_ns
        for p in workdir.rglob("*")
        if p.name in ("trained.safetensors", "ticket.safetensors", "metrics.csv")
    }


def test_imp_plans_runs_reports_and_resumes(monkeypatch, capsys, tmp_path):
    words = [*TINY, "--controls=reinit", "--control_levels=1", f"--workdir={tmp_path}/run"]
    code, out, _ = run(monkeypatch, capsys, *words, "--plan")
    assert code == 0 and not (tmp_path / "run").exists()
    for text in ("fc1/kernel", "64 x 20", "1,280", "819", "4 trainings", "80 steps"):
        assert text in out, text
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    for text in ("replicate 0 level 1 reinit: density 0.8000", "dense", "re-initialised", "80.00%"):
        assert text in out, text
    assert "figure.png" in out and "summary.csv" in out
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = read_summary(tmp_path / "run")
    assert len(rows) == 4
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0 and read_summary(tmp_path / "run") == rows


@pytest.mark.parametrize(
    "words, message",
    [
        (["--levels=-1"], "error: levels -1 is out of range"),
        (["--preset=nothing"], "error: unknown preset 'nothing'; there are: "),
        (["--batch_size=5000"], "error: batch_size 5000 exceeds the 1337 training examples"),
        (["--levels=40"], "error: nothing would be left of"),
        (["--target_density=1.5"], "error: target_density 1.5 is out of range"),
        (["--learning_rate=1e30", "--optimizer=sgd"], "not finite at step"),
        (["stray"], "error: unexpected 'stray'"),
        (["--workdir={file}"], "a file is in the way"),
        (["--dataset=mnist", "--data_dir={empty}"], "error: data set 'mnist' is not in"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_1(monkeypatch, capsys, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    places = {"file": tmp_path / "file", "empty": tmp_path}
    monkeypatch.setenv("LTH_TF_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    words = [f"--workdir={tmp_path}/run", *TINY, *(w.format(**places) for w in words)]
    code, _, err = run(monkeypatch, capsys, *words)
    require_one_sentence(code, err, message)


def require_one_sentence(code, err, message):
    assert code == 1
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name, word, message",
    [
        ("imp", "--dataset=digitz", f"are: {', '.join(DATASETS)}. Did you mean 'digits'?"),
        ("imp", "--scorer=snip", "Unknown command line flag 'scorer'"),
        ("imp", "--density=0.1", "Unknown command line flag 'density'"),
        ("one_shot", "--levels=3", "Unknown command line flag 'levels'"),
        ("one_shot", "--rewind_step=3", "Unknown command line flag 'rewind_step'"),
        (
            "one_shot", "--scorer=synflw",
            "unknown scorer 'synflw'; there are: fisher_diag, fisher_taylor, grasp, hessian_diag, "
            "magnitude, random, snip, synflow. Did you mean 'synflow'?",
        ),
        ("one_shot", "--density=ten", "'ten' is not a number"),
        ("one_shot", "--controls=shufle", "unknown branch 'shufle'"),
        ("branch", "--levels=1,two", "whole numbers only"),
    ],
)  # fmt: skip
def test_a_typo_lists_what_exists(monkeypatch, capsys, tmp_path, name, word, message):
    needed = ["--branch=reinit"] if name == "branch" else []
    code, out, err = run(
        monkeypatch, capsys, f"--workdir={tmp_path}/run", *needed, word, name=name
    )
    assert code == 1 and message in out + err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# lth-oneshot


def test_one_shot_plans_and_scores_only(monkeypatch, capsys, tmp_path):
    words = [*PICKED, f"--workdir={tmp_path}/run"]
    code, out, _ = run(monkeypatch, capsys, *words, "--plan", "--dense", name="one_shot")
    assert code == 0 and not (tmp_path / "run").exists()
    for text in ("fc1/kernel", "64 x 20", "by rank", "316 (20.00%)", "3 trainings", "60 steps",
                 "by snip in 1 round(s), scope global; densities 50.000%, 20.000%"):  # fmt: skip
        assert text in out, text
    code, out, _ = run(monkeypatch, capsys, *words, "--score_only", name="one_shot")
    assert code == 0
    assert "density 50.0000%, on a path from input to output " in out
    assert f"tickets: {tmp_path}/run/replicate_*/level_*/ticket.safetensors" in out
    assert "early stop" not in out and "figure" not in out and "test accuracy" not in out
    found = sorted(p.parent.name for p in (tmp_path / "run").rglob("*.safetensors"))
    assert found == ["level_01", "level_02"]
    assert not (tmp_path / "run" / "figure.png").exists()


@pytest.fixture(scope="module")
def picked(tmp_path_factory):
    """What lth-oneshot printed, in a process of its own, and its workdir."""
    work = tmp_path_factory.mktemp("tools") / "run"
    ended = subprocess.run(
        [sys.executable, "-m", "lth_tf.tools.one_shot", *PICKED, f"--workdir={work}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, work


def test_one_shot_from_end_to_end(picked):
    out, work = picked
    for text in ("replicate 0 level 1 ticket: density 0.5000", "40 of 40 steps", "50.00%", "20.00%",
                 "density 20.0000%, on a path from input to output", "summary.csv"):  # fmt: skip
        assert text in out, text
    assert "dense" not in out and "inning" not in out
    assert (work / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["arm"], r["level"], r["density"]) for r in read_summary(work)] == [
        ("ticket", 1, 0.5), ("ticket", 2, 0.2)
    ]  # fmt: skip
    spec = read_spec(work)
    assert (spec.recipe, spec.scorer, spec.scope) == ("one_shot", "snip", "global")
    assert spec.density == (0.5, 0.2)
    origin = load_ticket(work / "replicate_00" / "level_02" / "ticket.safetensors").origin
    assert origin["scoring"]["samples"] == 30


def test_one_shot_does_nothing_twice(monkeypatch, capsys, picked):
    _, work = picked
    before, rows = trained(work), read_summary(work)
    code, out, _ = run(monkeypatch, capsys, *PICKED, f"--workdir={work}", name="one_shot")
    assert code == 0 and "0 of 0 steps" in out
    assert trained(work) == before and read_summary(work) == rows


@pytest.mark.parametrize(
    "words, message",
    [
        (["--density=0"], "error: density 0.0 is out of range; it must be above 0.0 and below"),
        (["--density=0.1,2"], "error: density 2.0 is out of range"),
        (["--density=0.1,0.1"], "error: density [0.1, 0.1] must name different densities"),
        (["--density=1e-6"], "error: density 1e-06 of 1580 weights leaves nothing"),
        (["--compression=abc"], "error: compression 'abc' is out of range"),
        (["--compression=0.5"], "error: compression '0.5' is out of range"),
        (["--compression="], "error: density [] must name different densities"),
        (["--samples_per_class=500"], "error: samples_per_class 500 cannot be had: class 0 has "),
        (["--protect=conv*"], "error: protect 'conv*' fits no kernel; the kernels are fc1/kernel,"),
        (["--scorer=snip", "--temperature=2"], "error: temperature 2 needs --scorer=grasp"),
        (["--width=2"], "error: model 'lenet_20_10' has no width to choose"),
        (["--controls=absolute"], "error: the branch 'absolute' changes nothing for scorer snip"),
        (["--controls=shuffle", "--control_levels=9"], "error: control_levels [9] are out of"),
        (["--workdir={file}"], "a file is in the way"),
        (["stray"], "error: unexpected 'stray'"),
    ],
)
def test_mistakes_with_one_shot(monkeypatch, capsys, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    given = [w.format(file=tmp_path / "file") for w in words]
    scorer = [] if "--scorer=snip" in words else ["--scorer=snip"]
    code, _, err = run(
        monkeypatch, capsys, f"--workdir={tmp_path}/run", *NETWORK, *scorer, *given, name="one_shot"
    )
    require_one_sentence(code, err, message)


# lth-branch


def test_branch_adds_a_control_to_a_finished_workdir(picked, tmp_path):
    """In a process of its own."""
    work = tmp_path / "run"
    shutil.copytree(picked[1], work)
    before, rows = trained(work), read_summary(work)
    ended = subprocess.run(
        [sys.executable, "-m", "lth_tf.tools.branch", f"--workdir={work}", "--branch=shuffle",
         "--levels=2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    after = trained(work)
    assert {p: after[p] for p in before} == before
    here = work / "replicate_00" / "level_02" / "branch_shuffle"
    assert {p.parent for p in set(after) - set(before)} == {here}
    assert "20 of 20 steps" in ended.stdout and "shuffled" in ended.stdout
    now = read_summary(work)
    assert [r for r in now if r["arm"] == "ticket"] == rows  # the seconds are those of before
    assert [(r["arm"], r["level"]) for r in now if r["arm"] != "ticket"] == [("shuffle", 2)]
    assert (read_spec(work).controls, read_spec(work).control_levels) == (("shuffle",), (2,))
    own = load_ticket(here.parent / "ticket.safetensors")
    control = load_ticket(here / "ticket.safetensors")
    assert {n: m.sum() for n, m in own.mask.items()} == {
        n: m.sum() for n, m in control.mask.items()
    }


@pytest.mark.slow
def test_branch_keeps_the_controls_that_there_are(monkeypatch, capsys, tmp_path):
    work = tmp_path / "run"
    words = ["--controls=reinit", "--control_levels=1", f"--workdir={work}"]
    assert run(monkeypatch, capsys, *TINY, *words)[0] == 0
    before = trained(work)
    for _ in range(2):
        code, out, err = run(
            monkeypatch, capsys, f"--workdir={work}", "--branch=shuffle,reinit", name="branch"
        )
        assert code == 0, err
        spec = read_spec(work)
        assert spec.controls == ("reinit", "shuffle") and spec.control_levels == (1,)
        after = trained(work)
        assert {p: after[p] for p in before} == before
        assert len(after) == len(before) + 3
    arms = [(r["arm"], r["level"]) for r in read_summary(work)]
    assert arms == [
        ("ticket", 0), ("ticket", 1), ("reinit", 1), ("shuffle", 1), ("ticket", 2)
    ]  # fmt: skip
    assert "re-initialised" in out and "shuffled" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--branch=shufle"], "unknown branch 'shufle'; there are: reinit, shuffle, random_erk, "),
        (["--branch=reinit,invrt"], "Did you mean 'invert'?"),
        (["--branch=reinit", "--levels=3"], "error: control_levels [3] are out of range"),
        (["--branch=reinit", "--levels=0"], "controls run off pruned tickets, here levels 1 to 2"),
        (["--branch=reinit", "stray"], "error: unexpected 'stray'"),
        (["--branch=reinit", "--workdir={empty}"], "is not the workdir of an experiment"),
        (["--branch=reinit", "--workdir={empty}/none"], "is not the workdir of an experiment"),
        (["--branch=reinit", "--workdir={damaged}"], "cannot be read"),
        (["--branch=reinit", "--workdir={foreign}"], "a spec has no field 'levls'"),
    ],
)
def test_mistakes_with_branch(monkeypatch, capsys, tmp_path, picked, words, message):
    for name, text in (("damaged", '{"levels": '), ("foreign", '{"levls": 3}'), ("empty", None)):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "spec.json").write_text(text)
    places = {name: tmp_path / name for name in ("damaged", "foreign", "empty")}
    before = {p: p.stat().st_mtime_ns for p in picked[1].rglob("*")}
    code, _, err = run(
        monkeypatch, capsys, f"--workdir={picked[1]}", *(w.format(**places) for w in words),
        name="branch",
    )  # fmt: skip
    require_one_sentence(code, err, message)
    assert {p: p.stat().st_mtime_ns for p in picked[1].rglob("*")} == before
    assert not list((tmp_path / "empty").iterdir())


def test_branch_needs_to_be_told_where_and_what(monkeypatch, capsys):
    for words, missing in ((["--branch=reinit"], "workdir"), (["--workdir=x"], "branch")):
        code, _, err = run(monkeypatch, capsys, *words, name="branch")
        assert code == 1 and f"--{missing}" in err and "Traceback" not in err


# The others.


def test_bench_takes_presets_of_both_recipes():
    for preset in ("fashion_lenet5_imp", "fashion_lenet5_oneshot"):
        with tool("bench") as bench, flagsaver.flagsaver():
            words = ["lth-bench", f"--preset={preset}", "--rounds=5", "train"]
            assert flags.FLAGS(lth_tf.flags.expand(words)) == ["lth-bench", "train"]
            spec = lth_tf.flags.spec_from_flags()
            assert (spec.model, spec.batch_size, bench.ROUNDS.value) == ("lenet5", 128, 5)


def test_help_lists_a_tools_flags():
    """In processes of their own, since absl defines --help once; at the same time."""
    flag = {"export": "--level", "doctor": "--data_dir"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"lth_tf.tools.{name}", "--help"],
            stdout=subprocess.PIPE, text=True,
        )
        for name in flag
    }  # fmt: skip
    for name, process in processes.items():
        assert flag[name] in process.communicate()[0]


def test_help_has_groups_and_the_main_flags_first(monkeypatch, capsys):
    for name in ("imp", "one_shot"):
        code, out, _ = run(monkeypatch, capsys, "--help", name=name)
        found = re.findall(r"^(\w+):$|^  --(?:\[no\])?(\w+)", out, re.MULTILINE)
        titles = [title for title, _ in found if title]
        assert code == 0 and titles == [
            "experiment", "data", "network", "pruning", "training", "devices", "output"
        ]  # fmt: skip
        names = [flag for _, flag in found if flag]
        fields = set(fields_of(name)) - {"recipe", "scorer_options"}
        scorers = set(lth_tf.flags.scorer_flags()) if name == "one_shot" else set()
        assert len(names) == len(set(names)) and fields <= set(names) <= fields | scorers | {
            "preset", "compression", "workdir", "data_dir", "trunk", "plan", "score_only", "engine",
            "compact_training", "jobs", "threads", "live", "small_dense",
        }  # fmt: skip
        first = {title: flag for (title, _), (_, flag) in zip(found, found[1:], strict=False)}
        assert [first[t] for t in titles] == [
            "preset", "dataset", "model", "levels" if name == "imp" else "scorer",
            "train_steps", "distribute", "workdir",
        ]  # fmt: skip
        assert max(map(len, out.splitlines())) <= 100


@pytest.mark.slow
def test_bench_measures(monkeypatch, capsys):
    words = [
        "train", "--json", "--rounds=1", "--block=20", "--dataset=digits", "--model=lenet_20_10",
        "--validation_size=100",
    ]  # fmt: skip
    code, out, err = run(monkeypatch, capsys, *words, name="bench")
    assert code == 0, err
    result = json.loads(out)
    assert set(result["steps_per_second"]) == {"lth_tf", "fit", "fit_100", "tfmot_fit"}
    assert all(v > 0 for v in result["steps_per_second"].values())
    assert {"ratio_fit", "ratio_fit_100", "ratio_tfmot_fit"} <= result.keys()
