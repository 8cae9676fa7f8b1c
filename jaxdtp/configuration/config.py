"""The configuration: every key with its default, what an algorithm's own published run changes, and validation."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from jaxdtp.configuration.allowed import FOR_BLOCKS, FOR_LAYERS, GROUPS, RULES, plain
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.models.own import MODULES
from jaxdtp.system.errors import ConfigError, described, one_line, shown


def default_config() -> ConfigDict:
    """Every configuration key with its default. A config file starts from here and changes what is its own."""
    # Types are checked when it is resolved, where NumPy's numbers are numbers, too.
    config = ConfigDict(type_safe=False)
    config.seed = 0  # of everything random: initialisation, validation split, order, augmentation, noise
    config.seeds = ()  # several in one run: how many, from `seed` on, or a tuple of them
    config.num_epochs = 10  # passes through the training data
    config.batch_size = 128  # examples per step
    config.steps_per_epoch = 0  # 0: as many as the training data gives
    config.checkpoint_every_epochs = 1  # epochs between checkpoints
    config.algorithm = "ldrl"  # the rule, a name in `ALGORITHMS`
    config.beside = ()  # other algorithms that the command trains, too, unless it is told which one
    config.beta = 0.7  # step size of the output target
    # of metrics: `tensorboard`, `wandb`, `mlflow`, or `FILE.py:NAME` of a function of your own
    config.trackers = ("tensorboard",)
    config.float64 = False  # all numbers in double precision, which TPUs don't have
    # of convolutions and matrix products on GPU and TPU: `float32`, `tensorfloat32`, `bfloat16`
    config.matmul_precision = "float32"

    config.network = ConfigDict(type_safe=False)
    # `mlp`, `lenet`, `vgg`; Flax modules: `resnet20`, `resnet32`, `resnet56`, `resnet18`, `resnet34`, `vit`; of the
    # published code: `residual18`, `residual34`
    config.network.name = "mlp"
    config.network.module = ""  # instead of the name: `FILE.py:NAME` or `PACKAGE.MODULE:NAME` of a model of your own
    config.network.options = ConfigDict()  # fields of a Flax module, or arguments of a function that makes a model
    config.network.channels = ()  # of the convolutional blocks
    config.network.hidden = (256, 256)  # features of the dense blocks below the output
    config.network.activation = "elu"  # of all blocks but the last: `elu`, `tanh`
    config.network.init = "uniform"  # of all parameters: `uniform` (PyTorch's default), `xavier_normal`

    config.dataset = ConfigDict(type_safe=False)
    # `digits` (scikit-learn's), a builder of TFDS, `folder`, `npz`, or `FILE.py:NAME` of your own data
    config.dataset.name = "digits"
    config.dataset.data_dir = ""  # of TFDS, empty: its own default; of the pictures; the npz file
    config.dataset.train_split = ""  # in the syntax of TFDS, such as `train[:80%]`; empty: `train`
    config.dataset.validation_split = ""  # empty: a part of the training data
    config.dataset.test_split = ""  # empty: `test` or, where that has no labels, `validation`, or a part of `train`
    config.dataset.image_key = ""  # of the image among the features; empty: `image`, or the only one that fits
    config.dataset.label_key = ""  # of the label, likewise
    config.dataset.size = ()  # height and width to resize images to, or one number for both; empty: as they are
    config.dataset.cache_dir = ""  # of decoded images; empty: jaxdtp in XDG_CACHE_HOME or ~/.cache
    config.dataset.validation_fraction = 0.1  # of the training data; 0: none, and the last epoch is the best
    config.dataset.mean = (0.5,)  # by channel or of all, of pixels in [0, 1]; of floating point ones as they are
    config.dataset.std = (0.5,)  # as the mean
    config.dataset.flip = False  # mirror training images left-right at random
    config.dataset.crop_padding = 0  # pixels of edge padding for random crops

    config.dataset.device_megabytes = 2048.0  # (10^6 bytes) of a split on each device; a larger split is streamed

    config.parallel = ConfigDict(type_safe=False)
    config.parallel.layer_groups = 1  # groups of devices, each of which trains the feedback of blocks of its own
    config.parallel.seeds = "auto"  # how several seeds train: `together` in one program, or `in_turn`

    # Keys for blocks are tuples: with one value for all of the blocks, or with one for each.
    config.forward = ConfigDict(type_safe=False)
    config.forward.optimizer = "sgd"  # `sgd`, `adam`
    config.forward.learning_rate = 0.05  # of all blocks together
    config.forward.rate_factors = (1.0,)  # of the learning rate, for blocks 1 to N
    config.forward.momentum = 0.9  # of SGD
    config.forward.adam_betas = (0.9, 0.999)  # of Adam
    config.forward.adam_epsilon = (1e-8,)  # of Adam, for blocks 1 to N
    config.forward.weight_decay = 1e-4  # added to the gradient
    config.forward.warmup_steps = 0  # steps in which the learning rate grows from 0
    config.forward.schedule = "cosine"  # `cosine`, `step`, `constant`, by epoch
    config.forward.schedule_epochs = 85  # half a period of the cosine
    config.forward.final_learning_rate = 1e-5  # of the cosine
    config.forward.schedule_milestones = ()  # epochs after which `step` multiplies by the factor
    config.forward.schedule_factor = 0.1  # of `step`

    config.feedback = ConfigDict(type_safe=False)
    config.feedback.iterations = (10,)  # updates per batch, for blocks 2 to N
    config.feedback.noise_scale = (0.1,)  # sigma, for blocks 2 to N
    config.feedback.noise_samples = (1,)  # noise draws averaged in each update, for blocks 2 to N
    # of each batch that takes part in feedback learning, for blocks 2 to N; of layers: at most
    config.feedback.batch_share = (1.0,)
    config.feedback.optimizer = "sgd"  # `sgd`, `adam`
    config.feedback.learning_rate = (0.01,)  # for blocks 2 to N
    config.feedback.momentum = 0.9  # of SGD; its buffer lives across batches
    config.feedback.adam_betas = (0.9, 0.999)  # of Adam
    config.feedback.adam_epsilon = (1e-8,)  # of Adam, for blocks 2 to N
    config.feedback.weight_decay = (0.0,)  # added to the gradient, for blocks 2 to N
    config.feedback.pretraining_epochs = 0  # before the first epoch, of feedback training alone
    config.feedback.extra_epochs = 0  # after each epoch, of feedback training alone
    config.feedback.init = "random"  # `random`; `symmetric`: start at the transposed forward weights
    # of the feedback: `elu` (published for L-DRL), `tanh`, `linear`, or `matched`: its slope at y is the forward slope
    # there
    config.feedback.activation = "elu"
    config.feedback.squash = "none"  # activation of the feedback map's result: `none`, `tanh`
    # where pooling windows share a maximum, un-pool the `last` value (published) or their `sum`
    config.feedback.shared_maxima = "last"
    config.feedback.hidden_features = 1024  # of the random layer of `ddtp_rhl`

    config.target = ConfigDict(type_safe=False)
    config.target.iterations = 10  # of `inverse` and `inverse_output`, at most
    config.target.damping = 0.0  # of `inverse` and `inverse_output`; 0: as published
    config.target.tolerance = 1e-3  # they stop when steps are that much smaller than the first one
    config.target.scale_by_influence = False  # scale each block's change by its influence on the output

    config.alignment = ConfigDict(type_safe=False)
    config.alignment.every_epochs = 0  # how often Jacobian and gradient matching are measured; 0: never
    config.alignment.probes = 16  # random vectors for each example, for the Jacobians
    config.alignment.gauss_newton = False  # whether targets are compared with Gauss-Newton's too

    # config.when.ALGORITHM holds keys of the groups above, with values that this algorithm takes unless the command
    # line says otherwise. A config file that wants other values for these rules sets them there as well.
    config.when = ConfigDict(type_safe=False)
    # At beta = 1 the learning rate of rules whose feedback is beside the layers means what it means for BP.
    config.when.ldrl_fast = {"beta": 1.0, "feedback": {"iterations": (1,), "learning_rate": (1.0,)}}
    config.when.ldrl_layers = {"beta": 1.0, "feedback": {"iterations": (1,), "learning_rate": (1.0,)}}
    config.when.kp = {"beta": 1.0}
    config.when.weight_mirror = {"beta": 1.0, "feedback": {"iterations": (1,), "learning_rate": (0.05,)}}
    config.when.jml = {"beta": 1.0, "feedback": {"iterations": (1,), "learning_rate": (1.0,)}}
    config.when.sign_symmetry = {"beta": 1.0, "feedback": {"iterations": (1,), "learning_rate": (1.0,)}}
    return config


def resolve(config: ConfigDict, overrides: Collection[str] = ()) -> ConfigDict:
    """The configuration of one run: `config.when` applied for its algorithm and removed, and everything validated.

    Args:
        config: as a config file returns it, or as the command line changed it.
        overrides: dotted keys that the command line set; `config.when` leaves them alone.

    Raises:
        ConfigError: a key is unknown or missing, or its value is not allowed.
    """
    values = flatten(config)
    when = values.pop("when", {})
    for key in values:
        check_key(key)
    for key, rule in RULES.items():
        if key not in values:
            raise ConfigError(f"config.{key}: missing; allowed: {rule.allowed}")
    check_value("algorithm", values["algorithm"])
    for algorithm, changes in _items(when, "config.when").items():
        for key, value in _changes(algorithm, changes).items():
            if algorithm == values["algorithm"] and key not in overrides:
                values[key] = value
    for key, value in values.items():
        check_value(key, value)
        values[key] = RULES[key].convert(value)
    _check_blocks(values)
    return nest(values | _which_seeds(values, overrides))


def seeds_of(config: ConfigDict) -> tuple[int, ...]:
    """The seeds of a resolved configuration's run."""
    return config.seeds or (config.seed,)


