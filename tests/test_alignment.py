"""Alignment measures against dense Jacobians, closed forms and the published implementation; the test helpers."""

import os
import subprocess
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import FILES, Vectors

from jaxdtp import alignment
from jaxdtp.configuration.config import default_config
from jaxdtp.learning import paths
from jaxdtp.learning.targets import difference_target, output_target, plain_target, propagate_targets
from jaxdtp.models import networks
from jaxdtp.models.blocks import Units, conv_block, dense_block, feedback_difference, matched_elu
from jaxdtp.models.modules import network_of
from jaxdtp.running.epoch import Preprocessing, normalise
from jaxdtp.running.train import in_precision
from jaxdtp.testing import assert_jacobian_matches_transpose, assert_updates_match_backprop

BLOCKS = {
    "linear": dense_block("linear", (5,), 4, activation=False),
    "dense": dense_block("dense", (2, 3), 4),
    "vgg": conv_block("vgg", (4, 4, 2), 3),
    "lenet": conv_block("lenet", (5, 5, 2), 3, kernel_size=5, window=3, stride=2, padding=1),
}


def block_and_batch(name, batch=3):
    block = BLOCKS[name]
    forward, feedback, _ = block.init(jax.random.key(0))
    return block, forward, feedback, jax.random.normal(jax.random.key(1), (batch, *block.input_shape))


def network_and_batch(activation=jax.nn.elu, classes=4, batch=6):
    network = networks.mlp((5,), classes, hidden=(7, 6), units=Units(feedback_activation=activation))
    forward, _ = networks.init(network, jax.random.key(0))
    feedback = paths.init(paths.consecutive(network), jax.random.key(0), like=forward)
    images = jax.random.normal(jax.random.key(1), (batch, 5))
    return network, forward, feedback, images, jnp.arange(batch) % classes


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("_float64")
def test_dense_jacobians_agree_with_products(name):
    block, forward, feedback, x = block_and_batch(name)
    jacobian_f, jacobian_g = alignment.dense_jacobians(block, forward, feedback, x)
    v = jax.random.normal(jax.random.key(2), (3, *block.output_shape))
    y, pull_back, switches = jax.vjp(lambda x: block.forward(forward, x)[:2], x, has_aux=True)
    np.testing.assert_allclose(
        jnp.einsum("boi,bo->bi", jacobian_f, v.reshape(3, -1)), pull_back(v)[0].reshape(3, -1), rtol=1e-10
    )
    # The feedback is differentiable everywhere but at un-pooled zeros, where both slopes of ELU are 1.
    step = 1e-6
    moved = [block.project(feedback, block.gate(y + sign * step * v, switches)) for sign in (1, -1)]
    expected = ((moved[0] - moved[1]) / (2 * step)).reshape(3, -1)
    np.testing.assert_allclose(jnp.einsum("bio,bo->bi", jacobian_g, v.reshape(3, -1)), expected, atol=1e-8)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.usefixtures("_float64")
def test_probes_agree_with_dense_jacobians(name, per_example):
    """Within 3 standard errors, in all but 2.5 % of 200 repetitions.

    0.3 % of a normal distribution lie outside; were it 0.6 % for our skewed one, more than 5 of 200 would have a
    probability of 0.2 %. Keys are fixed.
    """
    block, forward, feedback, x = block_and_batch(name)
    jacobian_f, jacobian_g = alignment.dense_jacobians(block, forward, feedback, x)
    transposed = jnp.swapaxes(jacobian_f, 1, 2)
    pairs = list(zip(jacobian_g, transposed, strict=True)) if per_example else [(jacobian_g, transposed)]
    exact = (
        np.array([alignment.relative_distance(g.ravel(), f.ravel()) for g, f in pairs]),
        np.array([alignment.angle_degrees(g.ravel(), f.ravel()) for g, f in pairs]),
    )

    def estimate(key):
        return alignment.jacobian_matching(block, forward, feedback, x, key, probes=100, per_example=per_example)

    estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(3), 200))
    for of_all, value in zip(estimates, exact, strict=True):
        assert of_all.value.shape == ((200, 3) if per_example else (200,))
        misses = np.abs(of_all.value.reshape(200, -1) - value) > 3 * of_all.standard_error.reshape(200, -1)
        assert np.mean(misses) <= 0.025
        np.testing.assert_allclose(np.mean(of_all.value), np.mean(value), rtol=0.02)


