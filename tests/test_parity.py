"""Every rule against what the published implementation computed, in float64, to a relative error of 1e-6."""

import functools

import jax
import numpy as np
import optax
import pytest
from published import FILES, Vectors

from jaxdtp.alignment import angle_degrees, relative_distance
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.feedback import feedback_update
from jaxdtp.learning.paths import bind, consecutive
from jaxdtp.learning.step import backprop_gradients
from jaxdtp.learning.targets import local_gradients, output_target, propagate_targets
from jaxdtp.models import networks

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def vectors(request):
    return Vectors(request.param)


def assert_close(ours, published, scale=None):
    """|ours - published| <= 1e-6 |published|, array by array; `scale` stands for |published| where it cancels to 0."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(published), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float64
        assert np.linalg.norm(a - b) <= 1e-6 * (scale or np.linalg.norm(b))


def train_published_feedback(vectors):
    """Feedback parameters after the vectors' iterations; checks losses and first gradients on the way."""
    forward = vectors.network_parameters("forward_before")
    passes = networks.forward_passes(vectors.network, forward, vectors.images)
    rule = ALGORITHMS[vectors.rule].feedback_rule
    trained = {}
    for index, (block, clean) in enumerate(zip(vectors.network[1:], passes[1:], strict=True)):
        params = vectors.parameters("feedback_before", block)
        own_forward = functools.partial(block.forward, forward[block.name])
        _, first_gradient = rule(block, params, own_forward, clean, vectors.noise(block, 0))
        published_gradient = vectors.parameters("feedback_grad_first", block)
        assert_close(first_gradient["kernel"], published_gradient["kernel"])
        # The bias cancels from L-DRL: its gradient is zero up to rounding.
        scale = np.linalg.norm(published_gradient["kernel"]) if vectors.rule == "ldrl" else None
        assert_close(first_gradient["bias"], published_gradient["bias"], scale)

        optimizer = optax.sgd(float(vectors["hp/feedback_lr"][index]), momentum=float(vectors["hp/momentum"]))
        state, losses = optimizer.init(params), []
        for iteration in range(vectors["hp/feedback_iterations"][index]):
            noise = vectors.noise(block, iteration)
            params, state, value = feedback_update(rule, optimizer, block, params, state, own_forward, clean, noise)
            losses.append(value)
        assert_close(np.array(losses), vectors[f"feedback_losses/{block.name}"])
        trained[block.name] = params
    return forward, passes, trained


def test_forward_pass(vectors):
    passes = networks.forward_passes(vectors.network, vectors.network_parameters("forward_before"), vectors.images)
    for block, clean in zip(vectors.network, passes, strict=True):
        assert_close(clean.output, vectors.batch(f"activation/{block.name}"))


def test_feedback_losses_gradients_and_weights(vectors):
    _, _, trained = train_published_feedback(vectors)
    assert_close(trained, {name: vectors.network_parameters("feedback_after")[name] for name in trained})


def test_feedback_weights_angle_and_distance(vectors):
    forward, _, trained = train_published_feedback(vectors)
    for name, params in trained.items():
        kernels = params["kernel"].ravel(), forward[name]["kernel"].ravel()
        # The published code moves the cosine by 1e-8 to stay clear of arccos(1).
        np.testing.assert_allclose(angle_degrees(*kernels), vectors[f"angle_degrees/{name}"], atol=1e-5)
        np.testing.assert_allclose(relative_distance(*kernels), vectors[f"distance/{name}"], rtol=1e-6)


def test_targets_gradients_and_forward_step(vectors):
    forward, passes, feedback = train_published_feedback(vectors)
    target = output_target(passes[-1].output, vectors.labels, float(vectors["hp/beta"]))
    rule = ALGORITHMS[vectors.rule].target_rule
    ways = bind(consecutive(vectors.network), vectors.network, forward)
    targets, _ = propagate_targets(rule, ways, forward, feedback, passes, target)
    for block, target in zip(vectors.network, targets, strict=True):
        assert_close(target, vectors.batch(f"target/{block.name}"))

    losses = [np.sum((clean.output - t) ** 2) / 2 / len(t) for clean, t in zip(passes, targets, strict=True)]
    assert_close(np.array(losses), vectors["forward_layer_losses"])
    gradients = local_gradients(vectors.network, forward, passes, targets)
    assert_close(gradients, vectors.network_parameters("forward_grad"))

    optimizer = optax.chain(
        optax.add_decayed_weights(float(vectors["hp/weight_decay"])),
        optax.sgd(float(vectors["hp/forward_lr"]), momentum=float(vectors["hp/momentum"])),
    )
    updates, _ = optimizer.update(gradients, optimizer.init(forward), forward)
    assert_close(optax.apply_updates(forward, updates), vectors.network_parameters("forward_after"))


def test_backprop_gradients(vectors):
    forward = vectors.network_parameters("forward_before")
    gradients = backprop_gradients(vectors.network, forward, vectors.images, vectors.labels)
    assert_close(gradients, vectors.network_parameters("backprop_grad"))


def test_vectors_are_there():
    assert FILES
