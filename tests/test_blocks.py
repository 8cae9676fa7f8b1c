"""Blocks against independent implementations: Flax layers, a pooling loop in NumPy, autodiff."""

import itertools

import flax.linen as nn
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdtp.learning import paths
from jaxdtp.models import convolution, networks
from jaxdtp.models.blocks import Units, conv_block, dense_block, feedback, feedback_difference, matched_elu
from jaxdtp.models.convolution import conv, conv_transpose
from jaxdtp.models.pooling import SHARED_MAXIMA, max_pool, max_unpool, pooled_size

GEOMETRIES = st.sampled_from([(2, 2, 0), (3, 2, 1), (3, 3, 1), (2, 1, 0), (3, 1, 1)])


def unpool_by_loop(y, switches, size, window, stride, padding, shared):
    """The definition: windows in row-major order, each writes or adds its value where its maximum was."""
    out = np.zeros((size[0] + 2 * padding, size[1] + 2 * padding))
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            row, column = divmod(int(switches[i, j]), window)
            kept = out[i * stride + row, j * stride + column] if shared == "sum" else 0
            out[i * stride + row, j * stride + column] = kept + y[i, j]
    return out[padding : padding + size[0], padding : padding + size[1]]


# Few different values: ties inside windows and shared maxima are common.
@given(
    # Few shapes, each compiled once.
    x=st.sampled_from([(4, 7), (9, 6), (8, 8)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-3, 3))
    ),
    geometry=GEOMETRIES,
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_unpool_writes_to_the_switches(x, geometry, seed):
    pool = jax.jit(max_pool, static_argnums=(1, 2, 3))
    y, switches = (array[0, ..., 0] for array in pool(x[None, ..., None], *geometry))
    window, stride, padding = geometry
    expected = nn.max_pool(x[None, ..., None], (window, window), (stride, stride), [(padding, padding)] * 2)
    np.testing.assert_array_equal(y, expected[0, ..., 0])
    assert y.shape == pooled_size(x.shape, *geometry)

    def unpool(values, shared):
        values = jnp.float32(values)[None, ..., None]
        compiled = jax.jit(max_unpool, static_argnums=(2, 3, 4, 5), static_argnames="shared")
        return compiled(values, switches[None, ..., None], x.shape, *geometry, shared=shared)[0, ..., 0]

    # At the switches un-pooling inverts pooling, everywhere else it is zero.
    unpooled = unpool(y, "last")
    np.testing.assert_array_equal(unpooled, np.where(unpooled != 0, x, 0))
    other = np.random.default_rng(seed).normal(size=y.shape)
    for shared in SHARED_MAXIMA:
        expected = unpool_by_loop(other, switches, x.shape, *geometry, shared)
        np.testing.assert_allclose(unpool(other, shared), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("examples", "height", "width", "size", "channels"),
    [
        (3, 1, 1, 3, (2, 4)),
        (3, 2, 2, 3, (3, 2)),
        (3, 1, 1, 5, (6, 4)),
        (3, 7, 2, 1, (2, 4)),
        (3, 3, 6, 5, (4, 2)),
        (3, 3, 6, 5, (6, 2)),
        (3, 3, 6, 5, (17, 2)),
        (3, 4, 4, 3, (2, 70)),
        (3, 4, 4, 3, (64, 65)),
        # Maps and channels that suit Winograd's algorithm.
        (3, 8, 4, 3, (64, 65)),
        (3, 4, 6, 5, (33, 32)),
        (3, 8, 7, 3, (16, 17)),
        # More examples than are taken at a time.
        (9, 9, 7, 3, (3, 2)),
        (9, 5, 8, 3, (17, 2)),
        (9, 20, 19, 3, (32, 33)),
    ],
)
def test_convolution_and_its_derivatives(monkeypatch, examples, height, width, size, channels):
    """Values, first and second derivatives of the convolution and its transpose, against XLA's own."""
    monkeypatch.setattr(convolution, "BLOCK", 1)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def plain_transpose(y, kernel):
        x = jax.ShapeDtypeStruct((*y.shape[:3], channels[0]), y.dtype)
        return jax.linear_transpose(lambda x: plain(x, kernel), x)(y)[0]

    def results(function, x, kernel, dx, dkernel, y):
        yield function(x, kernel)
        yield jax.jvp(function, (x, kernel), (dx, dkernel))[1]
        yield from jax.vjp(function, x, kernel)[1](y)
        pull_back = lambda x, kernel, y: jax.vjp(function, x, kernel)[1](y)  # noqa: E731
        yield from jax.vjp(pull_back, x, kernel, y)[1]((dx, dkernel))
        # Derivatives of each example alone, as dense Jacobians need them.
        yield jax.vmap(jax.grad(lambda kernel, x: jnp.sum(function(x[None], kernel) ** 2)), (None, 0))(kernel, x)

    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 3)
        x, dx = jax.random.normal(keys[0], (2, examples, height, width, channels[0]), float)
        kernel, dkernel = jax.random.normal(keys[1], (2, size, size, *channels), float)
        y, dy = jax.random.normal(keys[2], (2, examples, height, width, channels[1]), float)

        @jax.jit
        def all_results(x, kernel, dx, dkernel, y, dy):
            forward, transposed = (x, kernel, dx, dkernel, y), (y, kernel, dy, dkernel, x)
            ours = [*results(conv, *forward), *results(conv_transpose, *transposed)]
            return ours, [*results(plain, *forward), *results(plain_transpose, *transposed)]

        in_blocks = "while" in jax.jit(jax.grad(lambda kernel: jnp.sum(conv(x, kernel)))).lower(kernel).as_text()
        assert in_blocks == (examples > 3 and jax.default_backend() == "cpu")
        for ours, reference in zip(*all_results(x, kernel, dx, dkernel, y, dy), strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-10 * np.abs(reference).max())