@pytest.mark.usefixtures("_float64")
def test_standard_error_is_the_spread_of_the_estimates():
    """Over 400 repetitions their spread is known to 3.5 %; 20 % is beyond five standard deviations."""
    block, forward, feedback, x = block_and_batch("dense")

    def estimate(key):
        return alignment.jacobian_matching(block, forward, feedback, x, key, probes=20)

    for of_all in jax.vmap(estimate)(jax.random.split(jax.random.key(5), 400)):
        np.testing.assert_allclose(jnp.std(of_all.value), jnp.mean(of_all.standard_error), rtol=0.2)


LENET = {"kernel_size": 5, "window": 3, "stride": 2, "padding": 1}


@pytest.mark.parametrize(
    ("block", "matches"),
    [
        (dense_block("matched", (6,), 5, units=Units(feedback_activation=matched_elu)), True),
        # ELU's slope at y is not the forward slope there.
        (dense_block("elu", (6,), 5), False),
        (conv_block("vgg", (8, 8, 2), 3, units=Units(feedback_activation=matched_elu)), True),
        # Where windows overlap and share a maximum, un-pooling keeps one value, and the gradient is their sum.
        (conv_block("lenet", (8, 8, 2), 3, **LENET, units=Units(feedback_activation=matched_elu)), False),
        (
            conv_block("sum", (8, 8, 2), 3, **LENET, units=Units(feedback_activation=matched_elu), shared_maxima="sum"),
            True,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_transposed_weights_match_where_activation_and_windows_allow(block, matches):
    forward, _, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, *block.input_shape))
    error, angle = alignment.jacobian_matching(block, forward, {"kernel": forward["kernel"]}, x, jax.random.key(2))
    assert (error.value < 1e-6) == matches
    assert (angle.value < 1e-3) == matches


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_update_angles_are_the_published_ones(path):
    vectors = Vectors(path)
    rule = plain_target if vectors.rule == "tp" else difference_target
    matches = alignment.gradient_matching(
        vectors.network,
        rule,
        vectors.network_parameters("forward_before"),
        vectors.network_parameters("feedback_after"),
        vectors.images,
        vectors.labels,
        float(vectors["hp/beta"]),
    )
    published = [key for key in vectors.arrays.files if key.startswith("update_angle_degrees/")]
    assert len(published) == 2 * len(vectors.network)
    for key in published:
        parameter = key.removeprefix("update_angle_degrees/")
        match = matches[parameter.split(".")[0]]["kernel" if parameter.endswith("weight") else "bias"]
        # The published code adds 1e-8 to the product of the norms.
        gradient = jnp.asarray(vectors[f"backprop_grad/{parameter}"])
        norms = match.ratio * jnp.sum(gradient**2)
        expected = jnp.degrees(jnp.arccos(match.cosine * norms / (norms + 1e-8)))
        np.testing.assert_allclose(vectors[key], expected, rtol=1e-6)
        # Its distance is relative to the update, ours to the gradient.
        distance = match.distance / match.ratio
        np.testing.assert_allclose(distance, vectors[f"update_distance/{parameter}"], rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_gradients_match_with_transposed_weights():
    network, forward, feedback, images, labels = network_and_batch(matched_elu)
    for per_example in (False, True):
        matches = alignment.gradient_matching(
            network, difference_target, forward, feedback, images, labels, 1e-5, per_example=per_example
        )
        for match in jax.tree.leaves(matches, is_leaf=lambda node: isinstance(node, alignment.Match)):
            assert match.angle.shape == ((6,) if per_example else ())
            np.testing.assert_allclose(match.angle, 0, atol=1e-2)
            np.testing.assert_allclose(match.cosine, 1, atol=1e-6)
            np.testing.assert_allclose(match.ratio, 1, atol=1e-3)
            np.testing.assert_allclose(match.distance, 0, atol=1e-3)


@pytest.mark.usefixtures("_float64")
def test_backprop_targets_are_gradients_of_the_loss():
    network, forward, _, images, labels = network_and_batch()
    passes = networks.forward_passes(network, forward, images)
    beta = 0.3
    targets = alignment.backprop_targets(network, forward, passes, output_target(passes[-1].output, labels, beta))
    for index in range(len(network)):

        def loss(x, index=index):
            outputs = networks.forward_passes(network[index + 1 :], forward, x)
            logits = outputs[-1].output if outputs else x
            return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

        s = passes[index].output
        np.testing.assert_allclose(targets[index] - s, -beta * jax.grad(loss)(s), rtol=1e-10)


@pytest.mark.usefixtures("_float64")
def test_gauss_newton_targets_reach_the_output_target():
    """Without damping the smallest change that moves the linearised network to its target; with much damping the
    direction of backpropagation."""
    network, forward, _, images, labels = network_and_batch()
    passes = networks.forward_passes(network, forward, images)
    target = output_target(passes[-1].output, labels, 1e-4)
    change = target - passes[-1].output
    targets = alignment.gauss_newton_targets(network, forward, passes, target, damping=0.0)
    for index in range(len(network)):
        step = targets[index] - passes[index].output

        def upper(x, index=index):
            return networks.logits(network[index + 1 :], forward, x) if network[index + 1 :] else x

        jacobian = jax.vmap(jax.jacrev(lambda x, upper=upper: upper(x[None])[0]))(passes[index].output)
        np.testing.assert_allclose(jnp.einsum("bof,bf->bo", jacobian, step), change, rtol=1e-6, atol=1e-12)
        expected = jnp.einsum("bfo,bo->bf", jnp.linalg.pinv(jacobian), change)
        np.testing.assert_allclose(step, expected, rtol=1e-6, atol=1e-12)

    (only,) = alignment.gauss_newton_targets(network[-1:], forward, passes[-1:], target, damping=0.0)
    np.testing.assert_array_equal(only, target)

    damped = alignment.gauss_newton_targets(network, forward, passes, target, damping=1e6)
    references = alignment.backprop_targets(network, forward, passes, target)
    for match in alignment.target_matching(network, passes, damped, references).values():
        assert match.angle < 1e-3


ON_TWO_CORES = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
from jaxdtp import alignment
from jaxdtp.models import networks
network = networks.mlp((8,), 10, hidden=(16,) * 6)
forward, _ = networks.init(network, jax.random.key(0))
passes = networks.forward_passes(network, forward, jax.random.normal(jax.random.key(1), (640, 8)))
for _ in range(100):
    jax.block_until_ready(alignment.gauss_newton_targets(network, forward, passes, passes[-1].output + 0.01, 1e-4))
"""


def test_gauss_newton_targets_of_a_large_batch_end_on_two_cores():
    """Where jaxlib divides a decomposition among threads, one for each block at once stopped before the tenth call."""
    subprocess.run([sys.executable, "-c", ON_TWO_CORES], env=os.environ | {"XLA_FLAGS": ""}, timeout=120, check=True)


@pytest.mark.usefixtures("_float64")
def test_target_rules_against_both_references():
    """With transposed weights a difference target is the backpropagation one, and not the Gauss-Newton one."""
    network, forward, feedback, images, labels = network_and_batch(matched_elu)
    passes = networks.forward_passes(network, forward, images)
    target = output_target(passes[-1].output, labels, 1e-5)
    ways = paths.bind(paths.consecutive(network), network, forward)
    targets, _ = propagate_targets(difference_target, ways, forward, feedback, passes, target)
    references = (
        alignment.backprop_targets(network, forward, passes, target),
        alignment.gauss_newton_targets(network, forward, passes, target, damping=1e-6),
    )
    to_backprop, to_gauss_newton = (
        alignment.target_matching(network, passes, targets, reference, per_example=True) for reference in references
    )
    for block in network[:-1]:
        assert to_backprop[block.name].angle.shape == (6,)
        assert jnp.all(to_backprop[block.name].angle < 0.1)
        assert jnp.all(to_gauss_newton[block.name].angle > 1)


def test_helpers_pass_where_feedback_is_the_transpose():
    network, forward, feedback, images, labels = network_and_batch(matched_elu)
    for block, clean in zip(network[1:], networks.forward_passes(network, forward, images)[1:], strict=True):
        params = forward[block.name], feedback[block.name]
        assert_jacobian_matches_transpose(block, params, clean.input, max_degrees=0.1, max_relative_error=1e-3)
    assert_updates_match_backprop(
        network, (forward, feedback), (images, labels), max_degrees=1, max_relative_error=0.02, beta=1e-3
    )


def test_jacobian_helper_names_the_broken_unit():
    block, forward, _, x = block_and_batch("linear")
    broken = {"kernel": forward["kernel"].at[:, 2].multiply(-1)}
    with pytest.raises(AssertionError, match=r"block linear: the angle .* \+- .* degrees, allowed: 5") as failure:
        assert_jacobian_matches_transpose(block, (forward, broken), x, max_degrees=5)
    assert "Worst output unit (2,) of (4,): its gradient is off by 2 of its norm, 100%" in str(failure.value)
    with pytest.raises(AssertionError, match=r"\|J_G - J_F\^T\| / \|J_F\| is .* allowed: 0.1"):
        assert_jacobian_matches_transpose(block, (forward, broken), x, max_relative_error=0.1)


def test_jacobian_helper_says_which_shape_was_expected():
    block, forward, feedback, x = block_and_batch("linear")
    short = block._replace(project=lambda params, h: h @ params["kernel"][:-1].T)
    with pytest.raises(
        AssertionError, match=r"block linear: feedback of an output of shape \(3, 4\) gives \(3, 4\); expected \(3, 5\)"
    ):
        assert_jacobian_matches_transpose(short, (forward, feedback), x, max_degrees=5)
    narrow = {"kernel": feedback["kernel"][:, :-1]}
    with pytest.raises(AssertionError, match=r"of shape \(3, 4\) fails; expected \(3, 5\), the block's input_shape: "):
        assert_jacobian_matches_transpose(block, (forward, narrow), x, max_degrees=5)
    with pytest.raises(AssertionError, match=r"forward gives \(3, 4\); expected \(3, 9\)"):
        assert_jacobian_matches_transpose(block._replace(output_shape=(9,)), (forward, feedback), x, max_degrees=5)
    with pytest.raises(AssertionError, match=r"x is \(3, 4\); expected \(3, 5\)"):
        assert_jacobian_matches_transpose(block, (forward, feedback), x[:, :4], max_degrees=5)


def test_update_helper_leads_to_the_broken_block():
    network, forward, feedback, images, labels = network_and_batch(matched_elu)
    feedback["fc3"]["kernel"] = feedback["fc3"]["kernel"].at[:, 1].multiply(-1)
    with pytest.raises(AssertionError) as failure:
        assert_updates_match_backprop(network, (forward, feedback), (images, labels), max_degrees=1)
    first = str(failure.value).splitlines()[0]
    # The block whose feedback is broken sends a wrong target to the one below; its own update is still right.
    assert first.startswith("block fc2, bias: angle of update / beta to the gradient is")
    assert "worst output unit" in first


def test_a_helper_notices_slopes_that_a_difference_loses():
    """An affine block whose project multiplies by slopes that gate gives it."""
    block = dense_block("dense", (6,), 4)
    wrong = block._replace(
        gate=lambda y, switches: (y, jnp.where(y > 0, 1.0, 0.3)),
        project=lambda params, h: block.project(params, h[0] * h[1]),
    )
    forward, feedback, _ = wrong.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 6))
    with pytest.raises(AssertionError, match="block dense: affine, but one projection"):
        assert_jacobian_matches_transpose(wrong, (forward, feedback), x, max_degrees=180)
    assert_jacobian_matches_transpose(wrong._replace(affine=False), (forward, feedback), x, max_degrees=180)


def test_helpers_want_a_tolerance_and_two_probes():
    block, forward, feedback, x = block_and_batch("linear")
    with pytest.raises(ValueError, match="max_degrees, max_relative_error: got neither; allowed: one or both"):
        assert_jacobian_matches_transpose(block, (forward, feedback), x)
    with pytest.raises(ValueError, match="probes: got 1; allowed: 2 or more"):
        alignment.jacobian_matching(block, forward, feedback, x, jax.random.key(0), probes=1)
    error, _ = alignment.jacobian_matching(block, forward, feedback, x, jax.random.key(0), probes=2)
    assert jnp.isfinite(error.standard_error)


@pytest.mark.parametrize("double", [True, False])
def test_double_precision_reaches_parameters_and_images(double):
    config = default_config()
    config.float64 = double

    @in_precision
    def dtypes(config, workdir):
        kernel = BLOCKS["vgg"].init(jax.random.key(0))[0]["kernel"]
        images = normalise(Preprocessing((0.5,), (0.5,)), jnp.zeros((1, 4, 4, 1), jnp.uint8))
        return kernel.dtype, images.dtype

    assert dtypes(config, None) == ((np.float64, np.float64) if double else (np.float32, np.float32))


def test_matmul_precision_reaches_every_product():
    block = conv_block("conv", (4, 4, 2), 3)
    forward, _, _ = block.init(jax.random.key(0))

    def program(precision):
        config = default_config()
        config.matmul_precision = precision

        @in_precision
        def trace(config, workdir):
            traced = jax.jit(block.forward).trace(forward, jnp.ones((1, 4, 4, 2)))
            return traced.lower(lowering_platforms=("cuda",)).as_text()

        return trace(config, None)

    assert "precision HIGHEST" in program("float32")
    assert "precision HIGHEST" not in program("bfloat16")
    assert program("tensorfloat32") != program("bfloat16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda block: block._replace(forward=lambda params, x: block.forward(params, x)[0]),
            r"forward gives .* \(y, switch",
        ),
        (
            lambda block: block._replace(forward=lambda params, x: params["kernle"]),
            "forward fails; .*KeyError: 'kernle'",
        ),
        (
            lambda block: block._replace(project=lambda params, h: h @ params["kernle"]),
            "feedback of .*KeyError: 'kernle'",
        ),
    ],
)
def test_helpers_name_the_block_whatever_is_wrong_with_it(change, words):
    block = change(dense_block("upper", (4,), 3))
    forward, feedback, _ = dense_block("upper", (4,), 3).init(jax.random.key(0))
    with pytest.raises(AssertionError, match=f"block upper: {words}"):
        assert_jacobian_matches_transpose(block, (forward, feedback), jnp.ones((2, 4)), max_degrees=1)


def test_helpers_refuse_integers():
    block = dense_block("upper", (4,), 3)
    forward, feedback, _ = block.init(jax.random.key(0))
    with pytest.raises(AssertionError, match="block upper: x is int32; expected floating point"):
        assert_jacobian_matches_transpose(block, (forward, feedback), jnp.ones((2, 4), jnp.int32), max_degrees=1)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.Dense(6, name=name)(x) for name in ("query", "key", "value"))
        return nn.Dense(4)((nn.softmax(query @ key.mT) @ value).mean(1))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.PReLU()(nn.Dense(5)(nn.Embed(9, 6)(x).mean(1))))


def of_module(module, x, change=0.0):
    """A module's forward parameters, and feedback that is off them by a share."""
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    return params, jax.tree.map(lambda leaf: leaf * (1 + change), params)


def test_parameters_without_a_gradient_have_no_direction():
    """Softmax takes no notice of the bias of keys: update and gradient are rounding errors."""
    x = jax.random.normal(jax.random.key(1), (8, 3, 6))
    batch = x, jnp.arange(8) % 4
    assert_updates_match_backprop(Attention(), of_module(Attention(), x, 1e-3), batch, max_degrees=1)
    params, feedback = of_module(Attention(), x)
    feedback["Dense_0"]["kernel"] = -feedback["Dense_0"]["kernel"]
    with pytest.raises(AssertionError, match=r"block Attention, value\.kernel: angle .* is 180 degrees"):
        assert_updates_match_backprop(Attention(), (params, feedback), batch, max_degrees=1)


def test_updates_of_tokens_and_of_single_numbers_are_compared():
    x, labels = jax.random.randint(jax.random.key(1), (8, 3), 0, 9), jnp.arange(8) % 4
    params, feedback = of_module(Tokens(), x)
    assert_updates_match_backprop(Tokens(), (params, feedback), (x, labels), max_degrees=0.1)
    feedback["Dense_0"]["kernel"] = -feedback["Dense_0"]["kernel"]
    with pytest.raises(AssertionError, match=r"PReLU_0\.negative_slope: angle"):
        assert_updates_match_backprop(Tokens(), (params, feedback), (x, labels), max_degrees=0.1)


def test_updates_that_no_feedback_takes_part_in_are_refused():
    x, labels = jnp.ones((4, 6)), jnp.arange(4)
    params, _ = of_module(nn.Dense(4), x)
    feedback = jax.tree.map(lambda leaf: -7 * leaf, params)
    with pytest.raises(ValueError, match="network: got one layer, Dense; allowed: two or more"):
        assert_updates_match_backprop(nn.Dense(4), (params, feedback), (x, labels), max_degrees=1)
    block, forward, _, x = block_and_batch("linear", batch=4)
    with pytest.raises(ValueError, match="network: got one block, linear; allowed: two or more"):
        assert_updates_match_backprop(
            (block,), ({"linear": forward}, {}), (x, labels), max_degrees=1, target_rule=difference_target
        )


def test_without_a_target_rule_the_feedback_says_what_the_updates_are():
    """Feedback beside every layer of blocks that could have feedback maps of their own, too."""
    network, forward, feedback, images, labels = network_and_batch()
    beside = alignment.gradient_matching(network, None, forward, forward, images, labels, 1.0)
    between = alignment.gradient_matching(network, None, forward, feedback, images, labels, 1e-3)
    assert max(match["kernel"].angle for match in beside.values()) < 1e-3
    assert between["fc1"]["kernel"].angle > 1
    expected = alignment.gradient_matching(network, difference_target, forward, feedback, images, labels, 1e-3)
    assert between == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": jnp.full(6, 4)}, r"labels: got 4; allowed: 0 to 3"),
        ({"labels": [0] * 6}, r"labels: got a list; allowed: an array"),
        ({"images": jnp.ones((6, 4))}, r"images: got shape \(6, 4\); allowed: \[batch, 5\]"),
        ({"feedback": {"fc2": {}, "top": {}}}, r"feedback: got parameters of blocks fc2, top; allowed: of fc2, fc3"),
        ({"forward": {}}, r"forward: got parameters of blocks none; allowed: of fc1, fc2, fc3"),
    ],
)
def test_what_does_not_fit_is_told(change, words):
    names = ("network", "forward", "feedback", "images", "labels")
    values = dict(zip(names, network_and_batch(), strict=True)) | change
    values = values | {"target_rule": difference_target, "beta": 1.0}
    with pytest.raises(ValueError, match=words):
        alignment.gradient_matching(**values)


