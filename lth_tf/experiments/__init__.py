"""Experiments: recipes that go from level to level and resume, since a file that exists is done."""

from lth_tf.experiments.branches import BRANCHES, branch
from lth_tf.experiments.crew import Crew, jobs_of
from lth_tf.experiments.laboratory import Laboratory
from lth_tf.experiments.plans import Plan, plan
from lth_tf.experiments.running import imp, one_shot, opened, run
from lth_tf.experiments.workdirs import (
    finished,
    read_spec,
    require_own,
    take_threads,
    write_spec,
)

__all__ = [
    "BRANCHES", "Crew", "Laboratory", "Plan", "branch", "finished", "imp", "jobs_of", "one_shot",
    "opened", "plan", "read_spec", "require_own", "run", "take_threads", "write_spec",
]  # fmt: skip
