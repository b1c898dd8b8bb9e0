"""Verdicts: tests on pairs, conjunctions over a grid, numbers of replicates."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import rich.console
from scipy import stats

from lth_tf import analysis, experiments
from lth_tf.errors import UserError
from lth_tf.report.verdict import verdict_dict, verdict_sentences, verdict_table
from lth_tf.spec import Spec
from lth_tf.verdict import claims, judge, paired, planning
from lth_tf.verdict.claims import NO, OPEN, YES, Claim
from lth_tf.verdict.paired import Evidence, above, no_later
from tests.test_tools import run

EXPERIMENTS = 10_000 if os.environ.get("LTH_TF_SLOW_TESTS") else 2_000


# --- One claim ---


def test_a_mean_above_a_bound_is_students_test_on_pairs():
    d = np.array([0.3, -0.2, 0.5, 0.1, 0.4])
    found = above(d, -0.5)
    assert found.p_yes == pytest.approx(stats.ttest_1samp(d, -0.5, alternative="greater").pvalue)
    assert found.p_no == pytest.approx(stats.ttest_1samp(d, -0.5, alternative="less").pvalue)
    interval = stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.n == 5 and found.spread == pytest.approx(d.std(ddof=1))


def test_equal_differences_are_counted_as_signs_and_one_says_nothing():
    same = above([0.1] * 6, 0.0)
    assert (same.p_yes, same.p_no) == (0.5**6, 1.0) and "signs" in same.why
    assert above([0.0] * 6, 0.0).p_yes == above([0.0] * 6, 0.0).p_no == 1.0
    assert above([-0.1] * 3, 0.0).p_no == 0.125
    one = above([5.0], 0.0)
    assert (one.p_yes, one.p_no) == (1.0, 1.0) and one.why == "no interval from one"
    assert math.isnan(one.low) and above([], 0.0).n == 0


def test_steps_are_compared_as_log_ratios():
    mine, others = [900, 1000, 800, 950], [1000, 1000, 1000, 1000]
    found = no_later(mine, others)
    logs = np.log(np.array(mine) / 1000)
    assert found.p_yes == pytest.approx(
        stats.ttest_1samp(logs, math.log(1.1), alternative="less").pvalue
    )
    assert found.estimate == pytest.approx(logs.mean()) and found.low < found.estimate < found.high
    sooner = no_later(mine, others, ratio=1.0)
    assert sooner.p_yes > found.p_yes


def test_a_minimum_at_the_last_evaluation_is_no_number():
    # Mine is earlier than what is at least 1000: known. Mine at least 1000 against 1000: not known.
    found = no_later([500] * 5 + [1000], [1000] * 6, others_censored=[True] * 6,
                     mine_censored=[False] * 5 + [True])  # fmt: skip
    assert found.p_yes == pytest.approx(stats.binom.sf(4, 6, 0.5)) and found.p_no == 1.0
    assert "5 of 6 known to be no later, 0 to be later; 6 with" in found.why
    late = no_later([2000] * 4, [1000] * 4, mine_censored=[True] * 4)
    assert late.p_no == 0.5**4 and late.p_yes == 1.0
    assert math.isnan(late.estimate)
    assert not paired.reachable(4, 0.05) and paired.reachable(5, 0.05)


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("censored", [False, True])
def test_errors_are_as_rare_as_promised(n, censored):
    """At the bound, where the claim is just false and its opposite, too."""
    rng = np.random.default_rng(n)
    wrong = np.zeros(2)
    for _ in range(EXPERIMENTS):
        if censored:
            steps = np.exp(rng.normal(0, 0.5, (2, n)) + [[math.log(1.1)], [0.0]]) * 100
            last = 150.0
            hit = steps >= last
            found = no_later(*np.minimum(steps, last), *hit, 1.1)
        else:
            found = above(rng.normal(-0.5, 0.3, n), -0.5)
        wrong += [found.p_yes <= 0.05, found.p_no <= 0.05]
    assert (wrong / EXPERIMENTS <= 0.07).all()
    if not censored:
        assert (wrong / EXPERIMENTS >= 0.03).all()


# --- Claims over a grid ---


def evidence(p_yes, p_no=1.0):
    return Evidence(5, 0.0, 0.0, 0.0, 1.0, p_yes, p_no)


def test_holm_stops_at_the_first_that_is_too_large():
    p = [0.012, 0.9, 0.04, 0.001]
    assert [so for so, _ in claims.holm(p, 0.05)] == [True, False, False, True]
    assert claims.holm(p, 0.05)[3] == (True, 0.0125)
    assert claims.holm([], 0.05) == []


def test_a_conjunction_is_as_strong_as_its_weakest_part_and_falls_with_one():
    found = claims.settle([
        Claim(0.5, {"matching": evidence(0.001), "special": evidence(0.02)}),
        Claim(0.2, {"matching": evidence(0.001), "special": evidence(0.3, 0.7)}),
        Claim(0.1, {"matching": evidence(0.9, 0.001), "special": evidence(0.001)}),
    ])  # fmt: skip
    assert [claim.answer for claim in found] == [OPEN, OPEN, NO]
    assert found[2].refuted == ("matching",) and found[0].level == pytest.approx(0.05 / 3)
    found = claims.settle([Claim(0.5, {"a": evidence(0.01)}), Claim(0.2, {"a": evidence(0.04)})])
    assert [claim.answer for claim in found] == [YES, YES]


def test_a_sequence_stops_at_the_first_failure():
    grid = [Claim(d, {"a": evidence(p)}) for d, p in ((0.1, 0.01), (0.8, 0.04), (0.3, 0.2))]
    assert [claim.density for claim in claims.down_to(grid)] == [0.8]


def test_the_whole_grid_errs_as_rarely_as_promised():
    """Four densities, at each of which one of three components is just false."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(EXPERIMENTS // 2):
        grid = [
            Claim(d, {str(k): above(rng.normal(1.0 if k else 0.0, 0.5, 6), 0.0) for k in range(3)})
            for d in (0.5, 0.2, 0.1, 0.05)
        ]
        wrong += any(claim.answer == YES for claim in claims.settle(grid))
    assert wrong / (EXPERIMENTS // 2) <= 0.07


# --- Planning ---


def test_power_of_one_test_is_that_of_the_noncentral_t():
    for n, expected in ((3, 0.32), (5, 0.58), (10, 0.90)):
        exact = stats.nct.sf(stats.t.ppf(0.95, n - 1), n - 1, math.sqrt(n))
        found = planning.power(n, {"a": 1.0}, {"a": 1.0}, 0.05)
        assert found == pytest.approx(exact, abs=0.01)
        assert exact == pytest.approx(expected, abs=0.01)


def test_so_many_replicates_have_the_power_promised():
    effects, spreads = {"matching": 0.5, "special": 0.8}, {"matching": 0.4, "special": 0.7}
    n = planning.needed(effects, spreads, 0.0125)
    rng = np.random.default_rng(1)
    shown = np.mean([
        all(above(rng.normal(effects[k], spreads[k], n), 0.0).p_yes <= 0.0125 for k in effects)
        for _ in range(EXPERIMENTS)
    ])  # fmt: skip
    assert 0.76 <= shown <= 0.90
    fewer = planning.power(n - 1, effects, spreads, 0.0125)
    assert fewer < planning.POWER <= planning.power(n, effects, spreads, 0.0125)
    assert planning.needed({"a": 0.0}, {"a": 1.0}, 0.05) is None


def test_the_upper_number_suffices_in_three_of_four_pilots():
    rng = np.random.default_rng(2)
    true = planning.needed({"a": 1.0}, {"a": 1.0}, 0.05)
    enough = []
    for _ in range(300):
        pilot = float(rng.normal(0, 1, 5).std(ddof=1))
        _, most = planning.replicates_for({"a": 1.0}, {"a": pilot}, 5, 0.05)
        enough.append(most is None or most >= true)
    assert np.mean(enough) >= 0.75


def test_equal_differences_need_as_many_as_signs_do():
    assert planning.needed({"a": 0.1}, {"a": 0.0}, 0.05) == 5
    assert planning.upper(1.0, 5) == pytest.approx(1.5576, abs=1e-3)


# --- Workdirs ---


SPEC = Spec(
    dataset="digits", model="lenet_9_7", train_steps=1000, levels=2, controls=("reinit",),
    control_levels=(1, 2), replicates=8, scope="global",
)  # fmt: skip


def workdir(folder, metric="accuracy", gain=0.0, steps=(500, 400), spread=0.002, without=(),
            others=()):  # fmt: skip
    """A workdir whose level 1 is better than its control by `gain`, and level 2 not matching."""
    rng, rows = np.random.default_rng(0), []
    for replicate in range(SPEC.replicates):
        for level, arm, value, step in (
            (0, "ticket", 0.90, steps[0]), (1, "ticket", 0.90, steps[1]),
            *((1, arm, 0.90 - gain, 450) for arm in ("reinit", *others)),
            (2, "ticket", 0.80, 900), (2, "reinit", 0.80, 900),
        ):  # fmt: skip
            if (level, replicate, arm) in without:
                continue
            value = value + rng.normal(0, spread)
            rows.append({
                "arm": arm, "replicate": replicate, "level": level, "density": 0.4 / max(1, level),
                "early_stop_step": int(step), "validation_loss_min": 0.1,
                f"test_{metric}_early": value, f"test_{metric}_end": value, "steps": 1000,
                "seconds": 1.0,
            })  # fmt: skip
    analysis.write_summary(folder, rows)
    return folder


def test_a_ticket_wins_where_all_of_it_is_shown(tmp_path):
    found = judge.judge(workdir(tmp_path, gain=0.05), SPEC)
    assert [claim.answer for claim in found.early] == [YES, NO]
    assert [claim.answer for claim in found.end] == [YES, NO]
    assert set(found.early[1].refuted) >= {"matching"} and found.down == pytest.approx([0.4])
    assert found.replicates == tuple(range(8)) and found.missing == [] and found.wanted == {}
    assert found.margin.value == 0.01 and "360" in found.margin.why


def test_what_is_no_part_of_winning_stands_beside(tmp_path):
    found = judge.judge(workdir(tmp_path, gain=0.05, others=("shuffle",)), SPEC)
    first, last = found.beside
    assert first["sooner"].p_yes == 0.5**8 and last["sooner"].p_no == 0.5**8  # all steps alike
    assert first["better than shuffle at the end"].p_yes < 0.001
    assert found.early[0].answer == YES and "shuffle" not in str(found.early[0].parts)


def test_a_ticket_that_is_no_better_than_its_control_is_not_shown_to_win(tmp_path):
    found = judge.judge(workdir(tmp_path, gain=0.0), SPEC)
    assert found.early[0].answer == NO and found.early[0].refuted == ("special",)
    found = judge.judge(workdir(tmp_path, gain=0.011, spread=0.01), SPEC)
    assert found.early[0].answer == OPEN
    about, most = found.wanted[found.early[0].density]
    assert 8 < about < most
    more, _ = judge.judge(tmp_path, SPEC, effect=0.05).wanted[found.early[0].density]
    assert more < about  # a larger effect is seen sooner


def test_less_is_better_where_the_task_says_so(tmp_path):
    found = judge.judge(workdir(tmp_path, "bits_per_character", gain=-0.05), SPEC, margin=0.01)
    assert found.early[0].answer == YES
    # 0.8 bits are less than 0.9: level 2 matches, but comes later and is not special.
    assert found.early[1].refuted == ("no later", "special")


def test_a_dense_network_whose_minimum_is_the_last_evaluation_is_counted(tmp_path):
    found = judge.judge(workdir(tmp_path, gain=0.05, steps=(1000, 400)), SPEC)
    part = found.early[0].parts["no later"]
    assert part.p_yes == 0.5**8 and "8 with a minimum at the last evaluation" in part.why
    late = judge.judge(workdir(tmp_path, gain=0.05, steps=(1000, 1000)), SPEC)
    assert late.early[0].parts["no later"].p_yes == 1.0


def test_what_is_missing_is_said(tmp_path):
    work = workdir(tmp_path, gain=0.05, without={(1, 3, "reinit"), (0, 7, "ticket")})
    found = judge.judge(work, SPEC)
    assert found.missing == ["replicate 3 lacks level 1 reinit", "replicate 7 lacks level 0 ticket"]
    assert found.early[0].parts["special"].n == 6


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"control": "shuffle"}, "has no control 'shuffle', only reinit: run lth-branch"),
        ({}, {"margin": 0.0}, "margin 0 is out of range"),
        ({"dataset": "mine"}, {}, "there is no margin for data set 'mine'; say with --margin"),
    ],
)
def test_what_cannot_be_judged_is_said(tmp_path, changes, options, said):
    work = workdir(tmp_path)
    with pytest.raises(UserError, match=said):
        judge.judge(work, dataclasses.replace(SPEC, **changes), **options)


