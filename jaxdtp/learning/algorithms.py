"""The learning rules by name. Adding one is a function in feedback.py or targets.py and a line in this table."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdtp.learning.feedback import (
    FeedbackRule,
    along_path,
    descend,
    drl_loss,
    ldrl_loss,
    match_jacobian,
    reconstruction_loss,
    there_and_back,
)
from jaxdtp.learning.inverse import inverse_target, output_inverse_target
from jaxdtp.learning.targets import TargetRule, difference_target, first_order_target, plain_target


class Algorithm(NamedTuple):
    """What makes one rule different from another.

    Attributes:
        feedback_rule: what trains the feedback weights; None where they are never trained, or there are none.
        target_rule: how a target is fed back; None for backpropagation.
        paths: one of `PATHS`, where feedback leads from and to.
        forward_map: what feedback learning takes for F, the map that feedback is to invert.
        simultaneous: whether targets come from the feedback weights as they were before the batch, so that feedback and
            forward weights learn independently of each other.
        shared_update: whether feedback weights also take every update of the forward weights (Kolen & Pollack 1994).
    """

    feedback_rule: FeedbackRule | None
    target_rule: TargetRule | None
    paths: str = "consecutive"
    forward_map: Callable = along_path
    simultaneous: bool = False
    shared_update: bool = False


PATHS = ("consecutive", "direct", "direct_through_hidden")
"""Of `jaxdtp.learning.paths`."""

LDRL, DRL, RECONSTRUCTION = descend(ldrl_loss), descend(drl_loss), descend(reconstruction_loss)

ALGORITHMS = {
    "ldrl": Algorithm(LDRL, difference_target),
    "ldrl_parallel": Algorithm(LDRL, difference_target, simultaneous=True),
    "ldrl_fast": Algorithm(match_jacobian, first_order_target, shared_update=True),
    "dtp": Algorithm(RECONSTRUCTION, difference_target),
    "dtp_parallel": Algorithm(RECONSTRUCTION, difference_target, simultaneous=True),
    "tp": Algorithm(RECONSTRUCTION, plain_target),
    "dtpdrl": Algorithm(DRL, difference_target, forward_map=there_and_back, simultaneous=True),
    "ddtp_linear": Algorithm(DRL, difference_target, paths="direct", simultaneous=True),
    "ddtp_rhl": Algorithm(DRL, difference_target, paths="direct_through_hidden", simultaneous=True),
    "ddtp_control": Algorithm(RECONSTRUCTION, difference_target, paths="direct", simultaneous=True),
    "inverse": Algorithm(RECONSTRUCTION, inverse_target),
    "inverse_output": Algorithm(RECONSTRUCTION, output_inverse_target),
    "dtp_fixed": Algorithm(None, difference_target),
    "dfa": Algorithm(None, difference_target, paths="direct"),
    "fa": Algorithm(None, first_order_target),
    "bp": Algorithm(None, None),
}
