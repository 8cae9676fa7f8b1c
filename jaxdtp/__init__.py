"""jaxdtp: training neural networks without backpropagation, by difference target propagation.

Public are the names below, and those of `jaxdtp.alignment` and `jaxdtp.testing`; everything else may move.
"""

__version__ = "0.1.0"

from jaxdtp.alignment import gradient_matching, jacobian_matching
from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.derived import with_feedback
from jaxdtp.learning.feedback import (
    FeedbackTraining,
    Noise,
    descend,
    drl_loss,
    ldrl_loss,
    reconstruction_loss,
)
from jaxdtp.learning.layers import init_feedback, match_feedback
from jaxdtp.learning.learner import Learner, learner
from jaxdtp.learning.paths import Path, consecutive, direct, direct_through_hidden
from jaxdtp.learning.state import Settings, TrainState, init_state
from jaxdtp.learning.step import classification_metrics, train_step
from jaxdtp.learning.targets import difference_target, first_order_target, plain_target
from jaxdtp.models.blocks import Block, Context, Pass, Units, conv_block, dense_block, feedback
from jaxdtp.models.modules import OwnFeedback, network_of
from jaxdtp.models.networks import Network, lenet, logits, mlp, vgg
from jaxdtp.running.epoch import Preprocessing, evaluate, train_steps
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import evaluate_best, train_and_evaluate
from jaxdtp.running.trained import Trained, export, load
from jaxdtp.system.errors import ConfigError

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Block",
    "ConfigError",
    "Context",
    "DivergedError",
    "FeedbackTraining",
    "Learner",
    "Network",
    "Noise",
    "OwnFeedback",
    "Pass",
    "Path",
    "Preprocessing",
    "Settings",
    "TrainState",
    "Trained",
    "Units",
    "classification_metrics",
    "consecutive",
    "conv_block",
    "default_config",
    "dense_block",
    "descend",
    "difference_target",
    "direct",
    "direct_through_hidden",
    "drl_loss",
    "evaluate",
    "evaluate_best",
    "export",
    "feedback",
    "first_order_target",
    "gradient_matching",
    "init_feedback",
    "init_state",
    "jacobian_matching",
    "ldrl_loss",
    "learner",
    "lenet",
    "load",
    "logits",
    "match_feedback",
    "mlp",
    "network_of",
    "plain_target",
    "reconstruction_loss",
    "resolve",
    "train_and_evaluate",
    "train_step",
    "train_steps",
    "vgg",
    "with_feedback",
]
