"""Plain convolutions on the CPU: the same numbers, without XLA's slow ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxdtp
from jaxdtp.devices.parallel import divide_batch, make_mesh
from jaxdtp.models.jaxprs import inside
from jaxdtp.models.modules import network_of
from jaxdtp.models.plain_convolutions import fast_in_loops, has_convolutions


class Repeated(nn.Module):
    """Three convolutions of their own parameters, one after the other in a loop."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x):
            return nn.tanh(nn.Conv(4, (3, 3))(x)), ()

        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(self, x)[0]


CONVOLUTIONS = {
    "3x3": (nn.Conv(6, (3, 3)), (3, 8, 7, 4)),
    "strided": (nn.Conv(6, (3, 3), strides=2), (3, 8, 7, 4)),
    "valid, uneven": (nn.Conv(6, (2, 4), strides=(1, 3), padding="VALID"), (3, 8, 9, 4)),
    "dilated": (nn.Conv(6, (3, 3), kernel_dilation=2), (3, 8, 7, 4)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (3, 8, 7, 4)),
    "depthwise": (nn.Conv(4, (5, 5), feature_group_count=4), (3, 8, 7, 4)),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (3, 5, 4, 4)),
    "1d": (nn.Conv(6, (3,), padding="CAUSAL"), (3, 9, 4)),
    "3d": (nn.Conv(2, (2, 2, 2), strides=2), (2, 4, 4, 4, 3)),
    "patches": (nn.Conv(6, (4, 4), strides=4, padding="VALID"), (3, 8, 8, 4)),
    "shortcut": (nn.Conv(6, (1, 1), strides=2), (3, 9, 7, 4)),
    "1d patches": (nn.Conv(6, (3,), strides=3, padding="VALID"), (3, 11, 4)),
    "gaps, uneven": (nn.Conv(6, (2, 3), strides=(3, 4), padding=((1, 2), (5, 0))), (3, 9, 7, 4)),
    "remat": (nn.remat(nn.Conv)(6, (3, 3)), (3, 8, 7, 4)),
    "scan": (Repeated(), (3, 8, 7, 4)),
}
OURS = {"3x3", "3d", "patches", "shortcut", "1d patches", "gaps, uneven", "remat", "scan"}


def gradient_of(module, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    params = module.init(jax.random.key(1), x)

    @jax.grad
    def gradient(params, x):
        return jnp.sum(jnp.sin(module.apply(params, x)))

    return gradient, params, x


def sums_over_examples(program) -> int:
    """Convolutions that sum over the first axis, in a program and all that it calls."""
    return sum(
        equation.primitive.name == "conv_general_dilated" and equation.params["dimension_numbers"].lhs_spec[1] == 0
        for equation in program.eqns
    ) + sum(sums_over_examples(inner) for equation in program.eqns for inner in inside(equation))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_models_are_ours_where_they_can_be(kind):
    module, shape = CONVOLUTIONS[kind]
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), shape)
        (block,) = network_of(module, x)
        params, _, _ = block.init(jax.random.key(1))
        forward = lambda params, x: block.forward(params, x)[0]  # noqa: E731
        # In a run the batch is divided on a mesh, also where there is one device.
        divided = lambda params, x: forward(params, divide_batch(make_mesh(), x))  # noqa: E731
        for program in (forward, divided):
            assert has_convolutions(jax.make_jaxpr(program)(params, x).jaxpr) == (kind not in OURS)
        y, pull_back = jax.vjp(forward, params, x)
        reference, pull_back_plain = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        ours, plain = (
            jax.tree.leaves((value, pull(reference))) for value, pull in ((y, pull_back), (reference, pull_back_plain))
        )
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_models_with_convolutions_run_under_shard_map_and_its_checks():
    shape = (4, 8, 8, 3)
    x = jax.random.normal(jax.random.key(0), shape)
    learner = jaxdtp.learner(nn.Sequential([nn.Conv(4, (3, 3)), lambda x: x.mean((1, 2))]), optax.sgd(0.1))
    state, mesh = learner.init(jax.random.key(1), x), jax.sharding.Mesh(np.array(jax.devices()[:1]), "d")
    divided = jax.shard_map(
        lambda x: learner.predict(state, x), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
    )
    np.testing.assert_allclose(divided(x), learner.predict(state, x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kernel_gradients_in_loops_are_xlas(kind):
    with jax.enable_x64(True):
        gradient, params, x = gradient_of(*CONVOLUTIONS[kind])
        assert sums_over_examples(jax.make_jaxpr(gradient)(params, x).jaxpr) == 1
        fast = fast_in_loops(gradient)
        assert sums_over_examples(jax.make_jaxpr(fast)(params, x).jaxpr) == 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), fast(params, x), gradient(params, x)
        )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU")
def test_convolutions_within_loops_and_branches_are_found():
    with jax.enable_x64(True):
        gradient, params, x = gradient_of(nn.Conv(4, (3, 3)), (3, 8, 7, 4))

        def nested(params, x, count):
            def step(carry, scale):
                return jax.lax.cond(scale > 1, lambda c: gradient(c, x * scale), lambda c: c, carry), ()

            start = jax.lax.scan(step, params, jnp.arange(3.0))[0]
            return jax.lax.while_loop(
                lambda c: c[1] < count, lambda c: (jax.jit(gradient)(c[0], x), c[1] + 1), (start, 0)
            )[0]

        assert sums_over_examples(jax.make_jaxpr(nested)(params, x, 2).jaxpr) == 2
        fast = fast_in_loops(nested)
        assert sums_over_examples(jax.make_jaxpr(fast)(params, x, 2).jaxpr) == 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            fast(params, x, 2),
            nested(params, x, 2),
        )
