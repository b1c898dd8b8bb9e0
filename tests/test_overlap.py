"""What tickets have in common, and tickets made of tickets."""

import dataclasses
import sys

import numpy as np
import pytest

from lth_tf import datasets, experiments, masks
from lth_tf.analysis.overlap import overlaps, units
from lth_tf.errors import UserError
from lth_tf.experiments import combine
from lth_tf.spec import Spec
from lth_tf.tickets import found_in, load_ticket
from tests.test_tools import run

DIGITS = datasets.load("digits")
SPEC = Spec(
    model="lenet_8_6", dataset="digits", validation_size=100, batch_size=20, train_steps=10,
    eval_every=10, distribute="none", compile="off", levels=2, prune_fraction=0.4, replicates=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap") / "imp"
    experiments.run(SPEC, folder, DIGITS)
    return folder


def of(work, replicate, level):
    return load_ticket(work / f"replicate_{replicate:02d}/level_{level:02d}/ticket.safetensors")


# --- Numbers ---


def test_what_masks_have_in_common():
    a = {"k": np.array([[1, 1, 0, 0], [1, 0, 0, 0]]), "l": np.array([[1], [0]])}
    b = {"k": np.array([[1, 0, 0, 1], [1, 1, 0, 0]]), "l": np.array([[0], [1]])}
    found = overlaps(a, b)
    one = found["k"]
    assert (one.size, one.first, one.second, one.both) == (8, 3, 4, 2)
    assert one.jaccard() == 2 / 5 and one.share == 2 / 3 and one.densities == 3 * 4 / 8
    assert one.jaccard(one.densities) == pytest.approx(1.5 / 5.5)
    assert (found[""].first, found[""].second, found[""].both) == (4, 5, 2)
    assert found[""].densities == pytest.approx(1.5 + 0.5)
    nothing = overlaps({"k": np.zeros((2, 2))}, {"k": np.zeros((2, 2))})[""]
    assert nothing.jaccard() == nothing.share == 0


@pytest.mark.parametrize("shape", [(30, 20), (3, 3, 8, 12), (1, 9), (40,)])
def test_chance_by_units_has_their_counts(shape):
    rng = np.random.default_rng(0)
    kept = rng.random(shape) < 0.05 + 0.6 * rng.random(shape[-1])
    p = units(kept)
    assert p.shape == shape and (0 <= p).all() and (p <= 1).all()
    assert p.sum() == pytest.approx(kept.sum(), rel=1e-4)
    if len(shape) > 1:
        whole, chance = (x.reshape(-1, *shape[-2:]).sum(0) for x in (kept, p))
        np.testing.assert_allclose(chance.sum(0), whole.sum(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(chance.sum(1), whole.sum(1), rtol=1e-3, atol=1e-3)


def test_units_that_keep_all_or_nothing_are_sure():
    kept = np.zeros((4, 5), bool)
    kept[0], kept[2, :2] = True, True
    p = units(kept)
    np.testing.assert_allclose(p[0], 1, atol=1e-3)
    np.testing.assert_allclose(p[[1, 3]], 0, atol=1e-9)


def test_masks_drawn_by_their_units_overlap_as_chance_by_units_says():
    rng = np.random.default_rng(1)
    share = np.outer(rng.random(60), rng.random(50))  # some units keep much, others nothing
    a, b = ({"k": (rng.random((60, 50)) < share).astype(np.uint8)} for _ in range(2))
    found = overlaps(a, b)[""]
    assert found.both == pytest.approx(found.units, rel=0.12)
    assert found.both > 1.3 * found.densities


def test_masks_of_other_networks_are_named():
    a = {"k": np.ones((2, 3)), "l": np.ones(2)}
    with pytest.raises(UserError, match="one of them alone has l$"):
        overlaps(a, {"k": np.ones((2, 3))})
    with pytest.raises(UserError, match=r"k is \[2, 3\] and \[3, 2\]"):
        overlaps(a, {"k": np.ones((3, 2)), "l": np.ones(2)})


# --- Tickets ---


def test_union_and_intersection_start_from_the_initial_weights(work):
    one, two = of(work, 0, 1), of(work, 0, 2)
    dense = of(work, 0, 0)
    other = dataclasses.replace(two, mask=masks.shuffle(two.mask, np.random.default_rng(0)))
    union, common = (combine.combined(how, [one, other]) for how in ("union", "intersect"))
    for name, m in one.mask.items():
        assert np.array_equal(union.mask[name], m | other.mask[name])
        assert np.array_equal(common.mask[name], m & other.mask[name])
        assert np.array_equal(union.weights[name], dense.weights[name] * union.mask[name])
    union.verify()
    assert union.origin["arm"] == "union" and union.origin["seed"] == one.origin["seed"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, other: [t], "takes two tickets or more, not 1"),
        (lambda t, other: [t, other], "the same initial weights; these have seeds 0 and 1"),
        (lambda t, other: [t, dataclasses.replace(t, rewind_step=5)], "one starts at step 5"),
        (
            lambda t, o: [t, dataclasses.replace(t, mask={n: 1 - m for n, m in t.mask.items()})],
            "have no weight in common",
        ),
    ],
)
def test_tickets_that_cannot_be_combined_are_said(work, change, said):
    with pytest.raises(UserError, match=said):
        combine.combined("intersect", change(of(work, 0, 2), of(work, 1, 2)))


def test_levels_that_are_not_nested_are_found(work):
    chain = [of(work, 0, level) for level in range(3)]
    assert combine.nested(chain) == []
    chain[2] = dataclasses.replace(
        chain[2], mask=masks.shuffle(chain[2].mask, np.random.default_rng(0))
    )
    assert combine.nested(chain) == [(1, 2)]


def test_a_path_is_a_file_or_a_workdir(work, tmp_path):
    file = work / "replicate_00" / "level_01" / "ticket.safetensors"
    assert found_in(file) == [file] and len(found_in(work)) == 6
    with pytest.raises(UserError, match="is a folder without tickets"):
        found_in(tmp_path)


# --- The command ---


def do(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["lth-ticket", *words])
    return run(monkeypatch, capsys, *words, name="ticket")


def test_the_command_shows_compares_verifies_and_combines(work, tmp_path, monkeypatch, capsys):
    one, two = (str(work / f"replicate_0{r}/level_02/ticket.safetensors") for r in range(2))
    code, out, err = do(monkeypatch, capsys, "show", one)
    assert code == 0 and "fc1/kernel" in out
    assert "replicate 0, ticket, seed 0" in " ".join(out.split())
    code, out, err = do(monkeypatch, capsys, "diff", one, two)
    assert code == 0 and "by units" in out and "times what masks" in " ".join(out.split())
    code, out, err = do(monkeypatch, capsys, "verify", str(work))
    assert code == 0 and out.count("each within the one before") == 2
    first = str(work / "replicate_00/level_01/ticket.safetensors")
    made = str(tmp_path / "union.safetensors")
    code, out, err = do(monkeypatch, capsys, "union", one, first, f"--output={made}")
    assert code == 0 and masks.kept(load_ticket(made).mask) == masks.kept(load_ticket(first).mask)
    for words, said in (
        (["union", one, first, f"--output={made}"], "is there already"),
        (["union", one, first], "needs --output"),
        (["diff", one], "diff takes 2 ticket(s) or more, not 1"),
        (["show"], "show takes 1 ticket(s) or more, not 0"),
        (["show", str(tmp_path / "no.safetensors")], "no file"),
    ):
        code, out, err = do(monkeypatch, capsys, *words)
        assert code == 1 and said in out + err, (words, out, err)