class Counted(nn.Module):
    """Layers and batch statistics; it counts its calls."""

    calls = 0

    @nn.compact
    def __call__(self, x, train=True):
        type(self).calls += 1
        return nn.Dense(4)(jnp.tanh(nn.Dense(5)(nn.BatchNorm(use_running_average=not train)(x))))


@pytest.mark.parametrize("blocks", [1, 2])
def test_other_states_take_no_other_programs(blocks):
    """What training changes from epoch to epoch are arrays: the model is traced for the first one only."""
    model = Counted() if blocks == 1 else [Counted() for _ in range(blocks)]
    x, labels = jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(6) % 4
    network = network_of(model, x)
    forward, state = networks.init(network, jax.random.key(0))
    calls, gradients = [], []
    for mean in (0.0, 5.0):
        moved = jax.tree.map(lambda leaf, mean=mean: leaf + mean, state)
        arguments = (model, None, forward, forward, x, labels, 1.0)
        matches = alignment.gradient_matching(*arguments, state=moved)
        assert all(match.angle < 0.1 for match in jax.tree.leaves(matches, is_leaf=lambda leaf: hasattr(leaf, "angle")))
        gradients.append(jax.tree.leaves(alignment.updates_and_gradients(*arguments, state=moved)[1]))
        if blocks == 1:
            (params,) = forward.values()
            error, _ = alignment.jacobian_matching(model, params, params, x, jax.random.key(0), state=moved)
            assert error.value < 1e-5
        calls.append(Counted.calls)
    assert calls[0] == calls[1]
    assert any(jnp.max(jnp.abs(one - other)) > 0.01 for one, other in zip(*gradients, strict=True))