def of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """The resolved configuration with one seed."""
    return nest(flatten(config) | {"seed": seed, "seeds": ()})


def _which_seeds(values: dict[str, Any], overrides: Collection[str]) -> dict[str, Any]:
    """The keys 'seed' and 'seeds' of checked values: all seeds that are meant, and the first of them."""
    first, seeds = values["seed"], values["seeds"]
    if isinstance(seeds, tuple) and seeds and seeds[0] != first and "seed" in overrides:
        raise ConfigError(
            f"config.seed: got {first}, while config.seeds is {shown(seeds)}; allowed: one of the two, or in "
            "config.seeds how many from config.seed on"
        )
    if isinstance(seeds, int):
        if first + seeds > 2**32:
            raise ConfigError(
                f"config.seeds: got {seeds} from config.seed={first} on; allowed: what ends below {2**32}"
            )
        seeds = tuple(range(first, first + seeds))
    return {"seed": seeds[0] if seeds else first, "seeds": seeds}


def nest(values: dict[str, Any]) -> ConfigDict:
    """The configuration of values by dotted key, as `flatten` gives them."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return ConfigDict(nested)


def flatten(config: ConfigDict | dict, at: str = "config") -> dict[str, Any]:
    """Values by dotted key; what is neither a key nor a group is left as it is.

    Args:
        config: nested.
        at: what to call it in errors.

    Raises:
        ConfigError: a group of keys is something else, or a value can't be read.
    """
    flat = {}
    for name, value in _items(config, at).items():
        if name in GROUPS:
            for inner, item in _items(value, f"{at}.{name}").items():
                flat[f"{name}.{inner}"] = plain(item.to_dict() if isinstance(item, ConfigDict) else item)
        else:
            flat[name] = plain(value)
    return flat


def check_key(key: str, at: str = "config") -> None:
    """Raise ConfigError, which names the keys of its group, where `key` is not a configuration key."""
    if key in RULES or key.startswith("network.options."):
        return
    group = key if key in GROUPS else key.rpartition(".")[0]
    keys = [known for known in RULES if known.rpartition(".")[0] == group] or RULES
    found = "a group of keys" if key in GROUPS else "unknown key"
    raise ConfigError(f"{at}.{one_line(key)}: {found}; allowed: {', '.join(keys)}")


def check_value(key: str, value: Any, at: str = "config") -> None:
    """Raise ConfigError, which says what is allowed, where `value` is not allowed for `key`."""
    if not RULES[key].check(value):
        raise ConfigError(f"{at}.{key}: got {shown(value)}; allowed: {RULES[key].allowed}")


def _items(group: Any, at: str) -> dict[str, Any]:
    """The values of a group of keys by name."""
    if not isinstance(group, ConfigDict | dict):
        raise ConfigError(f"{at}: got {shown(group)}; allowed: a group of keys")
    values = {}
    for name in group:
        try:
            values[str(name)] = group[name]
        except Exception as error:  # references may be without a value, and compute whatever they like
            raise ConfigError(
                f"{at}.{one_line(str(name))}: got {described(error)}; allowed: a value, or a reference to one"
            ) from error
    return values


def _changes(algorithm: str, changes: Any) -> dict[str, Any]:
    """What `config.when` holds for an algorithm, checked, by dotted key."""
    at = f"config.when.{one_line(algorithm)}"
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"{at}: unknown algorithm; allowed: {', '.join(ALGORITHMS)}")
    flat = flatten(changes, at)
    for key, value in flat.items():
        check_key(key, at)
        check_value(key, value, at)
    if "algorithm" in flat:
        raise ConfigError(f"{at}.algorithm: got {flat['algorithm']!r}; allowed: every other key")
    return flat


def _check_blocks(values: dict[str, Any]) -> None:
    """Check that the values that describe blocks fit each other."""
    algorithm, network, channels = ALGORITHMS[values["algorithm"]], values["network.name"], values["network.channels"]
    if values["feedback.init"] == "symmetric" and algorithm.paths.startswith("direct"):
        raise ConfigError(
            f"config.feedback.init: got 'symmetric'; allowed: random, the direct feedback of {values['algorithm']} "
            "has no forward weights to start from"
        )
    if algorithm.feedback_rule and algorithm.paths == "layers":
        for key in FOR_LAYERS:
            if len(values[key]) != 1:
                raise ConfigError(
                    f"config.{key}: got {shown(values[key])}, {len(values[key])} values; allowed: one value, for all "
                    f"layers, with {values['algorithm']}"
                )
    if values["network.module"] or network in MODULES:
        return  # its blocks are known when it is built
    if (network == "mlp") != (len(channels) == 0):
        allowed = "(), an mlp has no convolutions" if network == "mlp" else f"one block or more, in a {network}"
        raise ConfigError(f"config.network.channels: got {shown(channels)}; allowed: {allowed}")
    blocks = len(channels) + len(values["network.hidden"]) + 1
    for first, keys in FOR_BLOCKS.items():
        wanted = blocks + 1 - first
        for key in keys:
            # Where feedback isn't learned it doesn't matter how.
            learned = first == 1 or algorithm.feedback_rule
            if first == 2 and algorithm.paths == "layers":
                continue
            if learned and len(values[key]) not in (1, wanted):
                raise ConfigError(
                    f"config.{key}: got {shown(values[key])}, {len(values[key])} values; allowed: {wanted} values, for "
                    f"blocks {first} to {blocks} of the {blocks} blocks of {network}, or one for all of them"
                )