def test_platforms_get_their_own_convolutions():
    """Value and both gradients are three plain convolutions on GPU and TPU, and products of matrices on the CPU."""
    x, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    gradients = jax.value_and_grad(lambda x, kernel: jnp.sum(conv(x, kernel) ** 2), argnums=(0, 1))
    traced = jax.jit(gradients).trace(x, kernel)
    for platform, convolutions in (("cuda", 3), ("tpu", 3), ("cpu", 0)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == convolutions
        assert ("stablehlo.dot_general" in program) == (platform == "cpu")


def test_convolutions_of_any_input():
    """Integers, float32 beside float64, and no examples at all; and on meshes whose axes are explicit."""
    block = conv_block("conv", (8, 8, 32), 32)
    params, _, _ = block.init(jax.random.key(0))
    for x in (np.ones((2, 8, 8, 32), np.uint8), np.ones((0, 8, 8, 32), np.float32)):
        y, _, _ = block.forward(params, jnp.asarray(x))
        assert (y.shape, y.dtype) == ((len(x), 4, 4, 32), jnp.float32)
    with jax.enable_x64(True):
        kernel = jnp.ones((3, 3, 2, 2), jnp.float64)
        assert conv(jnp.ones((1, 4, 4, 2), jnp.float32), kernel).dtype == jnp.float64
        assert conv_transpose(jnp.ones((1, 4, 4, 2), jnp.float32), kernel).dtype == jnp.float64
    network = networks.lenet((8, 8, 1), 10, channels=(4, 4), hidden=(8,))
    params, _ = networks.init(network, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    divided = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    with jax.set_mesh(mesh):
        logits = networks.logits(network, params, divided)
    np.testing.assert_allclose(logits, networks.logits(network, params, x), rtol=1e-5, atol=1e-6)


def test_conv_block_is_flax_layers():
    block = conv_block("conv", (7, 9, 3), 5, kernel_size=5, window=3, stride=2, padding=1)
    params, feedback_params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 9, 3))
    y, switches, _ = block.forward(params, x)
    activation = nn.elu(nn.Conv(5, (5, 5)).apply({"params": params}, x))
    np.testing.assert_allclose(y, nn.max_pool(activation, (3, 3), (2, 2), [(1, 1)] * 2), rtol=1e-5, atol=1e-6)
    assert y.shape == (2, *block.output_shape)

    transposed = nn.ConvTranspose(3, (5, 5), transpose_kernel=True)
    expected = transposed.apply({"params": feedback_params}, block.gate(y, switches))
    np.testing.assert_allclose(feedback(block, feedback_params, y, switches), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [True, False])
