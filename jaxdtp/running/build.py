"""From a configuration to the objects that training needs."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxdtp.configuration import optimizers
from jaxdtp.configuration.allowed import FOR_BLOCKS, LARGEST, LARGEST_INT32
from jaxdtp.configuration.config import seeds_of
from jaxdtp.data import Dataset
from jaxdtp.devices import hosts, parallel
from jaxdtp.devices.parallel import Parallel
from jaxdtp.learning import inverse, paths
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.feedback import FeedbackTraining
from jaxdtp.learning.paths import Paths
from jaxdtp.learning.state import LayerTraining, Settings, TrainState, init_state
from jaxdtp.learning.train_feedback import trained_blocks
from jaxdtp.models import own
from jaxdtp.models.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES, Units
from jaxdtp.models.modules import network_of
from jaxdtp.models.networks import NETWORKS, Network
from jaxdtp.running.balance import balance, feedback_seconds
from jaxdtp.running.epoch import Preprocessing
from jaxdtp.system.errors import ConfigError, one_line, shown


def build_network(config: ConfigDict, input_shape: tuple[int, ...], num_classes: int) -> Network:
    """The network of a configuration.

    Args:
        config: as from `config.resolve`.
        input_shape: of one image, [height, width, channels].
        num_classes: outputs of the last block.

    Raises:
        ConfigError: the images are too small for the network, or a model of the user's doesn't fit them.
    """
    if maker := own_model(config):
        return build_own_network(config, maker, input_shape, num_classes)
    name, options = config.network.name, {"hidden": tuple(config.network.hidden), "units": build_units(config)}
    if name != "mlp":
        options |= {"channels": tuple(config.network.channels), "shared_maxima": config.feedback.shared_maxima}
    try:
        return _published(NETWORKS[name], input_shape, num_classes, tuple(options.items()), _dtype())
    except ValueError as error:
        raise ConfigError(
            f"config.network.channels: got {shown(config.network.channels)}; allowed: fewer blocks, "
            f"a {name} doesn't fit images of shape {input_shape}: {error}"
        ) from error


# One network, and not as many as there are runs: what is compiled for its functions is found again.
@functools.lru_cache(maxsize=16)
def _published(maker: Any, input_shape: tuple[int, ...], num_classes: int, options: tuple, dtype: Any) -> Network:
    del dtype  # of the constants in it
    return maker(input_shape, num_classes, **dict(options))


@functools.lru_cache(maxsize=16)
def _of_modules(
    maker: Any, input_shape: tuple[int, ...], num_classes: int, options: tuple, seed: int, dtype: Any
) -> Network:
    model = own.make(maker, input_shape, num_classes, dict(options), seed)
    return network_of(model, jax.ShapeDtypeStruct((2, *input_shape), dtype))


def _dtype() -> Any:
    return jnp.zeros(()).dtype


def own_model(config: ConfigDict) -> Any | None:
    """What makes the model of a configuration, one that knows nothing of blocks; None for the networks that do.

    Raises:
        ConfigError: it can't be loaded.
    """
    if not config.network.module:
        return own.MODULES.get(config.network.name)
    try:
        return own.load(config.network.module)
    except ValueError as error:
        raise ConfigError(f"config.network.module: {one_line(str(error))}") from error


def build_own_network(config: ConfigDict, maker: Any, input_shape: tuple[int, ...], num_classes: int) -> Network:
    """As `build_network`, of a model that knows nothing of blocks."""
    source, options = config.network.module, config.network.options.to_dict()
    at = f"config.network.{'module' if source else 'name'}: {source or config.network.name}"
    # Other models have no random numbers of their own.
    seed = config.seed if own.takes(maker, "rngs") else 0
    try:
        network = _of_modules(maker, input_shape, num_classes, tuple(options.items()), seed, _dtype())
    except own.OptionsError as error:
        raise ConfigError(f"config.network.options: {one_line(str(error))}") from error
    except ValueError as error:
        raise ConfigError(f"{at}: {one_line(str(error))}") from error
    if network[-1].output_shape != (num_classes,):
        raise ConfigError(
            f"{at}: got outputs of shape [batch, {', '.join(map(str, network[-1].output_shape))}]; allowed: [batch, "
            f"{num_classes}], the classes of {config.dataset.name}"
        )
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.target_rule and len(network) < 2:
        others = ", ".join(name for name, rule in ALGORITHMS.items() if rule.target_rule is None)
        raise ConfigError(
            f"config.algorithm: got {config.algorithm!r}, which feeds targets from block to block, for a model of one "
            f"block; allowed: {others}; or a function that makes a list of modules"
        )
    for first, keys in FOR_BLOCKS.items():
        wanted = len(network) + 1 - first
        for key in keys if first == 1 or algorithm.target_rule else ():
            group, name = key.split(".")
            if len(config[group][name]) not in (1, wanted):
                raise ConfigError(
                    f"config.{key}: got {shown(config[group][name])}; allowed: one value, or {wanted}, for blocks "
                    f"{first} to {len(network)} of the model"
                )
    return network


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
        limits = {key: config.target[key] for key in ("iterations", "tolerance", "damping")}
        algorithm = algorithm._replace(target_rule=functools.partial(algorithm.target_rule, **limits))
    shares, rates = config.feedback.batch_share, config.feedback.learning_rate
    return Settings(
        algorithm=algorithm,
        paths=build_paths(config, network),
        beta=config.beta,
        forward_optimizer=build_forward_optimizer(config.forward, network, steps_per_epoch),
        feedback=build_feedback_training(config, len(network) - 1),
        layers=LayerTraining(config.feedback.iterations[0], shares[0], rates[0]),
        symmetric_init=config.feedback.init == "symmetric",
        scale_by_influence=config.target.scale_by_influence,
    )


def build_paths(config: ConfigDict, network: Network) -> Paths:
    """The feedback paths of a configuration's algorithm; none where errors go down through the layers."""
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.target_rule is None:
        return ()
    if algorithm.paths == "direct":
        return paths.direct(network, build_units(config))
    if algorithm.paths == "direct_through_hidden":
        # Its random numbers are none of those that the seed gives to training.
        key = jax.random.fold_in(jax.random.key(config.seed), config.feedback.hidden_features)
        hidden = paths.random_hidden_layer(key, paths.output_features(network), config.feedback.hidden_features)
        return paths.direct_through_hidden(network, hidden, build_units(config))
    return paths.consecutive(network)


