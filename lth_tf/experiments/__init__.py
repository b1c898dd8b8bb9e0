"""Experiments: recipes that go from level to level and resume, since a file that exists is done."""

from lth_tf.experiments.branches import BRANCHES, branch
from lth_tf.experiments.laboratory import Laboratory, opened
from lth_tf.experiments.plans import Plan, plan
from lth_tf.experiments.recipes import RECIPES, imp, one_shot
from lth_tf.experiments.workdirs import finished, read_spec, require_own

__all__ = [
    "BRANCHES", "RECIPES", "Laboratory", "Plan", "branch", "finished", "imp", "one_shot", "opened",
    "plan", "read_spec", "require_own",
]  # fmt: skip
