"""The mathematics of the rules: what L-DRL minimises, when DTP equals backpropagation, what a step consists of."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdtp.alignment import updates_and_gradients
from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.feedback import FeedbackTraining, Noise, draw_noise, examples_of, ldrl_loss, train_feedback
from jaxdtp.learning.layers import draw_probes
from jaxdtp.learning.state import LayerTraining, Settings, init_state
from jaxdtp.learning.step import backprop_gradients, classification_metrics, error_gradients, train_step
from jaxdtp.learning.targets import (
    cross_entropy,
    difference_target,
    first_order_target,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.models import networks
from jaxdtp.models.blocks import Pass, conv_block, dense_block, example_of, feedback


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(key, leaf.shape) * 0.3 for key, leaf in zip(keys, leaves, strict=True)]
    )


LDRL = ALGORITHMS["ldrl"].feedback_rule


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_block(rule, training, block, params, forward, x, key):
    """Feedback parameters of a block after one batch x, and the mean loss."""
    own_forward = functools.partial(block.forward, forward)
    (clean,) = examples_of(training, [Pass(x, *own_forward(x)[:2])])
    state = training.optimizer.init(params)
    trained, _, loss = train_feedback(rule, training, block, params, state, own_forward, clean, key)
    return trained, loss


BLOCKS = {
    "linear": dense_block("fc", (5,), 4, activation=False),
    "dense": dense_block("fc", (2, 3), 4),
    "vgg": conv_block("conv", (4, 4, 2), 3),
    "lenet": conv_block("conv", (5, 5, 2), 3, kernel_size=5, window=3, stride=2, padding=1),
    "sum": conv_block("sum", (5, 5, 2), 3, kernel_size=5, window=3, stride=2, padding=1, shared_maxima="sum"),
}


def slow(name):
    """Too long to compile for every run of the tests."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["linear", "dense", "lenet", slow("vgg")])
@pytest.mark.usefixtures("_float64")
def test_expected_ldrl_gradient_is_that_of_the_jacobian_mismatch(name):
    """E[L-DRL] -> sigma^2 |J_G - J_F^T|^2 + const for small sigma.

    The expectation of a quadratic form in Gaussian noise is its mean over sqrt(n) times the n unit vectors; averaging
    over both signs removes the odd orders, so what is left is of relative order sigma^2, without chance.
    """
    block, sigma = BLOCKS[name], 1e-4
    forward, params = (random_like(tree, seed) for seed, tree in enumerate(block.init(jax.random.key(0))[:2]))
    x = jax.random.normal(jax.random.key(2), (1, *block.input_shape))
    y, switches, _ = block.forward(forward, x)
    n, m = x.size, y.size

    def unit_vectors(size, shape):
        basis = sigma * np.sqrt(size) * np.concatenate([np.eye(size), -np.eye(size)])
        return jnp.array(basis).reshape(-1, *shape)

    zeros = lambda count, shape: jnp.zeros((count, *shape))  # noqa: E731
    repeat = lambda count: jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), Pass(x, y, switches))  # noqa: E731

    @jax.jit
    def expected_loss(params):
        by_input = Noise(unit_vectors(n, block.input_shape), zeros(2 * n, block.output_shape))
        by_output = Noise(zeros(2 * m, block.input_shape), unit_vectors(m, block.output_shape))
        own_forward = functools.partial(block.forward, forward)
        return ldrl_loss(block, params, own_forward, repeat(2 * n), by_input) + ldrl_loss(
            block, params, own_forward, repeat(2 * m), by_output
        )

    @jax.jit
    def mismatch(params):
        jacobian_f = jax.jacobian(lambda x: block.forward(forward, x)[0])(x).reshape(m, n)
        jacobian_g = jax.jacobian(lambda y: feedback(block, params, y, switches))(y).reshape(n, m)
        return sigma**2 * jnp.sum((jacobian_g - jacobian_f.T) ** 2)

    ours, reference = jax.grad(expected_loss)(params), jax.grad(mismatch)(params)
    np.testing.assert_allclose(ours["kernel"], reference["kernel"], rtol=1e-4, atol=1e-4 * sigma**2)
    np.testing.assert_allclose(ours["bias"], 0, atol=1e-9 * sigma**2)
    difference = expected_loss(params) - expected_loss(forward_as_feedback(forward, params))
    np.testing.assert_allclose(difference, mismatch(params) - mismatch(forward_as_feedback(forward, params)), rtol=1e-4)


