"""Iterated approximate inverses: how fast they converge, when they must not, and what they converge to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdtp.alignment import backprop_targets, gauss_newton_targets, target_matching
from jaxdtp.learning.inverse import inverse_target, output_inverse_target, scale_by_influence
from jaxdtp.learning.paths import bind, consecutive
from jaxdtp.learning.targets import difference_target, output_target, propagate_targets
from jaxdtp.models import networks
from jaxdtp.models.blocks import Pass, Units, conv_block, dense_block

pytestmark = pytest.mark.usefixtures("_float64")

# G(y; W) = arctanh(y) W^-1, without biases, is the inverse of F(x; W) = tanh(x W).
INVERTIBLE = Units(activation=jnp.tanh, feedback_activation=jnp.arctanh)


def inverse_of(params):
    """Feedback parameters that invert the dense block's linear map."""
    inverse = jnp.linalg.inv(params["kernel"])
    return {"kernel": inverse.T, "bias": -params["bias"] @ inverse}


def linear_block_with_factor(factor):
    """F(x) = x W, G(y) = (1 + factor) y W^-1: both autoencoders minus the identity are `factor` times the identity."""
    block = dense_block("linear", (6,), 6, activation=False)
    forward = {"kernel": jax.random.normal(jax.random.key(0), (6, 6)) + 3 * jnp.eye(6)}
    feedback = {"kernel": (1 + factor) * jnp.linalg.inv(forward["kernel"]).T}
    own_forward = functools.partial(block.forward, forward)
    x = jax.random.normal(jax.random.key(1), (5, 6))
    return block, feedback, own_forward, Pass(x, *own_forward(x)[:2])


