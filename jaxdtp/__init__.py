"""jaxdtp: training neural networks without backpropagation, by difference target propagation.

The names that a notebook needs; everything else is imported from its module.
"""

__version__ = "0.1.0"

from jaxdtp.alignment import gradient_matching, jacobian_matching
from jaxdtp.config import ConfigError, default_config, resolve
from jaxdtp.epoch import Preprocessing, evaluate, train_steps
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.derived import with_feedback
from jaxdtp.learning.feedback import FeedbackTraining, Noise
from jaxdtp.learning.layers import init_feedback, match_feedback
from jaxdtp.learning.learner import Learner, learner
from jaxdtp.learning.paths import Path, consecutive, direct, direct_through_hidden
from jaxdtp.learning.state import Settings, TrainState, init_state
from jaxdtp.learning.step import classification_metrics, train_step
from jaxdtp.models.blocks import Block, Pass, Units, conv_block, dense_block
from jaxdtp.models.modules import OwnFeedback, network_of
from jaxdtp.models.networks import Network, lenet, logits, mlp, vgg
from jaxdtp.rounds import DivergedError
from jaxdtp.train import evaluate_best, train_and_evaluate
from jaxdtp.trained import Trained, export, load

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Block",
    "ConfigError",
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
    "direct",
    "direct_through_hidden",
    "evaluate",
    "evaluate_best",
    "export",
    "gradient_matching",
    "init_feedback",
    "init_state",
    "jacobian_matching",
    "learner",
    "lenet",
    "load",
    "logits",
    "match_feedback",
    "mlp",
    "network_of",
    "resolve",
    "train_and_evaluate",
    "train_step",
    "train_steps",
    "vgg",
    "with_feedback",
]
