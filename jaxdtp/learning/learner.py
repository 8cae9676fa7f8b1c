"""Learning by any rule in five lines: a model, an optimizer and the rule's name.

learner = jaxdtp.learner(model, optax.sgd(0.1), rule="ldrl_fast")
state = learner.init(key, x)
state, metrics = learner.step(state, x, labels, key)
outputs = learner.predict(state, x)
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import ALGORITHMS, Algorithm
from jaxdtp.learning.feedback import FeedbackTraining
from jaxdtp.learning.state import LayerTraining, Settings, TrainState, init_state
from jaxdtp.learning.step import Metrics, check_batch, train_step
from jaxdtp.learning.targets import Loss, cross_entropy
from jaxdtp.models import networks
from jaxdtp.models.modules import network_of
from jaxdtp.models.networks import Network


class Learner(NamedTuple):
    """Pure functions; the state is one pytree.

    Attributes:
        init: `init(key, x)` to a fresh `TrainState`, for inputs like x, [batch, ...].
        step: `step(state, x, labels, key)` to the state after one batch, and its metrics: 'loss' (of the state before),
            'top1' for classification, and more (`train_step`). Jitted.
        predict: `predict(state, x)` to the model's outputs in evaluation. Jitted.
        network: `network(x)` to the model's blocks.
    """

    init: Callable[[jax.Array, jax.Array], TrainState]
    step: Callable[[TrainState, jax.Array, Any, jax.Array], tuple[TrainState, Metrics]]
    predict: Callable[[TrainState, jax.Array], jax.Array]
    network: Callable[[jax.Array], Network]


def learner(
    model: Any,
    optimizer: optax.GradientTransformation,
    rule: str = "ldrl_fast",
    *,
    loss: Loss = cross_entropy,
    beta: float | None = None,
    iterations: int | tuple[int, ...] | None = None,
    batch_share: float | tuple[float, ...] = 1.0,
    noise_scale: float | tuple[float, ...] = 0.1,
    noise_samples: int | tuple[int, ...] = 1,
    feedback_rate: float | tuple[float, ...] | None = None,
    feedback_optimizer: optax.GradientTransformation | None = None,
    symmetric: bool = False,
) -> Learner:
    """A model that learns by one of the rules.

    Args:
        model: a Flax Linen or NNX module, a pair (init, apply), or a list of these: the blocks, each with a target of
            its own (`jaxdtp.models.modules.network_of`). Rules that feed targets from block to block want a list.
        optimizer: of the forward parameters.
        rule: a name in `ALGORITHMS`.
        loss: `loss(outputs, labels)`, of each example or averaged over the batch; the output's target is
            s - beta dL/ds.
        beta: size of the output target's step; 1 for rules whose feedback is beside the layers, else 0.7.
        iterations: of feedback training for each batch; 1 for rules whose feedback is beside the layers, else 10.
        batch_share: of a batch, that takes part in feedback training.
        noise_scale, noise_samples: of feedback training by noise, see `FeedbackTraining`.
        feedback_rate: learning rate of feedback weights, 0.01 by SGD with momentum 0.9; of rules whose feedback is
            beside the layers see `LayerTraining`, 1 (`weight_mirror`: 0.05).
        feedback_optimizer: of feedback weights, instead of SGD; not of rules whose feedback is beside the layers.
        symmetric: whether feedback weights start as the forward weights.

    Of rules with targets, values may be tuples, with one for each of the blocks 2..N.

    Raises:
        ValueError: the rule is unknown, or takes no tuples; a setting isn't allowed; when called, there isn't one value
            for each block, or the model isn't one that this rule can train.
    """
    if not isinstance(rule, str) or rule not in ALGORITHMS:
        raise ValueError(f"rule: got {rule!r}; allowed: {', '.join(ALGORITHMS)}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer: got a {type(optimizer).__name__}; allowed: an Optax transformation")
    algorithm = ALGORITHMS[rule]
    by_layer = algorithm.target_rule is None
    if by_layer and feedback_optimizer is not None:
        raise ValueError(f"feedback_optimizer: got one; allowed: None, {rule} has steps of its own")
    beta = (1.0 if by_layer else 0.7) if beta is None else beta
    count, rate = (1, 0.05 if rule == "weight_mirror" else 1.0) if by_layer else (10, 0.01)
    values: dict[str, Any] = {
        "iterations": count if iterations is None else iterations,
        "noise_scale": noise_scale,
        "noise_samples": noise_samples,
        "feedback_rate": rate if feedback_rate is None else feedback_rate,
        "batch_share": batch_share,
    }
    values = {name: _checked(name, value) for name, value in values.items()}
    _checked("beta", beta)
    layers = LayerTraining()
    if by_layer:
        _check_single(rule, values)
        layers = LayerTraining(values["iterations"], values["batch_share"], values["feedback_rate"])
    networks_by_input: dict = {}

    def network_for(x: jax.Array) -> Network:
        if not getattr(x, "shape", ()) or not hasattr(x, "dtype") or not x.shape[0]:
            found = f"an array of shape {x.shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"
            raise ValueError(f"x: got {found}; allowed: an array [batch, ...] of one example or more")
        like = (tuple(x.shape[1:]), jnp.result_type(x))
        if like not in networks_by_input:
            network = network_of(model, x)
            _check_rule(rule, algorithm, network)
            networks_by_input[like] = network
        return networks_by_input[like]

    def settings_for(network: Network, examples: int) -> Settings:
        settings = Settings(algorithm, (), beta, optimizer, symmetric_init=symmetric, loss=loss, layers=layers)
        if by_layer:
            return settings
        ways = _paths(algorithm, network)
        if algorithm.feedback_rule is None:
            return settings._replace(paths=ways)
        of_blocks = zip(*(_for_each(name, value, ways) for name, value in values.items()), strict=True)
        trainings = tuple(
            FeedbackTraining(
                count,
                scale,
                samples,
                feedback_optimizer or optax.sgd(rate, momentum=0.9),
                max(1, round(share * examples)),
            )
            for count, scale, samples, rate, share in of_blocks
        )
        return settings._replace(paths=ways, feedback=trainings)

    def init(key: jax.Array, x: jax.Array) -> TrainState:
        network = network_for(x)
        return init_state(network, settings_for(network, len(x)), key)

    @jax.jit
    def jitted(state: TrainState, x: jax.Array, labels: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        network = network_for(x)
        return train_step(network, settings_for(network, len(x)), state, x, labels, key)

    def step(state: TrainState, x: jax.Array, labels: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        check_batch(network_for(x), loss, x, labels)
        return jitted(state, x, labels, key)

    @jax.jit
    def predict(state: TrainState, x: jax.Array) -> jax.Array:
        return networks.logits(networks.bind(network_for(x), state.model), state.forward, x)

    return Learner(init, step, predict, network_for)


def _check_rule(rule: str, algorithm: Algorithm, network: Network) -> None:
    if algorithm.target_rule and len(network) < 2:
        others = ", ".join(name for name, other in ALGORITHMS.items() if other.target_rule is None)
        raise ValueError(
            f"rule: got {rule!r}, which feeds targets from block to block, for a model of one block; allowed: a list "
            f"of modules, or one of {others}"
        )


def _paths(algorithm: Algorithm, network: Network) -> paths.Paths:
    if algorithm.paths == "consecutive":
        return paths.consecutive(network)
    if algorithm.paths == "direct":
        return paths.direct(network)
    hidden = paths.random_hidden_layer(jax.random.key(0), paths.output_features(network), 1024)
    return paths.direct_through_hidden(network, hidden)


_WHOLE = ("whole numbers from 1", lambda value: value >= 1 and value == round(value))
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "iterations": _WHOLE,
    "noise_samples": _WHOLE,
    "batch_share": ("above 0, up to 1", lambda value: 0 < value <= 1),
    "noise_scale": ("finite numbers from 0", lambda value: value >= 0),
    "feedback_rate": ("finite numbers from 0", lambda value: value >= 0),
    "beta": ("finite numbers above 0", lambda value: value > 0),
}


def _checked(name: str, value: Any) -> Any:
    """A setting, or a tuple of what it is by block; whole numbers as such. Of what is traced nothing can be known."""
    if isinstance(value, tuple | list):
        return tuple(_checked(name, of_block) for of_block in value)
    if isinstance(value, jax.core.Tracer):
        return value
    words, fits = _ALLOWED[name]
    number = isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()
    if not (number and math.isfinite(value) and fits(value)):
        raise ValueError(f"{name}: got {value!r}; allowed: {words}")
    return int(value) if _ALLOWED[name] is _WHOLE else value


def _check_single(rule: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, tuple):
            raise ValueError(
                f"{name}: got {value}; allowed: one number, {rule} trains the feedback of all layers alike"
            )


def _for_each(name: str, value: Any, ways: paths.Paths) -> tuple:
    if isinstance(value, tuple) and len(value) != len(ways):
        names = ", ".join(path.block.name for path in ways)
        raise ValueError(f"{name}: got {value}; allowed: one number, or {len(ways)}, for the blocks {names}")
    return value if isinstance(value, tuple) else (value,) * len(ways)
