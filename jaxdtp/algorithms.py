"""The learning rules by name. Adding one is a function in feedback.py or targets.py and a line in this table."""

from typing import NamedTuple

from jaxdtp.feedback import FeedbackRule, descend, ldrl_loss, match_jacobian, reconstruction_loss
from jaxdtp.targets import TargetRule, difference_target, first_order_target, plain_target


class Algorithm(NamedTuple):
    """What makes one rule different from another.

    Attributes:
        feedback_rule: what trains the feedback weights; None where there is no feedback.
        target_rule: how a block's target becomes the target of the block below; None for backpropagation.
        shared_update: whether feedback weights also take every update of the forward weights (Kolen & Pollack 1994).
    """

    feedback_rule: FeedbackRule | None
    target_rule: TargetRule | None
    shared_update: bool = False


ALGORITHMS = {
    "ldrl": Algorithm(descend(ldrl_loss), difference_target),
    "ldrl_fast": Algorithm(match_jacobian, first_order_target, shared_update=True),
    "dtp": Algorithm(descend(reconstruction_loss), difference_target),
    "tp": Algorithm(descend(reconstruction_loss), plain_target),
    "bp": Algorithm(None, None),
}
