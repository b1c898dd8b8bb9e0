"""Training: the loop, what feeds it, its optimizers, and the states that it can go on from."""

from lth_tf.models import Weights, initial_weights, plain_model, policy
from lth_tf.training.optimizers import OPTIMIZERS, Table
from lth_tf.training.states import DivergedError, Interrupted, State, Trained
from lth_tf.training.trainer import Trainer

__all__ = [
    "OPTIMIZERS", "DivergedError", "Interrupted", "State", "Table", "Trained", "Trainer", "Weights",
    "initial_weights", "plain_model", "policy",
]  # fmt: skip
