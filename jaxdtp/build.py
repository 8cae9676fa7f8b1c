"""From a configuration to the objects that training needs."""

import optax
from ml_collections import ConfigDict

from jaxdtp import schedules
from jaxdtp.algorithms import ALGORITHMS
from jaxdtp.blocks import FEEDBACK_ACTIVATIONS
from jaxdtp.config import ConfigError
from jaxdtp.data import Dataset
from jaxdtp.epoch import Preprocessing
from jaxdtp.feedback import FeedbackTraining
from jaxdtp.networks import NETWORKS, Network
from jaxdtp.step import Settings


def build_network(config: ConfigDict, input_shape: tuple[int, ...], num_classes: int) -> Network:
    """The network of a configuration.

    Args:
        config: as from `config.resolve`.
        input_shape: of one image, [height, width, channels].
        num_classes: outputs of the last block.

    Raises:
        ConfigError: the images are too small for the network.
    """
    name = config.network.name
    options = {
        "hidden": tuple(config.network.hidden),
        "feedback_activation": FEEDBACK_ACTIVATIONS[config.feedback.activation],
    }
    if name != "mlp":
        options |= {"channels": tuple(config.network.channels), "shared_maxima": config.feedback.shared_maxima}
    try:
        return NETWORKS[name](input_shape, num_classes, **options)
    except ValueError as error:
        raise ConfigError(f"config.network: {name} doesn't fit images of shape {input_shape}: {error}") from error


def build_settings(config: ConfigDict, steps_per_epoch: int) -> Settings:
    """Rule and optimizers of a configuration.

    Args:
        config: as from `config.resolve`.
        steps_per_epoch: training steps in one epoch, which learning rate schedules count in.
    """
    forward, feedback = config.forward, config.feedback
    algorithm = ALGORITHMS[config.algorithm]
    shares = feedback.batch_share or len(feedback.iterations) * (1,)
    per_block = zip(feedback.iterations, feedback.noise_scale, feedback.learning_rate, shares, strict=False)
    return Settings(
        algorithm=algorithm,
        beta=config.beta,
        forward_optimizer=optax.chain(
            optax.add_decayed_weights(forward.weight_decay),
            optax.sgd(schedules.learning_rate(forward, steps_per_epoch), momentum=forward.momentum),
        ),
        feedback=tuple(
            FeedbackTraining(
                iterations,
                scale,
                feedback.noise_samples,
                optax.sgd(rate, momentum=feedback.momentum),
                examples=max(1, round(share * config.batch_size)),
            )
            for iterations, scale, rate, share in per_block
        ),
        symmetric_init=feedback.init == "symmetric",
    )


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """Normalisation and augmentation of a configuration."""
    dataset = config.dataset
    return Preprocessing(tuple(dataset.mean), tuple(dataset.std), dataset.flip, dataset.crop_padding)


def steps_in_epoch(config: ConfigDict, dataset: Dataset) -> int:
    """Training steps in one epoch; a last batch that isn't full is left out.

    Raises:
        ConfigError: the training data hasn't got that many examples.
    """
    examples = len(dataset.train.labels)
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size: got {config.batch_size}; allowed: up to {examples}, the training examples of "
            f"{config.dataset.name}"
        )
    steps = examples // config.batch_size
    if config.steps_per_epoch > steps:
        raise ConfigError(
            f"config.steps_per_epoch: got {config.steps_per_epoch}; allowed: up to {steps}, the full batches of "
            f"{config.batch_size} in {examples} training examples, or 0 for all of them"
        )
    return config.steps_per_epoch or steps