def test_parameters_of_lists_are_lists():
    """Of one model, too; whether a list is a pair's own parameters their structure says."""
    x, labels = jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(6) % 4
    pair = (lambda key, x: [jnp.eye(4), jnp.ones((4, 4))], lambda params, x: jnp.tanh(x @ params[0]) @ params[1])
    alone = (lambda key, x: [jnp.eye(4)], lambda params, x: jnp.tanh(x @ params[0]))
    matching = lambda arguments: alignment.gradient_matching(*arguments, x, labels, 1.0)  # noqa: E731
    for model in (Counted(), pair, alone):
        network = network_of(model, x)
        ((name, params),) = networks.init(network, jax.random.key(0))[0].items()
        feedback = jax.tree.map(lambda leaf: leaf + 0.1, params)
        expected = matching((model, None, params, feedback))
        assert matching(([model], None, [params], [feedback])) == expected
        assert matching((model, None, {name: params}, {name: feedback})) == expected
    forward = list(networks.init(network_of([Counted()] * 2, x), jax.random.key(0))[0].values())
    for params in (forward[:0], forward * 2):
        with pytest.raises(ValueError, match=rf"got a list of {len(params)}; allowed: of 2, for Counted_0, Counted_1"):
            matching(([Counted()] * 2, None, forward, params))