def test_without_a_dense_network_there_is_no_verdict(tmp_path):
    work = workdir(tmp_path, without={(0, r, "ticket") for r in range(8)})
    with pytest.raises(UserError, match="has no dense network to compare with"):
        judge.judge(work, SPEC)


def test_tables_and_sentences_say_it(tmp_path):
    found = judge.judge(workdir(tmp_path, gain=0.05), SPEC)
    console = rich.console.Console(width=140, record=True)
    console.print(verdict_table(found, "accuracy", 10_000))
    text = console.export_text(styles=True)
    assert "winning at early stop" in text and "\x1b[1myes" in text and "refuted" in text
    console.print(verdict_table(found, "accuracy", 360))
    assert "\x1b[1myes" not in console.export_text(styles=True)  # too few test examples
    said = " ".join(verdict_sentences(found, 360))
    assert "at early stop, by density: 40.00%: yes; 20.00%: no" in said
    assert "of 360 examples" in said and "from 40.00% down to 40.00%" in said
    told = json.loads(json.dumps(verdict_dict(found), allow_nan=False))
    assert told["early"][0]["answer"] == "yes" and told["replicates"] == list(range(8))


def test_the_command_judges_and_writes_it_down(tmp_path, monkeypatch, capsys):
    work = workdir(tmp_path, gain=0.05)
    experiments.write_spec(work, SPEC)
    code, out, err = run(monkeypatch, capsys, f"--workdir={work}", name="verdict")
    said = "Winning at early stop, by density: 40.00%: yes"
    assert code == 0 and said in " ".join(out.split()), err
    assert json.loads((work / "verdict.json").read_text())["down_to"] == pytest.approx([0.4])
    code, out, err = run(monkeypatch, capsys, f"--workdir={work}", "--alpha=0.7", name="verdict")
    assert code != 0
