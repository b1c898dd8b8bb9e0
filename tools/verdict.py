"""lth-verdict: which tickets win, how sure that is, and how many replicates would settle it."""

from lth_tf import edge

with edge.importing():
    import json

    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf import experiments, storage
    from lth_tf.analysis.summary import read_summary
    from lth_tf.report.verdict import verdict_dict, verdict_sentences, verdict_table
    from lth_tf.tasks import metric_of
    from lth_tf.verdict import judge

WORKDIR = flags.DEFINE_list("workdir", None, "comma-separated: experiments.", required=True)
MARGIN = flags.DEFINE_float("margin", None, "By how much networks may differ and count as alike.")
RATIO = flags.DEFINE_float("ratio", judge.RATIO, "How many times later is no later.", 1.0)
CONTROL = flags.DEFINE_string("control", "reinit", "What tickets have to be better than.")
ALPHA = flags.DEFINE_float("alpha", 0.05, "One-sided, over all densities.", 1e-6, 0.5)


def main() -> None:
    """Judges each workdir, and writes verdict.json into it."""
    console = rich.console.Console()
    for given in WORKDIR.value:
        work = edge.folder(given)
        spec = experiments.read_spec(work)
        found = judge.judge(
            work, spec, margin=MARGIN.value, ratio=RATIO.value,
            control=CONTROL.value, alpha=ALPHA.value,
        )  # fmt: skip
        examples = judge.EXAMPLES.get(spec.dataset)
        metric = metric_of(read_summary(work)[0])
        console.print(verdict_table(found, metric, examples), highlight=False)
        for text in verdict_sentences(found, examples):
            console.print(text, highlight=False)
        with storage.explained(work):
            storage.write(work / "verdict.json", json.dumps(verdict_dict(found), indent=1) + "\n")


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
