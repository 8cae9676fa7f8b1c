"""The learning rules by name. Adding one is a function in feedback.py or targets.py and a line in this table."""

from collections.abc import Callable
from typing import NamedTuple

from jaxdtp.learning.feedback import (
    FeedbackRule,
    along_path,
    descend,
    drl_loss,
    ldrl_loss,
    reconstruction_loss,
    there_and_back,
)
from jaxdtp.learning.inverse import inverse_target, output_inverse_target
from jaxdtp.learning.layers import LayerRule, copy_signs, match_layers, minimise_mismatch, mirror_layers
from jaxdtp.learning.targets import TargetRule, difference_target, plain_target


class Algorithm(NamedTuple):
    """What makes one rule different from another.

    Attributes:
        feedback_rule: what trains the feedback weights, of a block or, where paths are 'layers', of a layer; None where
            they are never trained, or there are none.
        target_rule: how a target is fed back from block to block; None where errors are, all the way.
        paths: one of `PATHS`, where feedback leads from and to.
        forward_map: what feedback learning takes for F, the map that feedback answers.
        simultaneous: whether targets come from the feedback weights as they were before the batch, so that feedback and
            forward weights learn independently of each other.
        shared_update: whether feedback weights also follow the forward weights' gradients, by a second optimizer with
            the same settings, so the same decay (Kolen & Pollack 1994).
    """

    feedback_rule: FeedbackRule | LayerRule | None
    target_rule: TargetRule | None
    paths: str = "consecutive"
    forward_map: Callable = along_path
    simultaneous: bool = False
    shared_update: bool = False


PATHS = ("consecutive", "direct", "direct_through_hidden", "layers", "none")
"""The first three are of `jaxdtp.learning.paths`. 'layers': errors go down through feedback weights beside those of
every layer (`jaxdtp.learning.derived`), which is what first-order difference targets

    t[n-1] = s[n-1] + J_G (t[n] - s[n]),    J_G: the Jacobian of block n with feedback weights, transposed

and local gradients come to, however the network is divided into blocks. 'none': through the forward weights."""

LDRL, DRL, RECONSTRUCTION = descend(ldrl_loss), descend(drl_loss), descend(reconstruction_loss)

ALGORITHMS = {
    "ldrl": Algorithm(LDRL, difference_target),
    "ldrl_parallel": Algorithm(LDRL, difference_target, simultaneous=True),
    "ldrl_fast": Algorithm(match_layers, None, paths="layers", shared_update=True),
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
    "ldrl_layers": Algorithm(match_layers, None, paths="layers"),
    "kp": Algorithm(None, None, paths="layers", shared_update=True),
    "weight_mirror": Algorithm(mirror_layers, None, paths="layers"),
    "jml": Algorithm(minimise_mismatch, None, paths="layers"),
    "sign_symmetry": Algorithm(copy_signs, None, paths="layers"),
    "fa": Algorithm(None, None, paths="layers"),
    "bp": Algorithm(None, None, paths="none"),
}