@pytest.mark.parametrize("factor", [-0.7, 0.0, 0.9])
@pytest.mark.parametrize("rule", [inverse_target, output_inverse_target])
def test_the_error_falls_by_the_known_factor_in_every_iteration(rule, factor):
    block, feedback, forward, clean = linear_block_with_factor(factor)
    target = clean.output + jax.random.normal(jax.random.key(2), clean.output.shape)
    reached, measured = rule(block, feedback, forward, clean, target, iterations=6, tolerance=0.0)
    error = jnp.linalg.norm(forward(reached)[0] - target, axis=1)
    # The second one starts where the first one is after one step: at the difference target.
    steps = 6 if rule is inverse_target else 7
    expected = abs(factor) ** steps * jnp.linalg.norm(clean.output - target, axis=1)
    np.testing.assert_allclose(error, expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(measured["target_contraction"], abs(factor), atol=1e-6 if factor else 1e-2)
    np.testing.assert_allclose(
        measured["target_residual"], jnp.sum(error) / jnp.sum(jnp.linalg.norm(clean.output - target, axis=1)), atol=1e-9
    )
    assert measured["target_diverged"] == 0


@pytest.mark.parametrize("factor", [1.01, -1.2])
@pytest.mark.parametrize("rule", [inverse_target, output_inverse_target])
def test_divergence_is_seen_counted_and_stopped(rule, factor):
    """All examples but one, whose target is where it is already, have left after their first step."""
    block, feedback, forward, clean = linear_block_with_factor(factor)
    direction = jax.random.normal(jax.random.key(2), clean.output.shape).at[0].set(0.0)
    target = clean.output + direction
    few, _ = rule(block, feedback, forward, clean, target, iterations=1)
    many, measured = rule(block, feedback, forward, clean, target, iterations=1000)
    np.testing.assert_array_equal(many, few)
    assert measured["target_diverged"] == 0.8
    np.testing.assert_allclose(measured["target_contraction"], abs(factor), rtol=1e-6)


def test_examples_stop_on_their_own_when_they_are_done():
    block, feedback, forward, clean = linear_block_with_factor(0.5)
    target = clean.output + jnp.arange(5.0)[:, None]
    reached, measured = inverse_target(block, feedback, forward, clean, target, iterations=1000, tolerance=1e-2)
    # 0.5^7 is the first power below 1e-2.
    error = jnp.linalg.norm(forward(reached)[0] - target, axis=1)
    np.testing.assert_allclose(error, 0.5**7 * jnp.linalg.norm(clean.output - target, axis=1), atol=1e-12)
    assert measured["target_diverged"] == 0


@pytest.mark.parametrize(
    "block",
    [
        dense_block("dense", (2, 3), 4),
        conv_block("lenet", (5, 5, 2), 3, kernel_size=5, window=3, stride=2, padding=1),
        dense_block("squashed", (5,), 4, units=Units(activation=jnp.tanh, squash=jnp.tanh)),
    ],
    ids=lambda block: block.name,
)
def test_one_iteration_is_the_difference_target(block):
    forward, feedback, _ = block.init(jax.random.key(0))
    own_forward = functools.partial(block.forward, forward)
    x = jax.random.normal(jax.random.key(1), (3, *block.input_shape))
    clean = Pass(x, *own_forward(x)[:2])
    target = clean.output + jax.random.normal(jax.random.key(2), clean.output.shape)
    once, _ = inverse_target(block, feedback, own_forward, clean, target, iterations=1)
    difference, _ = difference_target(block, feedback, own_forward, clean, target)
    np.testing.assert_allclose(once, difference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [-0.7, 0.0, 0.9])
@pytest.mark.parametrize("damping", [0.1, 3.0])
@pytest.mark.parametrize("rule", [inverse_target, output_inverse_target])
def test_damping_shrinks_the_change_as_a_regularised_inverse_does(rule, damping, factor):
    """With G F = (1 + factor) I the fixed points are F^-1 (t - s) (1 + factor) / (1 + factor + damping), both."""
    block, feedback, forward, clean = linear_block_with_factor(factor)
    target = clean.output + jax.random.normal(jax.random.key(2), clean.output.shape)
    reached, measured = rule(block, feedback, forward, clean, target, iterations=500, tolerance=1e-14, damping=damping)
    exact = (target - clean.output) @ feedback["kernel"].T / (1 + factor)
    share = (1 + factor) / (1 + factor + damping)
    np.testing.assert_allclose(reached - clean.input, share * exact, atol=1e-9)
    np.testing.assert_allclose(measured["target_residual"], 1 - share, atol=1e-9)
    np.testing.assert_allclose(measured["target_contraction"], abs(factor) / (1 + damping), atol=1e-2)


@pytest.mark.parametrize("change", [1.0, 1e-3, 1e-4])
@pytest.mark.parametrize("rule", [inverse_target, output_inverse_target])
def test_rounding_errors_are_no_divergence(rule, change):
    """In float32, steps that shrink by half each time end at the rounding errors of signals that are much larger."""
    with jax.enable_x64(False):
        block, feedback, forward, clean = linear_block_with_factor(0.5)
        target = clean.output + change * jax.random.normal(jax.random.key(2), clean.output.shape)
        _, measured = rule(block, feedback, forward, clean, target, iterations=40)
        assert measured["target_diverged"] == 0
        np.testing.assert_allclose(measured["target_contraction"], 0.5, atol=0.1)


@pytest.mark.parametrize("rule", [inverse_target, output_inverse_target])
def test_nothing_is_asked_for_where_nothing_is_wrong(rule):
    """Whatever G has learned: with untrained feedback, too."""
    block = dense_block("dense", (5,), 4)
    params, feedback, _ = block.init(jax.random.key(0))
    forward = functools.partial(block.forward, params)
    clean = Pass(jnp.ones((3, 5)), *forward(jnp.ones((3, 5)))[:2])
    reached, measured = rule(block, feedback, forward, clean, clean.output)
    np.testing.assert_allclose(reached, clean.input, atol=1e-12)
    assert measured["target_residual"] == 0


def invertible_network():
    network = networks.mlp((4,), 4, hidden=(4, 4), units=INVERTIBLE)
    forward, _ = networks.init(network, jax.random.key(0))
    for index, params in enumerate(forward.values()):
        params["kernel"] = 0.5 * params["kernel"] + jnp.linalg.qr(jax.random.normal(jax.random.key(index), (4, 4)))[0]
    exact = {name: inverse_of(params) for name, params in list(forward.items())[1:]}
    x, labels = 0.3 * jax.random.normal(jax.random.key(5), (6, 4)), jnp.arange(6) % 4
    passes = networks.forward_passes(network, forward, x)
    return network, forward, exact, passes, labels


@pytest.mark.parametrize("rule", [difference_target, inverse_target, output_inverse_target])
def test_an_exact_inverse_gives_the_gauss_newton_targets(rule):
    network, forward, exact, passes, labels = invertible_network()
    target = output_target(passes[-1].output, labels, 1e-6)
    targets, _ = propagate_targets(rule, bind(consecutive(network), network, forward), forward, exact, passes, target)
    references = gauss_newton_targets(network, forward, passes, target, damping=0.0)
    for name, match in target_matching(network, passes, targets, references).items():
        assert match.distance < 1e-4, name


@pytest.mark.parametrize(("rule", "limit"), [(inverse_target, 1e-2), (output_inverse_target, 0.07)])
def test_iterations_repair_an_inexact_inverse(rule, limit):
    """The second one inverts F where G takes the output, which an inexact G does not take to the input."""
    network, forward, exact, passes, labels = invertible_network()
    inexact = jax.tree.map(lambda a: a * 1.15, exact)
    target = output_target(passes[-1].output, labels, 1e-4)
    references = gauss_newton_targets(network, forward, passes, target, damping=0.0)

    def distances(rule):
        targets, _ = propagate_targets(
            rule, bind(consecutive(network), network, forward), forward, inexact, passes, target
        )
        matches = target_matching(network, passes, targets, references)
        return [float(matches[block.name].distance) for block in network[:-1]]

    accurate = functools.partial(rule, iterations=60, tolerance=1e-9)
    assert max(distances(accurate)) < limit
    assert min(distances(difference_target)) > 0.1


def test_influence_turns_inverses_into_gradients_in_one_dimension():
    """Where every block has one unit, J^-1 times J^2 is J^T."""
    network = networks.mlp((1,), 1, hidden=(1, 1), units=INVERTIBLE)
    forward = {
        block.name: {"kernel": jnp.full((1, 1), value), "bias": jnp.zeros(1)}
        for block, value in zip(network, (0.5, 1.7, -0.4), strict=True)
    }
    exact = {name: inverse_of(params) for name, params in list(forward.items())[1:]}
    passes = networks.forward_passes(network, forward, jnp.full((3, 1), 0.6))
    target = passes[-1].output + 1e-6
    targets, _ = propagate_targets(
        inverse_target, bind(consecutive(network), network, forward), forward, exact, passes, target
    )
    scaled, influence = scale_by_influence(network, forward, passes, targets)
    references = backprop_targets(network, forward, passes, target)
    for match in target_matching(network, passes, scaled, references).values():
        assert match.distance < 1e-4
    np.testing.assert_allclose(influence["fc2"], 0.4**2, rtol=1e-4)


def test_influence_is_that_of_the_change_on_the_output():
    network = networks.lenet((8, 8, 1), 5, channels=(3,), hidden=(6,))
    forward, _ = networks.init(network, jax.random.key(0))
    passes = networks.forward_passes(network, forward, jax.random.normal(jax.random.key(1), (4, 8, 8, 1)))
    changes = [jax.random.normal(jax.random.key(2), clean.output.shape) for clean in passes]
    targets = [clean.output + change for clean, change in zip(passes, changes, strict=True)]
    scaled, influence = scale_by_influence(network, forward, passes, targets)
    np.testing.assert_array_equal(scaled[-1], targets[-1])
    for index, block in enumerate(network[:-1]):
        step = 1e-5
        moved = networks.logits(network[index + 1 :], forward, passes[index].output + step * changes[index])
        effect = (moved - passes[-1].output) / step
        expected = jnp.sum(effect**2) / jnp.sum(changes[index] ** 2)
        np.testing.assert_allclose(influence[block.name], expected, rtol=1e-3)
        np.testing.assert_allclose(
            scaled[index] - passes[index].output, influence[block.name] * changes[index], atol=1e-12
        )
