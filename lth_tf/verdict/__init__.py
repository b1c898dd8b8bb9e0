"""Verdicts: whether tickets win, how sure that is, and how many replicates would settle it."""

from lth_tf.verdict.claims import Claim, holm, settle
from lth_tf.verdict.paired import Evidence, above, no_later
from lth_tf.verdict.planning import replicates_for

__all__ = ["Claim", "Evidence", "above", "holm", "no_later", "replicates_for", "settle"]