def build_forward_optimizer(
    forward: ConfigDict, network: Network, steps_per_epoch: int
) -> optax.GradientTransformation:
    """One optimizer for all blocks, or one for each where their settings may differ."""

    def of_block(factor: float, epsilon: float) -> optax.GradientTransformation:
        rates = optimizers.schedule(forward, steps_per_epoch)
        return optimizers.optimizer(forward, lambda count: factor * rates(count), epsilon, forward.weight_decay)

    names = [block.name for block in network]
    values = (forward.rate_factors, forward.adam_epsilon)
    if all(len(of_blocks) == 1 for of_blocks in values):
        return of_block(*(value for (value,) in values))
    settings = zip(names, *(for_each(of_blocks, len(names)) for of_blocks in values), strict=True)
    by_block = {name: of_block(*setting) for name, *setting in settings}
    return optax.partition(by_block, dict(zip(names, names, strict=True)))


def build_feedback_training(config: ConfigDict, count: int) -> tuple[FeedbackTraining, ...]:
    """How the feedback weights of each of `count` paths are trained; () where there are none, or they never are."""
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.feedback_rule is None or algorithm.paths == "layers":
        return ()
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


def build_parallel(
    config: ConfigDict, network: Network, settings: Settings, state: TrainState, seeds: int = 1
) -> Parallel:
    """All devices of all hosts and, in several groups, who of them trains which feedback: balanced by seconds measured
    on the first host.

    Args:
        config, network, settings: of the run.
        state: on this host.
        seeds: how many are divided among devices, too, as far as they can be.

    Raises:
        ConfigError: the devices, or the blocks with feedback to train, can't be divided into so many groups.
    """
    groups, trained = config.parallel.layer_groups, len(trained_blocks(network, settings))
    if groups > max(1, trained):
        raise ConfigError(
            f"config.parallel.layer_groups: got {groups}; allowed: up to {max(1, trained)}, the blocks whose feedback "
            f"{config.algorithm} trains"
        )
    try:
        mesh = parallel.make_mesh(groups, seeds)
    except ValueError as error:
        raise ConfigError(f"config.parallel.layer_groups: {error}") from error
    if groups == 1:
        return Parallel(mesh)
    examples = -(-config.batch_size // mesh.shape["data"])
    owners = balance(feedback_seconds(network, settings, state, examples), groups)
    return Parallel(mesh, tuple(hosts.json_of_first(owners)))


def for_each(values: Sequence[float], count: int) -> tuple[float, ...]:
    """A configuration's values for each of `count` blocks: one value stands for all of them."""
    return tuple(values) * count if len(values) == 1 else tuple(values)


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """Normalisation and augmentation of a configuration."""
    dataset = config.dataset
    return Preprocessing(tuple(dataset.mean), tuple(dataset.std), dataset.flip, dataset.crop_padding)


def check_memory(config: ConfigDict, network: Network, limit: int) -> None:
    """Check from shapes alone that memory holds what a training step cannot do without: the training state, every
    block's activations on a batch, and one path's noise. Gradients and much else come on top.

    Args:
        config: as from `config.resolve`.
        network: its network.
        limit: of the memory, bytes.

    Raises:
        ConfigError: it doesn't fit.
    """

    def fresh(key: jax.Array) -> TrainState:
        # The settings may hold random feedback, which is no more than a shape in here.
        return init_state(network, build_settings(config, network, steps_per_epoch=1), key)

    state = jax.tree.leaves(jax.eval_shape(fresh, jax.random.key(0)))
    inputs = [jnp.zeros((), block.dtype).dtype.itemsize * math.prod(block.input_shape) for block in network]
    trained = build_feedback_training(config, len(network) - 1)
    noise = [
        size * (path.examples or config.batch_size) * path.noise_samples
        for size, path in zip(inputs[1:], trained, strict=False)
    ]
    needed = 0
    for key, value, size, purpose in (
        (
            "network",
            config.network.to_dict(),
            sum(leaf.size * leaf.dtype.itemsize for leaf in state) * len(seeds_of(config)),
            "parameters and optimizer states",
        ),
        ("batch_size", config.batch_size, config.batch_size * sum(inputs), "these and the activations of a batch"),
        ("feedback.noise_samples", config.feedback.noise_samples, max(noise, default=0), "these and noise for them"),
    ):
        needed += size
        if needed > limit:
            raise ConfigError(
                f"config.{key}: got {shown(value)}, which needs {needed / 1e9:.3g} GB for {purpose}; "
                f"allowed: what fits into {limit / 1e9:.3g} GB"
            )


def steps_in_epoch(config: ConfigDict, dataset: Dataset) -> int:
    """Training steps in one epoch; a last batch that isn't full is left out.

    Raises:
        ConfigError: the training data hasn't got that many examples, or the run has too many steps to be counted.
    """
    examples = len(dataset.train.rows)
    if not examples:
        raise ConfigError(
            f"config.dataset.validation_fraction: got {config.dataset.validation_fraction}; allowed: what leaves some "
            f"of the {len(dataset.validation.rows)} images for training"
        )
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size: got {config.batch_size}; allowed: up to {examples}, the training examples of "
            f"{config.dataset.name}"
        )
    full = examples // config.batch_size
    if config.steps_per_epoch > full:
        raise ConfigError(
            f"config.steps_per_epoch: got {config.steps_per_epoch}; allowed: up to {full}, the full batches of "
            f"{config.batch_size} in {examples} training examples, or 0 for all of them"
        )
    steps = config.steps_per_epoch or full
    passes = config.num_epochs
    if ALGORITHMS[config.algorithm].feedback_rule:
        passes = config.feedback.pretraining_epochs + config.num_epochs * (1 + config.feedback.extra_epochs)
    most = min(LARGEST, LARGEST_INT32 // steps)
    if passes > most:
        raise ConfigError(
            f"config.num_epochs: got {config.num_epochs}, in which training goes {passes} times through the data, with "
            f"{steps} steps each; allowed: what makes that up to {most} times"
        )
    return steps
