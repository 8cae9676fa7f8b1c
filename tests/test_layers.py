"""The mathematics of the rules with feedback weights beside every layer: what they minimise, and what they come to."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdtp
from jaxdtp.alignment import weight_alignment
from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.layers import (
    RARELY,
    REMOVED,
    copy_signs,
    draw_probes,
    match_feedback,
    match_layers,
    minimise_mismatch,
    mirror_layers,
    probe_shape,
    steps_to_match,
)
from jaxdtp.learning.state import LayerTraining, Settings, init_state
from jaxdtp.learning.step import error_gradients, train_step
from jaxdtp.learning.targets import (
    cross_entropy,
    first_order_target,
    local_gradients,
    output_target,
    propagate_targets,
)
from jaxdtp.models import blocks, networks
from jaxdtp.models.blocks import conv_block, dense_block, example_of

BLOCKS = {
    "linear": dense_block("fc", (5,), 4, activation=False),
    "dense": dense_block("fc", (2, 3), 4),
    "vgg": conv_block("conv", (4, 4, 2), 3),
    "lenet": conv_block("conv", (5, 5, 2), 3, kernel_size=5, window=3, stride=2, padding=1),
}
# Of few inputs, all of whose signs can be gone through.
FEW = {"dense": dense_block("fc", (2, 3), 4), "padded": conv_block("conv", (3, 3, 1), 2)}
NETWORKS = {
    "mlp": networks.mlp((8, 8, 1), 10, hidden=(7, 6)),
    "lenet": networks.lenet((8, 8, 1), 10, channels=(3, 4), hidden=(7,), shared_maxima="sum"),
}


def block_and_layer(block):
    """Its layer and the function to the layer's weight, parameters, and feedback parameters that are others."""
    params, _, _ = block.init(jax.random.key(0))
    others, _, _ = block.init(jax.random.key(1))
    layers, weights_of = layers_of(lambda params, x: block.forward(params, x)[0], params, example_of(block))
    assert len(layers) == 1
    return layers, weights_of, params, others


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("_float64")
def test_matching_follows_the_gradient_of_the_mismatch(name):
    """Of all unit vectors together, loss and direction are |J_W - J_O|^2, J the Jacobians of the layer's linear map,
    and its gradient; and the step is the one that goes to the lowest point in that direction."""
    block = BLOCKS[name]
    layers, weights_of, params, others = block_and_layer(block)
    (layer,) = layers
    shape = layer.signal.shape[1:]
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    new, (loss,) = match_layers(layers, weights_of, params, others, [units], 1.0)

    def jacobian(kernel):
        return jax.jacobian(lambda x: layer.product(x[None], kernel))(jnp.zeros(shape))

    def mismatch(kernel):
        return jnp.sum((jacobian(params["kernel"]) - jacobian(kernel)) ** 2)

    value, gradient = jax.value_and_grad(mismatch)(others["kernel"])
    outputs = jax.eval_shape(layer.product, units, params["kernel"]).size
    np.testing.assert_allclose(loss * outputs, value, rtol=1e-10)
    step = jnp.sum(gradient**2) / (2 * jnp.sum(jacobian(gradient) ** 2))
    np.testing.assert_allclose(new["kernel"], others["kernel"] - step * gradient, rtol=1e-10, atol=1e-12)
    slope = jax.grad(lambda step: mismatch(others["kernel"] - step * gradient))(step)
    np.testing.assert_allclose(slope / jnp.sum(gradient**2), 0, atol=1e-10)
    np.testing.assert_array_equal(new["bias"], others["bias"])
    # The rate is a share of it.
    half, _ = match_layers(layers, weights_of, params, others, [units], 0.5)
    np.testing.assert_allclose(half["kernel"], (new["kernel"] + others["kernel"]) / 2, rtol=1e-10, atol=1e-12)
    if name in ("linear", "dense"):
        np.testing.assert_allclose(value, jnp.sum((params["kernel"] - others["kernel"]) ** 2), rtol=1e-10)