def forward_as_feedback(forward, params):
    return {"kernel": forward["kernel"], "bias": params["bias"]}


@given(
    hidden=st.lists(st.integers(1, 6), min_size=0, max_size=4),
    inputs=st.integers(1, 7),
    classes=st.integers(2, 12),
    beta=st.floats(1e-3, 0.5),
    seed=st.integers(0, 999),
)
@settings(max_examples=10)
def test_symmetric_feedback_gives_backprop_gradients(hidden, inputs, classes, beta, seed):
    """With transposed weights, and all units in ELU's linear part, where its slope is 1 both ways, the DTP update
    divided by beta is the BP gradient."""
    with jax.enable_x64(True):
        network = networks.mlp((inputs,), classes, hidden=tuple(hidden))
        forward, _ = networks.init(network, jax.random.key(seed))
        backward = paths.init(paths.consecutive(network), jax.random.key(seed))
        for block in network[:-1]:
            # Nothing negative from the input on, and large biases: every unit stays far above 0.
            forward[block.name]["bias"] = 10.0 * (1 + jnp.abs(forward[block.name]["bias"]))
            forward[block.name]["kernel"] = jnp.abs(forward[block.name]["kernel"])
        for name, params in backward.items():
            params["kernel"] = forward[name]["kernel"]
        x = jax.random.uniform(jax.random.key(seed + 1), (4, inputs))
        labels = jax.random.randint(jax.random.key(seed + 2), (4,), 0, classes)
        passes = jax.jit(networks.forward_passes, static_argnums=0)(network, forward, x)
        for clean in passes[:-1]:
            assert (clean.output > 5 * beta).all()
        pair = updates_and_gradients(network, difference_target, forward, backward, x, labels, beta)
        chex.assert_trees_all_close(*pair, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("_float64")
def test_small_difference_targets_are_feedback_jacobian_products(name):
    """(t[n-1] - s[n-1]) / b -> J_G (t[n] - s[n]) / b, whatever the feedback weights."""
    block = BLOCKS[name]
    forward, params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, *block.input_shape))
    own_forward = functools.partial(block.forward, forward)
    y, switches, _ = own_forward(x)
    direction = jax.random.normal(jax.random.key(2), y.shape)
    target, _ = difference_target(block, params, own_forward, Pass(x, y, switches), y + 1e-6 * direction)
    _, product = jax.jvp(lambda y: feedback(block, params, y, switches), (y,), (direction,))
    np.testing.assert_allclose((target - x) / 1e-6, product, rtol=1e-4, atol=1e-5)
    first_order, _ = first_order_target(block, params, own_forward, Pass(x, y, switches), y + direction)
    np.testing.assert_allclose(first_order - x, product, rtol=1e-10, atol=1e-10)


def test_feedback_learning_aligns_the_weights():
    """A few hundred L-DRL iterations turn random feedback weights towards the transposed forward weights."""
    block = dense_block("fc", (20,), 10)
    forward, params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (64, 20))
    training = FeedbackTraining(500, noise_scale=0.1, noise_samples=1, optimizer=optax.sgd(0.3, momentum=0.9))
    trained, _ = train_block(LDRL, training, block, params, forward, x, jax.random.key(2))
    cosine = lambda a, b: float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))  # noqa: E731
    assert abs(cosine(params["kernel"], forward["kernel"])) < 0.3
    assert cosine(trained["kernel"], forward["kernel"]) > 0.95


def test_noise_has_the_asked_spread_and_both_are_independent():
    """Of 4,000 numbers the standard deviation is off by 1.1 %, the correlation by 1.6 %: limits of seven times that."""
    clean = Pass(jnp.zeros((100, 40)), jnp.zeros((100, 40)), ())
    noise = draw_noise(jax.random.key(0), 0.3, clean)
    for values in noise:
        assert float(jnp.std(values)) == pytest.approx(0.3, rel=0.08)
    assert abs(float(jnp.corrcoef(noise.input.ravel(), noise.output.ravel())[0, 1])) < 0.11


