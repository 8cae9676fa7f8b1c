"""What every entry of a table must do: a new rule, network, activation or optimizer is tested by being entered."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxdtp.configuration.config import default_config, resolve
from jaxdtp.configuration.optimizers import OPTIMIZERS, SCHEDULES
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step
from jaxdtp.models.blocks import ACTIVATIONS, FEEDBACK_ACTIVATIONS, INITIALIZERS, SQUASHES
from jaxdtp.models.networks import NETWORKS
from jaxdtp.models.own import MODULES
from jaxdtp.running.build import build_network, build_settings

SIZES = {
    "mlp": {"hidden": (7, 6)},
    "lenet": {"channels": (3,), "hidden": (6,)},
    "vgg": {"channels": (3, 4), "hidden": ()},
    "vit": {"options": {"width": 8, "depth": 1, "patch": 4}},
}
OF_BLOCKS = [rule for rule, algorithm in ALGORITHMS.items() if algorithm.target_rule]
LAYERED = [rule for rule in ALGORITHMS if rule not in OF_BLOCKS]


def settings_of(rule, network="mlp", **changes):
    config = default_config()
    config.algorithm, config.network.name, config.batch_size = rule, network, 6
    config.feedback.iterations, config.feedback.learning_rate = (2,), (1e-3,)
    sizes = SIZES.get(network, {"options": {"width": 4}} if network in MODULES else {})
    config.update_from_flattened_dict({f"network.{name}": value for name, value in sizes.items()} | changes)
    return resolve(config, changes)


def check_steps(config, shape=(8, 8, 1)):
    """Three steps are one program, and leave a state of the same form, finite and moved on."""
    network = build_network(config, shape, 10)
    settings = build_settings(config, network, steps_per_epoch=3)
    start = state = init_state(network, settings, jax.random.key(0))
    x, labels = jax.random.normal(jax.random.key(1), (6, *shape)), jnp.arange(6)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, key):
        return train_step(network, settings, state, x, labels, key)

    for key in jax.random.split(jax.random.key(2), 3):
        state, metrics = step(state, key)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    chex.assert_tree_all_finite((state.forward, state.feedback, state.model, metrics))
    assert {"loss", "top1"} <= set(metrics)
    assert int(state.step) == 3
    moved = [bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (state.forward, start.forward)), strict=True)]
    assert any(moved)
    rule = settings.algorithm
    if rule.feedback_rule is None and not rule.shared_update:
        chex.assert_trees_all_equal(state.feedback, start.feedback)


@pytest.mark.parametrize("rule", ALGORITHMS)
def test_rules(rule):
    check_steps(settings_of(rule))


@pytest.mark.slow
@pytest.mark.parametrize("rule", OF_BLOCKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_rules_with_targets_on_networks_of_blocks(rule, network):
    check_steps(settings_of(rule, network), (16, 16, 1))


@pytest.mark.slow
@pytest.mark.parametrize("rule", LAYERED)
@pytest.mark.parametrize("network", [*NETWORKS, *MODULES])
def test_rules_of_layers_on_all_networks(rule, network):
    check_steps(settings_of(rule, network), (16, 16, 1))


@pytest.mark.parametrize("key", ["network.activation", "feedback.activation", "feedback.squash", "network.init"])
def test_activations_and_initialisations(key):
    tables = {
        "network.activation": ACTIVATIONS,
        "feedback.activation": FEEDBACK_ACTIVATIONS,
        "feedback.squash": SQUASHES,
        "network.init": INITIALIZERS,
    }
    for value in tables[key]:
        check_steps(settings_of("dtp", **{key: value}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_and_schedules(optimizer):
    for schedule in SCHEDULES:
        changes = {"forward.optimizer": optimizer, "feedback.optimizer": optimizer, "forward.schedule": schedule}
        check_steps(settings_of("dtp", **changes))
