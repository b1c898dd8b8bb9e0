"""The command-line tools as a user meets them."""

import json
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from lth_tf.analysis import read_summary
from lth_tf.tools import imp

TINY = [
    "--dataset=digits", "--model=lenet_20_10", "--validation_size=100", "--train_steps=20",
    "--eval_every=10", "--batch_size=30", "--levels=2", "--compile=off",
]  # fmt: skip


def run(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of lth-imp, in this process."""
    monkeypatch.setattr(sys, "argv", ["lth-imp", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        with pytest.raises(SystemExit) as ended:
            imp.run()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


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
    assert code == 1
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_typo_lists_what_exists(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lth-imp", "--dataset=digitz"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        flags.FLAGS.unparse_flags()
        imp.run()
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "there are: digits, mnist, fashion_mnist, cifar10. Did you mean 'digits'?" in out + err


def test_the_other_tools_start_and_bench_measures():
    """In processes of their own, since each defines its flags; at the same time."""
    commands = {
        "export": ["--help"],
        "doctor": ["--help"],
        "bench": [
            "train", "--json", "--rounds=1", "--block=20", "--dataset=digits",
            "--model=lenet_20_10", "--validation_size=100",
        ],
    }  # fmt: skip
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"lth_tf.tools.{name}", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, words in commands.items()
    }  # fmt: skip
    outputs = {name: process.communicate() for name, process in processes.items()}
    assert "--level" in outputs["export"][0] and "--workdir" in outputs["export"][0]
    assert "--data_dir" in outputs["doctor"][0]
    assert processes["bench"].returncode == 0, outputs["bench"][1]
    result = json.loads(outputs["bench"][0])
    assert set(result["steps_per_second"]) == {"lth_tf", "fit", "fit_100", "tfmot_fit"}
    assert all(v > 0 for v in result["steps_per_second"].values())
    assert {"ratio_fit", "ratio_fit_100", "ratio_tfmot_fit"} <= result.keys()