def test_noise_samples_are_averaged():
    """The gradient with many noise samples has less variance: over 200 keys its spread falls by sqrt(16) = 4.

    The estimated ratio of two standard deviations from 200 draws each has a standard error of 7 %, so the bounds
    below are 7 standard errors away: failure probability below 1e-9.
    """
    block = dense_block("fc", (6,), 4)
    forward, params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6))

    def spread(samples):
        training = FeedbackTraining(1, 0.1, samples, optax.sgd(1.0))
        run = lambda key: train_block(LDRL, training, block, params, forward, x, key)[1]  # noqa: E731
        return float(jnp.std(jax.vmap(run)(jax.random.split(jax.random.key(3), 200))))

    assert 2.0 < spread(1) / spread(16) < 8.0


# The steps of the others are in test_parity_drl.py, or differ from these by a name in the table.
@pytest.mark.parametrize("name", ["ldrl", "ldrl_fast", "dtpdrl", "ddtp_rhl", "inverse", "bp"])
@pytest.mark.parametrize("kind", ["mlp", slow("lenet")])
def test_a_step_is_feedback_training_then_targets_then_one_forward_update(name, kind):
    algorithm, beta = ALGORITHMS[name], 0.3
    network = {
        "mlp": networks.mlp((8, 8, 1), 10, hidden=(9, 7)),
        "lenet": networks.lenet((8, 8, 1), 10, channels=(3,), hidden=(7,)),
    }[kind]
    hidden = paths.random_hidden_layer(jax.random.key(4), 10, 6)
    ways = {
        "consecutive": paths.consecutive(network),
        "direct": paths.direct(network),
        "direct_through_hidden": paths.direct_through_hidden(network, hidden),
    }.get(algorithm.paths, ())
    trainings = tuple(FeedbackTraining(k, 0.1, 1, optax.sgd(0.01, momentum=0.9)) for k in (2, 3))
    trainings = trainings if ways else ()
    layers = LayerTraining(2, 0.4, 0.7)
    config = Settings(algorithm, ways, beta, optax.sgd(0.1, momentum=0.9), trainings, layers)
    state = init_state(network, config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 8, 8, 1))
    labels = jnp.arange(5)
    key = jax.random.key(2)
    new, metrics = jax.jit(lambda state: train_step(network, config, state, x, labels, key))(state)

    @jax.jit
    def one_after_the_other(state):
        passes = networks.forward_passes(network, state.forward, x)
        bound = paths.bind(ways, network, state.forward)
        clean = paths.along_paths(ways, passes)
        backward, losses = dict(state.feedback), {}
        for index, (path, training) in enumerate(zip(bound, trainings, strict=False)):
            name = path.block.name
            backward[name], _, losses[name] = train_feedback(
                algorithm.feedback_rule,
                training,
                path.block,
                state.feedback[name],
                state.feedback_optimizer[name],
                algorithm.forward_map(bound, index, state.forward, state.feedback, clean),
                clean[index],
                jax.random.fold_in(key, index),
            )
        if algorithm.target_rule:
            target = output_target(passes[-1].output, labels, beta)
            feeding_back = state.feedback if algorithm.simultaneous else backward
            targets, _ = propagate_targets(algorithm.target_rule, bound, state.forward, feeding_back, passes, target)
            gradients = local_gradients(network, state.forward, passes, targets)
        elif algorithm.paths == "layers":
            for index, block in enumerate(network):
                name, f = block.name, lambda params, x, block=block: block.forward(params, x)[0]
                of_block = layers_of(f, state.forward[name], example_of(block, len(x)))
                for probe_key in jax.random.split(jax.random.fold_in(key, index), layers.iterations):
                    probes = draw_probes(of_block[0], probe_key, layers.share)
                    backward[name], (loss,) = algorithm.feedback_rule(
                        *of_block, state.forward[name], backward[name], probes, layers.rate
                    )
                    losses[name] = losses.get(name, 0.0) + loss / layers.iterations
            gradients, _, _ = error_gradients(network, config, state.forward, backward, x, labels)
        else:
            gradients = backprop_gradients(network, state.forward, x, labels)
        forward = jax.tree.map(lambda p, g: p - 0.1 * g, state.forward, gradients)
        if algorithm.shared_update:
            backward = jax.tree.map(lambda p, g: p - 0.1 * g, backward, gradients)
        return forward, backward, losses, jnp.mean(cross_entropy(passes[-1].output, labels))

    forward, backward, losses, loss = one_after_the_other(state)
    assert new.step == 1
    assert set(metrics["feedback_loss"]) == set(losses)
    chex.assert_trees_all_close((new.forward, new.feedback), (forward, backward), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close({name: metrics["feedback_loss"][name] for name in losses}, losses, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_classification_metrics():
    logits = jnp.array([[0.0, 1.0, 2.0], [3.0, 3.0, 1.0], [jnp.nan] * 3])
    labels = jnp.array([2, 0, 1])
    # Ties and NaN are not correct answers.
    assert float(classification_metrics(logits, labels)["top1"]) == pytest.approx(1 / 3)
    weights = jnp.array([1.0, 0.0, 0.0])
    assert float(classification_metrics(logits, labels, weights)["top1"]) == 1.0
    wide = -jnp.arange(12.0)[None].repeat(2, axis=0)
    metrics = classification_metrics(wide, jnp.array([4, 5]))
    assert float(metrics["top5"]) == 0.5
    assert float(metrics["top1"]) == 0.0


def flat_features(block):
    return int(np.prod(block.input_shape))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["consecutive", "direct", "direct_through_hidden"])
def test_expected_drl_gradient_asks_for_an_inverse(kind):
    """E[DRL] -> sigma^2 |J_G J_F - identity|^2 for small sigma, J_F that of all from the block's input to what is fed
    back. Unit vectors of both signs stand for the noise, as for L-DRL above."""
    network = networks.lenet((6, 6, 1), 3, channels=(2,), hidden=(5,))
    ways = {
        "consecutive": lambda: paths.consecutive(network),
        "direct": lambda: paths.direct(network),
        "direct_through_hidden": lambda: paths.direct_through_hidden(
            network, paths.random_hidden_layer(jax.random.key(4), 3, 7)
        ),
    }[kind]()
    name = {"consecutive": "dtpdrl", "direct": "ddtp_linear", "direct_through_hidden": "ddtp_rhl"}[kind]
    algorithm, sigma = ALGORITHMS[name], 1e-4
    forward, _ = networks.init(network, jax.random.key(0))
    backward = paths.init(ways, jax.random.key(0))
    ways = paths.bind(ways, network, forward)
    x = jax.random.normal(jax.random.key(1), (1, 6, 6, 1))
    for index, way in enumerate(ways):
        n = flat_features(way.block)
        of_one = paths.along_paths(ways, networks.forward_passes(network, forward, x))
        many = jax.tree.map(lambda a, count=2 * n: jnp.repeat(a, count, axis=0), of_one)
        basis = sigma * np.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)])
        noise = Noise(jnp.array(basis).reshape(-1, *way.block.input_shape), None)
        own_forward = algorithm.forward_map(ways, index, forward, backward, many)
        rule = jax.jit(algorithm.feedback_rule, static_argnums=(0, 2))
        loss, gradient = rule(way.block, backward[way.block.name], own_forward, many[index], noise)

        @jax.jit
        def mismatch(params, index=index, way=way, of_one=of_one, n=n):
            own_forward = algorithm.forward_map(ways, index, forward, backward, of_one)
            y, switches, _ = own_forward(of_one[index].input)
            jacobian_f = jax.jacobian(lambda x: own_forward(x)[0])(of_one[index].input).reshape(y.size, n)
            jacobian_g = jax.jacobian(lambda y: feedback(way.block, params, y, switches))(y).reshape(n, y.size)
            return sigma**2 * jnp.sum((jacobian_g @ jacobian_f - jnp.eye(n)) ** 2)

        value, reference = jax.value_and_grad(mismatch)(backward[way.block.name])
        np.testing.assert_allclose(loss, value, rtol=1e-4)
        scale = jnp.abs(reference["kernel"]).max()
        np.testing.assert_allclose(gradient["kernel"], reference["kernel"], atol=1e-3 * scale)


def test_feedback_that_is_never_trained_stays_as_it_is():
    network = networks.mlp((6,), 4, hidden=(7, 5))
    x, labels = jax.random.normal(jax.random.key(1), (8, 6)), jnp.arange(8) % 4
    for name in ("fa", "dfa", "dtp_fixed"):
        ways = {"fa": (), "dfa": paths.direct(network), "dtp_fixed": paths.consecutive(network)}[name]
        config = Settings(ALGORITHMS[name], ways, 0.5, optax.sgd(0.1))
        state = init_state(network, config, jax.random.key(0))
        new, _ = jax.jit(train_step, static_argnums=(0, 1))(network, config, state, x, labels, jax.random.key(1))
        chex.assert_trees_all_equal(new.feedback, state.feedback)
        assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new.forward, state.forward)), strict=True))