@pytest.mark.parametrize("examples", [1, 8, 200])
@pytest.mark.parametrize("name", ["dense", "vgg", "lenet"])
def test_matching_finds_the_weights_without_a_learning_rate(name, examples):
    """Whether probes hold far fewer or far more equations than there are weights."""
    block = {
        "dense": lambda: dense_block("fc", (30,), 6),
        "vgg": lambda: conv_block("conv", (4, 4, 3), 5),
        "lenet": lambda: conv_block("conv", (6, 6, 2), 4, kernel_size=5, window=3, stride=2, padding=1),
    }[name]()
    layers, weights_of, params, others = block_and_layer(block)

    def step(index, carry):
        feedback, _ = carry
        shape = (examples, *layers[0].signal.shape[1:])
        probe = jax.random.rademacher(jax.random.fold_in(jax.random.key(2), index), shape, float)
        feedback, (loss,) = match_layers(layers, weights_of, params, feedback, [probe], 1.0)
        return feedback, loss

    run = jax.jit(lambda others: jax.lax.fori_loop(0, 20 + 1500 // examples, step, (others, 0.0)))
    trained, loss = run(others)
    error = lambda feedback: float(jnp.linalg.norm(feedback["kernel"] - params["kernel"]))  # noqa: E731
    assert np.isfinite(loss)
    assert error(trained) < 0.05 * error(others)
    np.testing.assert_array_equal(trained["bias"], others["bias"])


@pytest.mark.parametrize(
    ("block", "batch", "share", "length"),
    [
        # One equation for 30 unknowns, from each example.
        (dense_block("fc", (30,), 6), 100, 1.0, 60),
        (dense_block("fc", (30,), 6), 100, 0.25, 25),
        (dense_block("fc", (30,), 6), 2, 0.1, 1),
        # Of each of 16 positions one equation for 3 * 3 * 3 unknowns.
        (conv_block("conv", (4, 4, 3), 5), 100, 1.0, 4),
        (conv_block("conv", (4, 4, 3), 5), 100, 0.03, 3),
    ],
)
def test_a_probe_holds_two_equations_for_each_unknown_or_its_share(block, batch, share, length):
    params, _, _ = block.init(jax.random.key(0))
    (layer,), _ = layers_of(lambda params, x: block.forward(params, x)[0], params, example_of(block, batch))
    assert probe_shape(layer, share) == (length, *layer.signal.shape[1:])


def all_signs(shape):
    """Every vector of signs, [2^size, *shape]."""
    size = int(np.prod(shape))
    return jnp.array(list(itertools.product((-1.0, 1.0), repeat=size))).reshape(-1, *shape)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.usefixtures("_float64")
def test_the_weight_mirror_is_an_average_of_the_weights_in_expectation(name):
    """Over all vectors of signs, alone or as one probe: (1 - rate) O + rate W, at the edges of an image too."""
    layers, weights_of, params, others = block_and_layer(FEW[name])
    probe, rate = all_signs(layers[0].signal.shape[1:]), 0.3
    expected = (1 - rate) * others["kernel"] + rate * params["kernel"]

    def mirror(probe):
        return mirror_layers(layers, weights_of, params, others, [probe], rate)[0]

    together, alone = mirror(probe), jax.lax.map(mirror, probe[:, None])
    np.testing.assert_allclose(together["kernel"], expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(jnp.mean(alone["kernel"], axis=0), expected, rtol=1e-12, atol=1e-14)
    assert jnp.std(alone["kernel"], axis=0).min() > 1e-3
    np.testing.assert_array_equal(together["bias"], others["bias"])


@pytest.mark.usefixtures("_float64")
def test_the_weight_mirror_of_a_weight_whose_parts_are_layers():
    """Queries, keys and values of one kernel."""
    params, others = jax.random.normal(jax.random.key(0), (2, 5, 6))
    f = lambda kernel, x: [x @ part for part in jnp.split(kernel, 3, axis=1)]  # noqa: E731
    layers, weights_of = layers_of(f, params, jnp.ones((2, 5)))
    assert len(layers) == 3
    probes = [all_signs(layer.signal.shape[1:]) for layer in layers]
    new, _ = mirror_layers(layers, weights_of, params, others, probes, 0.3)
    np.testing.assert_allclose(new, 0.7 * others + 0.3 * params, rtol=1e-12)


@pytest.mark.parametrize("rule", [match_layers, mirror_layers, minimise_mismatch])
def test_feedback_weights_keep_their_type(rule):
    """Also with a rate that is an array, as in a run."""
    params, others = jax.random.normal(jax.random.key(0), (2, 5, 6), jnp.bfloat16)
    layers, weights_of = layers_of(lambda kernel, x: x @ kernel, params, jnp.ones((2, 5), jnp.bfloat16))
    probes = draw_probes(layers, jax.random.key(1), 1.0)
    new, _ = rule(layers, weights_of, params, others, probes, jnp.asarray(0.3))
    assert new.dtype == jnp.bfloat16


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("parts", [True, False], ids=["real parts", "complex"])
def test_complex_weights_are_matched(parts):
    """As spectral layers have them."""

    def f(params, x):
        kernel = params[0] + 1j * params[1] if parts else params[0]
        return jnp.fft.irfft(jnp.fft.rfft(x) @ kernel)

    params, feedback = jax.random.normal(jax.random.key(0), (2, 2, 5, 5))
    if not parts:
        params, feedback = ([a + 1j * b] for a, b in (params, feedback))
    first = jax.tree.map(jnp.subtract, params, feedback)
    x = jnp.ones((16, 8))
    for key in jax.random.split(jax.random.key(1), 60):
        feedback = match_feedback(f, params, feedback, x, key)
    last = jax.tree.map(jnp.subtract, params, feedback)
    assert optax.tree.norm(last) < 1e-6 * optax.tree.norm(first)

    layers, weights_of = layers_of(f, params, x)
    probes = draw_probes(layers, jax.random.key(2), 1.0)
    mirrored = [mirror_layers(layers, weights_of, params, params, probes, rate)[0] for rate in (0.0, 1.0)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), mirrored[0], params)
    cosine = optax.tree.vdot(mirrored[1], params).real / optax.tree.norm(mirrored[1]) / optax.tree.norm(params)
    assert cosine > 0.7


def test_a_layer_without_weights():
    params = {"none": jnp.zeros((5, 0)), "some": jnp.ones((5, 2))}
    f = lambda params, x: jnp.concatenate([x @ params["none"], x @ params["some"]], -1)  # noqa: E731
    new = match_feedback(f, params, jax.tree.map(jnp.zeros_like, params), jnp.ones((4, 5)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)


@pytest.mark.usefixtures("_float64")
def test_the_weight_mirror_of_a_weight_that_two_layers_share():
    params, others = jax.random.normal(jax.random.key(0), (2, 5, 3))
    layers, weights_of = layers_of(lambda kernel, x: jnp.tanh(x @ kernel) @ kernel.T, params, jnp.ones((2, 5)))
    assert len(layers) == 2
    probes = [all_signs(layer.signal.shape[1:]) for layer in layers]
    new, _ = mirror_layers(layers, weights_of, params, others, probes, 0.3)
    np.testing.assert_allclose(new, 0.7 * others + 0.3 * params, rtol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_signs_are_copied_and_sizes_are_kept(name):
    layers, weights_of, params, others = block_and_layer(BLOCKS[name])
    new, _ = copy_signs(layers, weights_of, params, others, [], 1.0)
    np.testing.assert_array_equal(jnp.sign(new["kernel"]), jnp.sign(params["kernel"]))
    np.testing.assert_array_equal(jnp.abs(new["kernel"]), jnp.abs(others["kernel"]))
    np.testing.assert_array_equal(new["bias"], others["bias"])


def train(name, network, optimizer, batches, **options):
    """States before and after each of the batches, by one of the rules."""
    config = Settings(ALGORITHMS[name], (), 1.0, optimizer, **options)
    step = jax.jit(lambda state, x, labels: train_step(network, config, state, x, labels, jax.random.key(3))[0])
    states = [init_state(network, config, jax.random.key(0))]
    for images, labels in batches:
        states.append(step(states[-1], images, labels))
    return states


def random_batches(count, shape=(8, 8, 1)):
    x, labels = jax.random.normal(jax.random.key(1), (count, 5, *shape)), jnp.arange(count * 5).reshape(count, 5) % 10
    return list(zip(x, labels, strict=True))


def kernels(params):
    return {name: of_block["kernel"] for name, of_block in params.items()}


@pytest.mark.parametrize("name", ["sign_symmetry", "weight_mirror", "jml", "ldrl_fast"])
def test_steps_train_the_feedback_weights_of_all_layers(name):
    """The first block's too, which send errors to nobody; biases have none."""
    optimizer = optax.sgd(0.0)
    before, after = train(name, NETWORKS["lenet"], optimizer, random_batches(1), layers=LayerTraining(2, 0.5, 0.5))
    for block, kernel in kernels(after.feedback).items():
        old, forward = kernels(before.feedback)[block], kernels(before.forward)[block]
        if name == "sign_symmetry":
            np.testing.assert_array_equal(kernel, jnp.copysign(old, forward))
        elif name == "jml":
            np.testing.assert_allclose(kernel, old / 4 + forward * 3 / 4, rtol=1e-4, atol=1e-7)
        else:
            assert jnp.any(kernel != old)
        np.testing.assert_array_equal(after.feedback[block]["bias"], before.feedback[block]["bias"])


@pytest.mark.parametrize(
    ("block", "examples", "share"),
    [
        (dense_block("wide", (300,), 20), 30, 1.0),
        (dense_block("narrow", (20,), 50), 64, 1.0),
        (conv_block("conv", (8, 8, 16), 32), 32, 1.0),
        (conv_block("few", (8, 8, 16), 32, kernel_size=5), 32, 0.1),
    ],
    ids=lambda value: value.name if isinstance(value, blocks.Block) else "",
)
@pytest.mark.usefixtures("_float64")
def test_a_mismatch_is_removed_in_as_many_steps_as_said_and_in_not_much_fewer(block, examples, share):
    """Its square falls by d / (d + n) in a step, on the average over units: of ten seeds none left more than 4e-11."""
    params, _, _ = block.init(jax.random.key(0))
    others, _, _ = block.init(jax.random.key(1))
    f = lambda params, x: block.forward(params, x)[0]  # noqa: E731
    layers, weights_of = layers_of(f, params, example_of(block, examples))

    @jax.jit
    def step(feedback, key):
        return match_layers(layers, weights_of, params, feedback, draw_probes(layers, key, share), 1.0)[0]

    steps, feedback = steps_to_match(layers, share), others
    squares = [float(jnp.sum((params["kernel"] - others["kernel"]) ** 2))]
    for key in jax.random.split(jax.random.key(0), steps):
        feedback = step(feedback, key)
        squares.append(float(jnp.sum((params["kernel"] - feedback["kernel"]) ** 2)))
    assert squares[-1] < REMOVED * squares[0]
    assert squares[steps // 2] > REMOVED * squares[0]


@pytest.mark.parametrize(
    "algorithm",
    [ALGORITHMS["ldrl_fast"], ALGORITHMS["ldrl_layers"], ALGORITHMS["sign_symmetry"]._replace(shared_update=True)],
    ids=["ldrl_fast", "ldrl_layers", "other rule"],
)
def test_with_shared_updates_probes_become_rare(algorithm):
    """Without them, never: there learning makes mismatches; nor does any other rule than matching."""
    network = NETWORKS["mlp"]
    settings = Settings(algorithm, (), 1.0, optax.sgd(0.0))
    state = init_state(network, settings, jax.random.key(0))
    (images, labels), *_ = random_batches(1)

    def after(step):
        state_there = state.replace(step=jnp.asarray(step, jnp.int32))
        learned, metrics = train_step(network, settings, state_there, images, labels, jax.random.key(1))
        return learned.feedback, metrics["feedback_loss"]

    at_first, loss = after(0)
    for number in (RARELY * 1000, RARELY * 1000 + 1):
        feedback, losses = after(number)
        if algorithm != ALGORITHMS["ldrl_fast"]:
            chex.assert_trees_all_equal((feedback, losses), (at_first, loss))
        elif number % RARELY:
            chex.assert_trees_all_equal(feedback, state.feedback)
            assert not any(losses.values())
        else:
            chex.assert_trees_all_close(feedback, at_first, rtol=1e-6)
            chex.assert_trees_all_close(losses, {block: RARELY * of_block for block, of_block in loss.items()})


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", NETWORKS)
def test_shared_updates_with_weight_decay_make_the_mismatch_fall(kind):
    """W - O by the same factor 1 - rate * decay in every step, whatever is learned, and the angle with it."""
    rate, decay, steps = 0.3, 0.02, 800
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    batches = [(x, jnp.argmax(jnp.sum(x, (1, 3)), axis=1)) for x, _ in random_batches(10)]  # the brightest column
    states = train("kp", NETWORKS[kind], optimizer, batches * (steps // 10))
    mismatches = [jax.tree.map(jnp.subtract, kernels(s.forward), kernels(s.feedback)) for s in states]
    for before, after in itertools.pairwise(mismatches):
        expected = jax.tree.map(lambda kernel: (1 - rate * decay) * kernel, before)
        chex.assert_trees_all_close(after, expected, rtol=1e-9, atol=1e-14)
    expected = jax.tree.map(lambda kernel: (1 - rate * decay) ** steps * kernel, mismatches[0])
    chex.assert_trees_all_close(mismatches[-1], expected, rtol=1e-9, atol=1e-13)
    angles = [weight_alignment(s.forward, s.feedback)["weight_angle"] for s in (states[0], states[-1])]
    assert set(angles[0]) == {block.name for block in NETWORKS[kind]}
    for name, at_first in angles[0].items():
        assert at_first > 60
        assert angles[1][name] < 2


@pytest.mark.usefixtures("_float64")
def test_fast_ldrl_from_matched_weights_is_backprop():
    """Feedback weights that start as the forward weights stay that, and every update is BP's."""
    optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))
    options = {"layers": LayerTraining(1, 0.4, 1.0), "symmetric_init": True}
    fast, backprop = (
        train(name, NETWORKS["lenet"], optimizer, random_batches(6), **options)[-1] for name in ("ldrl_fast", "bp")
    )
    chex.assert_trees_all_close(fast.forward, backprop.forward, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(kernels(fast.feedback), kernels(fast.forward), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_the_minimum_of_the_jacobian_matching_loss_is_backprop_from_the_first_step_on():
    optimizer = optax.sgd(0.05, momentum=0.9)
    matched, backprop = (train(name, NETWORKS["lenet"], optimizer, random_batches(6))[-1] for name in ("jml", "bp"))
    chex.assert_trees_all_close(matched.forward, backprop.forward, rtol=1e-9, atol=1e-12)


def fixed_feedback(network, beta):
    """Settings of feedback alignment, and its random parameters."""
    config = Settings(ALGORITHMS["fa"], (), beta, optax.sgd(0.1))
    state = init_state(network, config, jax.random.key(9))
    assert all(jnp.any(kernel != state.feedback[name]["kernel"]) for name, kernel in kernels(state.forward).items())
    return config, state.forward, state.feedback


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", NETWORKS)
def test_errors_through_the_layers_are_first_order_difference_targets(kind):
    """Of blocks of one layer with derived feedback: local gradients are those of feedback alignment."""
    network, beta = NETWORKS[kind], 0.3
    config, forward, backward = fixed_feedback(network, beta)
    ((x, labels),) = random_batches(1)
    derived = tuple(block._replace(gate=blocks.to_be_derived, project=blocks.to_be_derived) for block in network)
    ways = paths.bind(paths.consecutive(derived), derived, forward)

    @jax.jit
    def both(forward, backward):
        blocks = tuple(paths.derive(block, forward[block.name]) for block in derived)
        passes = networks.forward_passes(blocks, forward, x)
        target = output_target(passes[-1].output, labels, beta)
        targets, _ = propagate_targets(first_order_target, ways, forward, backward, passes, target)
        ours = local_gradients(derived, forward, passes, targets)
        return ours, error_gradients(network, config, forward, backward, x, labels)[0]

    ours, theirs = (jax.tree.map(lambda gradient: gradient / beta, side) for side in both(forward, backward))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-10)


AFFINE = {
    "scaled and turned": (lambda p, x: x @ (2 / 3 * p["w"]).T, True),
    "centred": (lambda p, x: x @ (p["w"] - p["w"].mean()), True),
    "low rank": (lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), False),
    "normed": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), False),
    "bent": (lambda p, x: x @ jnp.tanh(p["w"]), False),
}


@pytest.mark.parametrize("kind", AFFINE)
def test_probes_stay_where_equal_updates_are_no_equal_ones_of_a_weight(kind):
    f, affine = AFFINE[kind]
    p = {"w": jnp.ones((6, 6)), "a": jnp.ones((6, 2)), "b": jnp.ones((2, 6))}
    (layer,) = layers_of(f, p, jnp.ones((4, 6)))[0]
    assert layer.affine == affine
    learner = jaxdtp.learner((lambda key, x: p, f), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), jnp.ones((4, 6))).replace(step=jnp.asarray(999_999))
    new, _ = learner.step(state, jnp.ones((4, 6)), jnp.arange(4), jax.random.key(1))
    moved = jax.tree.map(lambda a, b: a - b, new.feedback["model"], state.feedback["model"])
    shared = jax.tree.map(lambda a, b: a - b, new.forward["model"], state.forward["model"])
    same = bool(jnp.allclose(moved["w"], shared["w"], atol=1e-5))
    assert same == affine


def test_blocks_without_a_feedback_map_have_the_derived_one():
    """Whatever they give as switches, they learn as the modules do that compute the same."""

    def block(name, inputs, outputs):
        def forward(params, x, context=None):
            return jnp.tanh(x @ params["kernel"]), (), {}

        def init(key):
            return {"kernel": jax.random.normal(key, (inputs, outputs)) / inputs**0.5}, None, {}

        return jaxdtp.Block(name, (inputs,), (outputs,), init, forward)

    network = (block("low", 6, 8), block("middle", 8, 7), block("top", 7, 4))
    pairs = [
        (lambda key, x, of=of: of.init(key)[0], lambda params, x, of=of: of.forward(params, x)[0]) for of in network
    ]
    x, labels = jax.random.normal(jax.random.key(0), (8, 6)), jnp.arange(8) % 4
    learned = []
    for model in (network, pairs):
        learner = jaxdtp.learner(model, optax.sgd(0.1), rule="ldrl")
        state = learner.init(jax.random.key(1), x)
        state, metrics = learner.step(state, x, labels, jax.random.key(2))
        assert jnp.isfinite(metrics["loss"])
        learned.append([jax.tree.leaves(side) for side in (state.forward, state.feedback)])
    chex.assert_trees_all_close(*learned, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_float64")
def test_feedback_alignment_is_backprop_with_other_weights_on_the_way_down():
    """The update, divided by beta, against autodiff of a network whose linear maps have B in their backward pass."""
    network = networks.mlp((6,), 4, hidden=(7, 5))
    config, forward, backward = fixed_feedback(network, 0.3)
    x, labels = jax.random.normal(jax.random.key(1), (8, 6)), jnp.arange(8) % 4

    @jax.custom_vjp
    def dense(x, kernel, other):
        return x @ kernel

    dense.defvjp(
        lambda x, kernel, other: (x @ kernel, (x, other)),
        lambda kept, g: (g @ kept[1].T, kept[0].T @ g, jnp.zeros_like(kept[1])),
    )

    def loss(params):
        h = x
        for block in network:
            other = backward[block.name]["kernel"]
            h = dense(h, params[block.name]["kernel"], other) + params[block.name]["bias"]
            h = h if block is network[-1] else jax.nn.elu(h)
        return jnp.mean(cross_entropy(h, labels))

    run = functools.partial(error_gradients, network, config)
    updates = jax.tree.map(lambda update: update / 0.3, run(forward, backward, x, labels)[0])
    chex.assert_trees_all_close(updates, jax.grad(loss)(forward), rtol=1e-9, atol=1e-12)
