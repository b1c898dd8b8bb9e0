"""What a control changes and what it does not."""

import dataclasses

import numpy as np

from lth_tf import masks
from lth_tf.branches import BRANCHES
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import initial_weights

SPEC = Spec(dataset="digits", model="lenet_20_10", train_steps=40, rewind_step=10)


def ticket(spec=SPEC, level=2, seed=5):
    weights, kernels = initial_weights(spec, (8, 8, 1), 10, seed)
    rng = np.random.default_rng(0)
    mask = {n: (rng.random(weights[n].shape) < 0.4).astype(np.uint8) for n in kernels}
    origin = {"seed": seed, "input_shape": [8, 8, 1], "classes": 10, "arm": "ticket"}
    return Ticket(mask, masks.apply(mask, weights), level, spec.retrain_span[0], origin, spec)


def test_reinit_draws_other_weights_of_the_same_distribution():
    own, new = ticket(), BRANCHES["reinit"](ticket())
    for name, m in own.mask.items():
        assert np.array_equal(new.mask[name], m)
        a, b = own.weights[name][m == 1], new.weights[name][m == 1]
        assert (a != b).all() and 0.8 < a.std() / b.std() < 1.25
        assert not new.weights[name][m == 0].any()


def test_reinit_differs_between_levels_and_replicates():
    drawn = [BRANCHES["reinit"](ticket(level=level, seed=seed)) for level, seed in
             ((2, 5), (3, 5), (2, 6))]  # fmt: skip
    kernels = [d.weights["fc1/kernel"].tobytes() for d in drawn]
    assert len(set(kernels)) == 3


def test_reinit_has_no_past_to_rewind_to():
    assert ticket().rewind_step == 10 and BRANCHES["reinit"](ticket()).rewind_step == 0
    tuned = dataclasses.replace(SPEC, rewind_step=0.0, retrain="lr_rewind", retrain_steps=15)
    assert BRANCHES["reinit"](ticket(tuned)).rewind_step == 25
