"""From a configuration to the objects that training needs."""

import functools
from collections.abc import Sequence

import jax
import optax
from ml_collections import ConfigDict

from jaxdtp import inverse, optimizers, paths
from jaxdtp.algorithms import ALGORITHMS
from jaxdtp.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES, Units
from jaxdtp.config import FOR_BLOCKS, ConfigError
from jaxdtp.data import Dataset
from jaxdtp.epoch import Preprocessing
from jaxdtp.feedback import FeedbackTraining
from jaxdtp.networks import NETWORKS, Network
from jaxdtp.paths import Paths
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
    options = {"hidden": tuple(config.network.hidden), "units": build_units(config)}
    if name != "mlp":
        options |= {"channels": tuple(config.network.channels), "shared_maxima": config.feedback.shared_maxima}
    try:
        return NETWORKS[name](input_shape, num_classes, **options)
    except ValueError as error:
        raise ConfigError(f"config.network: {name} doesn't fit images of shape {input_shape}: {error}") from error


def build_units(config: ConfigDict) -> Units:
    """Activations and initialisation of a configuration."""
    nonlinearity = ACTIVATIONS[config.network.activation]
    return Units(
        activation=nonlinearity.forward,
        feedback_activation=FEEDBACK_ACTIVATIONS[config.feedback.activation] or nonlinearity.matched,
        squash=SQUASHES[config.feedback.squash],
        initializer=INITIALIZERS[config.network.init],
    )


def build_settings(config: ConfigDict, network: Network, steps_per_epoch: int) -> Settings:
    """Rule and optimizers of a configuration.

    Args:
        config: as from `config.resolve`.
        network: its network.
        steps_per_epoch: training steps in one epoch, which learning rate schedules count in.
    """
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.target_rule in inverse.TARGET_RULES:
        limits = {"iterations": config.target.iterations, "tolerance": config.target.tolerance}
        algorithm = algorithm._replace(target_rule=functools.partial(algorithm.target_rule, **limits))
    return Settings(
        algorithm=algorithm,
        paths=build_paths(config, network),
        beta=config.beta,
        forward_optimizer=build_forward_optimizer(config.forward, network, steps_per_epoch),
        feedback=build_feedback_training(config, len(network) - 1) if algorithm.feedback_rule else (),
        symmetric_init=config.feedback.init == "symmetric",
        scale_by_influence=config.target.scale_by_influence,
    )


def build_paths(config: ConfigDict, network: Network) -> Paths:
    """The feedback paths of a configuration's algorithm; none for backpropagation."""
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.target_rule is None:
        return ()
    if algorithm.paths == "direct":
        return paths.direct(network, build_units(config))
    if algorithm.paths == "direct_through_hidden":
        # Its random numbers are none of those that the seed gives to training.
        key = jax.random.fold_in(jax.random.key(config.seed), config.feedback.hidden_features)
        hidden = paths.random_hidden_layer(key, *network[-1].output_shape, config.feedback.hidden_features)
        return paths.direct_through_hidden(network, hidden, build_units(config))
    return paths.consecutive(network)


def build_forward_optimizer(
    forward: ConfigDict, network: Network, steps_per_epoch: int
) -> optax.GradientTransformation:
    """One optimizer for all blocks, or one for each where their settings differ."""

    def of_block(factor: float, epsilon: float) -> optax.GradientTransformation:
        rates = optimizers.schedule(forward, steps_per_epoch)
        return optimizers.optimizer(forward, lambda count: factor * rates(count), epsilon, forward.weight_decay)

    names = [block.name for block in network]
    settings = list(zip(*(for_each(forward[key], len(names)) for key in ("rate_factors", "adam_epsilon")), strict=True))
    if len(set(settings)) == 1:
        return of_block(*settings[0])
    by_block = {name: of_block(*setting) for name, setting in zip(names, settings, strict=True)}
    return optax.partition(by_block, dict(zip(names, names, strict=True)))


def build_feedback_training(config: ConfigDict, count: int) -> tuple[FeedbackTraining, ...]:
    """How the feedback weights of each of `count` paths are trained."""
    feedback = config.feedback
    values = zip(*(for_each(feedback[key.removeprefix("feedback.")], count) for key in FOR_BLOCKS[2]), strict=True)
    return tuple(
        FeedbackTraining(
            iterations,
            noise_scale,
            noise_samples,
            optimizers.optimizer(feedback, rate, epsilon, weight_decay),
            examples=max(1, round(share * config.batch_size)),
        )
        for iterations, noise_scale, noise_samples, share, rate, epsilon, weight_decay in values
    )


def for_each(values: Sequence[float], count: int) -> tuple[float, ...]:
    """A configuration's values for each of `count` blocks: one value stands for all of them."""
    return tuple(values) * count if len(values) == 1 else tuple(values)


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