def test_dense_block_is_flax_layers(activation):
    block = dense_block("fc", (2, 3, 4), 5, activation=activation)
    params, feedback_params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 2, 3, 4))
    y, switches, _ = block.forward(params, x)
    elu = nn.elu if activation else lambda values: values
    expected = elu(nn.Dense(5).apply({"params": params}, x.reshape(6, 24)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    back = {"kernel": feedback_params["kernel"].T, "bias": feedback_params["bias"]}
    expected = nn.Dense(24).apply({"params": back}, elu(y)).reshape(x.shape)
    np.testing.assert_allclose(feedback(block, feedback_params, y, switches), expected, rtol=1e-5, atol=1e-5)


def residual_block():
    """F(x) = x + ELU(x W + b), G(y) = y + ELU(y) O^T + c: what is gated is a pair."""
    inside = dense_block("residual", (6,), 6)

    def forward(params, x, context=None):
        y, switches, state = inside.forward(params, x)
        return x + y, switches, state

    def project(params, h):
        return h[0] + inside.project(params, h[1])

    return inside._replace(forward=forward, gate=lambda y, s: (y, inside.gate(y, s)), project=project)


def nested_block():
    """As a dense block, its parameters one level further down."""
    inside = dense_block("nested", (6,), 5)
    return inside._replace(
        init=lambda key: (*({"dense": side} for side in inside.init(key)[:2]), {}),
        forward=lambda params, x, context=None: inside.forward(params["dense"], x),
        project=lambda params, h: inside.project(params["dense"], h),
    )


@pytest.mark.parametrize(
    "block", [conv_block("conv", (4, 4, 2), 3), dense_block("fc", (6,), 5), residual_block(), nested_block()]
)
def test_feedback_difference_is_the_difference_of_feedbacks(block):
    forward, params, _ = block.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, *block.input_shape))
    (a, switches, _), (b, _, _) = (block.forward(forward, values) for values in x)
    difference = feedback_difference(block, params, block.gate(a, switches), block.gate(b, switches))
    expected = feedback(block, params, a, switches) - feedback(block, params, b, switches)
    np.testing.assert_allclose(difference, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("a", [-3.0, -0.7, -1e-3, 0.2, 4.0])
def test_matched_activation_has_the_forward_slope(a):
    """Its slope at y = ELU(a) is ELU's slope at a, and it is continuous and flat below ELU's range."""
    slope = jax.grad(matched_elu)(jax.nn.elu(a))
    np.testing.assert_allclose(slope, jax.grad(jax.nn.elu)(a), rtol=1e-5)
    assert jax.grad(matched_elu)(-5.0) == 0
    np.testing.assert_allclose(matched_elu(jnp.array([-5.0, -1.0, 0.0, 2.0])), [-0.5, -0.5, 0.0, 2.0])


@given(seed=st.integers(0, 99))
@settings(max_examples=10)
def test_matched_feedback_with_transposed_weights_is_the_transposed_jacobian(seed):
    """J_G = J_F^T exactly, in all of ELU's range, which ELU feedback can't reach."""
    network = networks.mlp((6,), 5, hidden=(7, 4), units=Units(feedback_activation=matched_elu))
    forward, _ = networks.init(network, jax.random.key(seed))
    x = 3 * jax.random.normal(jax.random.key(seed + 1), (2, 6))
    for block in network:
        y, switches, _ = block.forward(forward[block.name], x)
        cotangent = jax.random.normal(jax.random.key(seed + 2), y.shape)
        params = {"kernel": forward[block.name]["kernel"]}
        _, ours = jax.jvp(lambda y: feedback(block, params, y, switches), (y,), (cotangent,))  # noqa: B023
        (exact,) = jax.vjp(lambda x: block.forward(forward[block.name], x)[0], x)[1](cotangent)  # noqa: B023
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)
        x = y


def test_published_networks_have_the_published_shapes():
    vgg = networks.vgg((32, 32, 3), 10)
    assert [block.output_shape for block in vgg] == [
        (16, 16, 128), (8, 8, 128), (4, 4, 256), (2, 2, 256), (1, 1, 512), (10,)
    ]  # fmt: skip
    lenet = networks.lenet((28, 28, 1), 10)
    assert [block.name for block in lenet] == ["conv_0", "conv_1", "fc1", "fc2"]
    assert [block.output_shape for block in lenet] == [(14, 14, 32), (7, 7, 64), (512,), (10,)]
    for below, above in itertools.pairwise(vgg):
        assert below.output_shape == above.input_shape


def test_bad_geometry_is_refused():
    with pytest.raises(ValueError, match="conv_3: its input of 1x1 pixels is too small"):
        networks.vgg((8, 8, 1), 10, channels=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="kernel_size is 4; allowed: odd"):
        conv_block("conv", (8, 8, 1), 4, kernel_size=4)
    for window, padding in ((12, 0), (2, 2)):
        with pytest.raises(ValueError, match=f"window is {window} and padding {padding}; allowed: windows up to 11"):
            conv_block("conv", (16, 16, 1), 4, window=window, padding=padding)
    with pytest.raises(ValueError, match="shared_maxima is 'first'; allowed: last, sum"):
        conv_block("conv", (8, 8, 1), 4, shared_maxima="first")


def test_initialisation_is_the_published_one():
    """Uniform in +-1/sqrt(fan-in); symmetric feedback starts as the transposed forward weights."""
    network = networks.lenet((16, 16, 3), 10, channels=(8, 16), hidden=(32,))
    forward, _ = networks.init(network, jax.random.key(0))
    feedback_params = paths.init(paths.consecutive(network), jax.random.key(0))
    bounds = {"conv_0": 75**-0.5, "conv_1": 200**-0.5, "fc1": 256**-0.5, "fc2": 32**-0.5}
    feedback_bounds = {"conv_1": 200**-0.5, "fc1": 32**-0.5, "fc2": 10**-0.5}
    for params, expected in ((forward, bounds), (feedback_params, feedback_bounds)):
        assert set(params) == set(expected)
        for name, bound in expected.items():
            largest = float(jnp.abs(params[name]["kernel"]).max())
            assert 0.97 * bound < largest <= bound

    symmetric = paths.init(paths.consecutive(network), jax.random.key(0), like=forward)
    for name, params in symmetric.items():
        np.testing.assert_array_equal(params["kernel"], forward[name]["kernel"])
