"""The state of training and what stays fixed in it."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdtp.devices.parallel import Parallel
from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import Algorithm
from jaxdtp.learning.feedback import FeedbackTraining
from jaxdtp.learning.paths import Paths
from jaxdtp.learning.targets import Loss, cross_entropy
from jaxdtp.models import networks
from jaxdtp.models.blocks import Number
from jaxdtp.models.networks import Network, NetworkParameters, NetworkState


class LayerTraining(NamedTuple):
    """How feedback weights are trained on each batch where they are beside those of every layer.

    Attributes:
        iterations: steps for each batch, each with fresh probes.
        share: of a batch, that a layer's probe is at most as long as.
        rate: of a step; 1 is exact line search for `layers.match_layers`, and an average's rate for `mirror_layers`.
    """

    iterations: int = 1
    share: float = 1.0
    rate: Number = 1.0


class Settings(NamedTuple):
    """Everything that stays fixed during a run.

    Attributes:
        algorithm: the learning rule.
        paths: of the feedback into blocks 2..N, as from `paths.consecutive(network)`; () where there are none.
        beta: size of the output target's step.
        forward_optimizer: of all forward parameters together.
        feedback: how the feedback weights of each path are trained; () where the rule never trains them.
        layers: the same, of a rule whose paths are 'layers'.
        symmetric_init: whether feedback weights start as the transposed forward weights.
        scale_by_influence: whether `inverse.scale_by_influence` is applied to the targets.
        loss: of outputs and labels.
        parallel: how a step is divided among devices; None: it isn't.
    """

    algorithm: Algorithm
    paths: Paths
    beta: Number
    forward_optimizer: optax.GradientTransformation
    feedback: tuple[FeedbackTraining, ...] = ()
    layers: LayerTraining = LayerTraining()
    symmetric_init: bool = False
    scale_by_influence: bool = False
    loss: Loss = cross_entropy
    parallel: Parallel | None = None


class TrainState(flax.struct.PyTreeNode):
    """All that changes during a run; together with the seed it is enough to continue bit for bit.

    Attributes:
        step: how many there have been.
        forward, feedback: parameters by block name. Where paths are 'layers', feedback has the tree of forward.
        model: what blocks keep without learning it, such as batch statistics, by block name.
        forward_optimizer, feedback_optimizer: their states; the latter by block name or, with shared updates, one.
    """

    step: jax.Array
    forward: NetworkParameters
    feedback: NetworkParameters
    model: NetworkState
    forward_optimizer: optax.OptState
    feedback_optimizer: Any


def init_state(network: Network, settings: Settings, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer states.

    Raises:
        ValueError: `settings.feedback` isn't one entry for each path that the rule trains.
    """
    algorithm = settings.algorithm
    # Both sides begin with the same key, of which each makes keys of its own.
    forward, model = networks.init(network, jax.random.clone(key))
    if algorithm.paths == "layers":
        keys = paths.feedback_keys(key, len(network))
        feedback = {
            block.name: paths.init_derived(
                block, forward[block.name], model[block.name], own_key, symmetric=settings.symmetric_init
            )
            for block, own_key in zip(network, keys, strict=True)
        }
        feedback_optimizer = settings.forward_optimizer.init(feedback) if algorithm.shared_update else {}
    else:
        feedback = paths.init(settings.paths, key, like=forward if settings.symmetric_init else None)
        trained = list(feedback) if algorithm.feedback_rule else []
        if len(settings.feedback) != len(trained):
            raise ValueError(
                f"settings.feedback: got {len(settings.feedback)} entries; allowed: {len(trained)}, one for each of "
                f"the blocks {', '.join(trained)}"
            )
        feedback_optimizer = {
            name: training.optimizer.init(feedback[name])
            for name, training in zip(trained, settings.feedback, strict=True)
        }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        forward=forward,
        feedback=feedback,
        model=model,
        forward_optimizer=settings.forward_optimizer.init(forward),
        feedback_optimizer=feedback_optimizer,
    )


def bind(network: Network, state: TrainState, key: jax.Array) -> Network:
    """The network in training on one batch, `key` the step's."""
    return networks.bind(network, state.model, jax.random.fold_in(key, len(network)))
