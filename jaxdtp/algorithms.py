"""The learning rules by name. Adding one is a function in feedback.py or targets.py and a line in this table."""

from typing import NamedTuple

from jaxdtp.feedback import FeedbackLoss, ldrl_loss, reconstruction_loss
from jaxdtp.targets import TargetRule, difference_target, plain_target


class Algorithm(NamedTuple):
    """What makes one rule different from another.

    Attributes:
        feedback_loss: what trains the feedback weights; None where there is no feedback.
        target_rule: how a block's target becomes the target of the block below; None for backpropagation.
    """

    feedback_loss: FeedbackLoss | None
    target_rule: TargetRule | None


ALGORITHMS = {
    "ldrl": Algorithm(ldrl_loss, difference_target),
    "dtp": Algorithm(reconstruction_loss, difference_target),
    "tp": Algorithm(reconstruction_loss, plain_target),
    "bp": Algorithm(None, None),
}