def test_one_block_is_asked_for():
    network, forward, feedback, images, _ = network_and_batch()
    with pytest.raises(ValueError, match="block: got 3, fc1, fc2, fc3; allowed: one"):
        alignment.jacobian_matching(network, forward, feedback, images, jax.random.key(0))
    with pytest.raises(ValueError, match="block: got 3, fc1, fc2, fc3; allowed: one"):
        assert_jacobian_matches_transpose(network, (forward, feedback), images, max_degrees=1)


def test_a_helper_notices_projections_that_are_not_linear_in_their_parameters():
    """The loss of L-DRL takes the difference for linear in all parameters that aren't biases."""
    block, forward, _, x = block_and_batch("linear", batch=20)
    scaled = block._replace(project=lambda params, h: h @ (params["scale"] * params["kernel"]).T)
    feedback = {"kernel": forward["kernel"], "scale": jnp.ones(4)}
    with pytest.raises(AssertionError, match="affine, but with parameters twice as large it is off by"):
        assert_jacobian_matches_transpose(scaled, (forward, feedback), x, max_degrees=1)
    assert_jacobian_matches_transpose(scaled._replace(affine=False), (forward, feedback), x, max_degrees=1)


class Weights(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@pytest.mark.parametrize("kind", [dict, Weights])
def test_biases_leave_differences_in_every_tree(kind):
    block, forward, *_ = block_and_batch("linear")

    def project(params, h):
        return block.project(params._asdict() if isinstance(params, Weights) else params, h)

    params, y = kind(kernel=forward["kernel"], bias=jnp.ones(5)), jnp.ones((3, 4))
    np.testing.assert_array_equal(feedback_difference(block._replace(project=project), params, y, y), 0)


def test_half_precision_does_not_hide_a_mismatch():
    """Squares of 256 x 512 numbers of a size of 1 are more than float16 can tell."""
    block = dense_block("dense", (256,), 256, activation=False)
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tree)  # noqa: E731
    forward, feedback, _ = half(block.init(jax.random.key(0)))
    x = half(jax.random.normal(jax.random.key(1), (512, 256)))
    error, angle = alignment.jacobian_matching(block, forward, feedback, x, jax.random.key(2), probes=2)
    assert error.value > 1
    assert abs(angle.value - 90) < 5
    assert jnp.isfinite(alignment.match(x, 2 * x).ratio)


def test_kernels_of_other_shapes_have_no_angle():
    kernels = {"block": {"kernel": jnp.ones((3, 4))}}, {"block": {"kernel": jnp.ones((4, 3))}}
    assert alignment.weight_alignment(*kernels) == {"weight_angle": {}, "weight_distance": {}}


def test_examples_without_a_change_are_left_out():
    block, forward, _, x = block_and_batch("linear")
    passes = networks.forward_passes((block,), {"linear": forward}, x)
    changes = jnp.ones((3, 4)).at[0].set(0)
    targets, references = [passes[0].output + 1], [passes[0].output + changes]
    found = alignment.target_matching((block,), passes, targets, references)["linear"]
    np.testing.assert_allclose((found.ratio, found.distance, found.angle), (1, 0, 0), atol=1e-4)
