"""Progress on the terminal; rewind, density and summaries have tests of their own."""

import io

import rich.console

from lth_tf.callbacks import progress

ROW = {
    "density": 0.5, "early_stop_step": 7, "test_accuracy_early": 0.9, "test_accuracy_end": 0.91,
    "seconds": 1.25,
}  # fmt: skip


def shown(monkeypatch, terminal=False):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with progress.Progress(console, 1000) as bar:
        bar.begin("replicate 0 level 1 ticket", 100)
        for step in (200, 300, 400):
            bar.on_train_batch_end(step - 1, {"step": step})
        bar.finish("replicate 0 level 1 ticket", ROW)
        bar.skip(500)
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal(monkeypatch):
    text = shown(monkeypatch)
    assert "50 steps/s, evaluations included: less than a minute to go" in text
    assert "replicate 0 level 1 ticket: density 0.5000, early stop at 7 with 90.00%" in text
    assert "300 of 1,000 steps" in text


def test_a_bar_where_there_is_one(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert "replicate 0 level 1 ticket" in text and "density 0.5000" not in text
