"""Feedback derived from any function: the value of f, the derivative of jax.vjp at equal weights, and no forward weight
on the way down."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdtp
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.values import parameter_names

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Step(nn.Module):
    """One step of a scan."""

    linear: bool = False

    @nn.compact
    def __call__(self, carry, _):
        y = nn.Dense(4, **F64)(carry)
        return y if self.linear else nn.tanh(y), None


class Scanned(nn.Module):
    shared: bool = False
    linear: bool = False

    @nn.compact
    def __call__(self, x):
        options = {"variable_broadcast": "params"} if self.shared else {"variable_axes": {"params": 0}}
        scanned = nn.scan(Step, split_rngs={"params": not self.shared}, length=3, **options)
        return scanned(self.linear)(x, None)[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, **F64)
        return dense(nn.tanh(dense(x)))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(5, **F64)(nn.tanh(nn.remat(nn.Dense)(6, **F64)(x)))


class Keyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, **F64)(inputs=x)


class Left(nn.Module):
    """Its weight is the first operand."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0, jnp.float64), (5, 4))
        return (kernel @ x.T).T


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0, jnp.float64), (4, 4))
        return jax.lax.cond(x.sum() > 0, lambda x: x @ kernel, lambda x: 2 * (x @ kernel.T), x)


class Switched(nn.Module):
    """What isn't of the input chooses a kernel."""

    @nn.compact
    def __call__(self, x):
        one, other = (self.param(name, nn.initializers.normal(1.0, jnp.float64), (4, 4)) for name in ("one", "other"))
        which = self.param("which", nn.initializers.ones, ())
        kernel, x = jax.lax.cond(which > 0, lambda x: (one, x), lambda x: (other.T, 2 * x), x)
        return x @ kernel


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(**F64)(x)
        return x + nn.MultiHeadDotProductAttention(2, **F64)(y, y)


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, **F64)
        return embed.attend(nn.Dense(4, **F64)(embed(ids)))


IMAGE, SEQUENCE, VECTOR = (2, 8, 8, 4), (2, 5, 4), (3, 4)
KINDS = {
    "Dense": (nn.Dense(5, **F64), VECTOR),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1), **F64), SEQUENCE),
    "Einsum": (nn.Einsum((4, 2, 3), "btc,chd->bthd", **F64), SEQUENCE),
    "Conv": (nn.Conv(6, (3, 3), **F64), IMAGE),
    "Conv strided, VALID": (nn.Conv(6, (3, 3), (2, 2), padding="VALID", **F64), IMAGE),
    "Conv grouped": (nn.Conv(8, (3, 3), feature_group_count=4, **F64), IMAGE),
    "Conv depthwise": (nn.Conv(4, (5, 5), feature_group_count=4, **F64), IMAGE),
    "Conv dilated": (nn.Conv(6, (3, 3), kernel_dilation=2, **F64), IMAGE),
    "Conv of dilated input": (nn.Conv(6, (3, 3), input_dilation=2, padding=1, **F64), IMAGE),
    "Conv circular": (nn.Conv(6, (3, 3), padding="CIRCULAR", **F64), IMAGE),
    "Conv 1d": (nn.Conv(6, (3,), **F64), SEQUENCE),
    "ConvTranspose": (nn.ConvTranspose(6, (3, 3), (2, 2), **F64), IMAGE),
    "ConvLocal": (nn.ConvLocal(3, (3, 3), **F64), IMAGE),
    "WeightNorm": (nn.WeightNorm(nn.Dense(5, **F64)), VECTOR),
    "Keyword": (Keyword(), VECTOR),
    "Left": (Left(), VECTOR),
    "Shared": (Shared(), VECTOR),
    "remat": (Remat(), VECTOR),
    "scan": (Scanned(), VECTOR),
    "scan of one": (Scanned(shared=True), VECTOR),
    "cond": (Branches(), VECTOR),
    "cond of weights": (Switched(), VECTOR),
    "BatchNorm": (
        nn.Sequential([nn.Conv(6, (3, 3), use_bias=False, **F64), nn.BatchNorm(use_running_average=False, **F64)]),
        IMAGE,
    ),
    "GroupNorm and pooling": (
        nn.Sequential(
            [nn.Conv(6, (3, 3), **F64), nn.GroupNorm(3, **F64), nn.gelu, lambda x: nn.max_pool(x, (3, 3), (2, 2))]
        ),
        IMAGE,
    ),
    "PReLU": (nn.Sequential([nn.Dense(4, **F64), nn.PReLU(param_dtype=jnp.float64), nn.Dense(3, **F64)]), VECTOR),
    "attention": (Attention(), SEQUENCE),
    "LSTM": (nn.RNN(nn.LSTMCell(6, **F64)), SEQUENCE),
}
LINEAR = {
    "Dense": lambda: nn.Sequential([nn.Dense(6, **F64), nn.Dense(5, **F64)]),
    "Conv": lambda: nn.Sequential(
        [nn.Conv(3, (3, 3), (2, 2), **F64), nn.Conv(5, (3, 3), feature_group_count=1, **F64)]
    ),
    "scan": lambda: Scanned(linear=True),
    "ConvTranspose": lambda: nn.Sequential(
        [nn.ConvTranspose(3, (2, 2), (2, 2), **F64), nn.Einsum((3, 2), "bhwc,cd->bhwd", **F64)]
    ),
}


def function_and_params(module, shape, seed=0):
    """f(params, x), random parameters and an input."""
    x = jax.random.normal(jax.random.key(seed), shape)
    variables = module.init(jax.random.key(1), x)
    params = random_like(variables.pop("params"), 2)
    f = lambda params, x: module.apply({"params": params, **variables}, x, mutable=list(variables))[0]  # noqa: E731
    return f, params, x


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(key, leaf.shape) * 0.5 for key, leaf in zip(keys, leaves, strict=True)]
    )


def assert_close(ours, theirs, tolerance=1e-12):
    """Relative distance of all together: some gradients are zero up to rounding, such as a bias's below BatchNorm."""
    distance = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))
    size = sum(float(jnp.sum(b**2)) for b in jax.tree.leaves(theirs))
    assert distance**0.5 <= tolerance * size**0.5


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_at_equal_weights_it_is_vjp(kind):
    f, params, x = function_and_params(*KINDS[kind])
    g = jaxdtp.with_feedback(f)
    cotangent = jax.random.normal(jax.random.key(3), jax.eval_shape(f, params, x).shape)

    @jax.jit
    def both(params, x):
        y, pull_back = jax.vjp(f, params, x)
        ours, pull_back_ours = jax.vjp(lambda forward, x: g(forward, params, x), params, x)
        return (ours, y), (pull_back_ours(cotangent), pull_back(cotangent))

    values, gradients = both(params, x)
    np.testing.assert_allclose(*values, rtol=1e-14)
    assert_close(*gradients)


@pytest.mark.usefixtures("_float64")
def test_at_equal_weights_it_is_vjp_for_embeddings():
    ids = jnp.array([[0, 3, 6], [1, 1, 2]])
    module = Embedded()
    params = random_like(module.init(jax.random.key(0), ids)["params"], 1)
    f = lambda params, ids: module.apply({"params": params}, ids)  # noqa: E731
    loss = lambda f, *feedback: lambda params: jnp.sum(jnp.sin(f(params, *feedback, ids)))  # noqa: E731
    assert_close(jax.grad(loss(jaxdtp.with_feedback(f), params))(params), jax.grad(loss(f))(params))


@pytest.mark.usefixtures("_float64")
def test_at_equal_weights_it_is_vjp_for_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs, **F64)
            self.norm = nnx.BatchNorm(6, rngs=rngs, **F64)
            self.dense = nnx.Linear(6, 3, rngs=rngs, **F64)

        def __call__(self, x):
            return self.dense(nnx.silu(self.norm(self.conv(x))).mean((1, 2)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    f = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), IMAGE)
    g = jaxdtp.with_feedback(f)
    loss = lambda f, *feedback: lambda params, x: jnp.sum(jnp.sin(f(params, *feedback, x)))  # noqa: E731
    ours = jax.grad(lambda p, x: jnp.sum(jnp.sin(g(p, params, x))), (0, 1))(params, x)
    assert_close(ours, jax.grad(loss(f), (0, 1))(params, x))
    random = jaxdtp.init_feedback(f, params, x, jax.random.key(1))
    assert_close(jaxdtp.match_feedback(f, params, params, x, jax.random.key(2)), params)
    assert jax.tree.structure(random) == jax.tree.structure(params)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", LINEAR)
def test_no_forward_weight_is_used_on_the_way_down(kind):
    """In a network without nonlinearities the derivative along x doesn't depend on the forward kernels at all, and is
    that of the feedback kernels; the derivative along the parameters depends on forward kernels below alone."""
    shape = VECTOR if kind in ("Dense", "scan") else IMAGE
    f, params, x = function_and_params(LINEAR[kind](), shape)
    feedback, others = random_like(params, 5), random_like(params, 6)
    g = jaxdtp.with_feedback(f)

    def down(params):
        y, pull_back = jax.vjp(lambda x: g(params, feedback, x), x)
        return pull_back(jnp.ones_like(y))[0]

    np.testing.assert_array_equal(down(params), down(others))
    y, pull_back = jax.vjp(lambda x: f(feedback, x), x)
    assert_close(down(params), pull_back(jnp.ones_like(y))[0])


@pytest.mark.usefixtures("_float64")
def test_parameters_get_their_local_gradients():
    """Of two dense layers: the activity before, times the error that came through the feedback kernel."""
    x, error = jax.random.normal(jax.random.key(0), (5, 4)), jax.random.normal(jax.random.key(1), (5, 2))
    params = {
        "lower": jax.random.normal(jax.random.key(2), (4, 3)),
        "upper": jax.random.normal(jax.random.key(3), (3, 2)),
    }
    feedback = random_like(params, 4)
    g = jaxdtp.with_feedback(lambda params, x: jnp.tanh(x @ params["lower"]) @ params["upper"])
    hidden = jnp.tanh(x @ params["lower"])
    _, pull_back = jax.vjp(lambda params: g(params, feedback, x), params)
    (gradients,) = pull_back(error)
    np.testing.assert_allclose(gradients["upper"], hidden.T @ error, rtol=1e-12)
    below = (error @ feedback["upper"].T) * (1 - hidden**2)
    np.testing.assert_allclose(gradients["lower"], x.T @ below, rtol=1e-12)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_matching_finds_every_weight(kind):
    """Each step leaves what matches alone, and probes drive what doesn't to nothing: the weights as they come to their
    operations, since a normalised kernel has many parameters for one."""
    f, params, x = function_and_params(*KINDS[kind])
    _, weights_of = layers_of(f, params, x)
    feedback = jaxdtp.init_feedback(f, params, x, jax.random.key(7))
    steps = 600 if kind in ("DenseGeneral", "LSTM", "ConvLocal", "WeightNorm") else 150

    def step(index, feedback):
        return jaxdtp.match_feedback(f, params, feedback, x, jax.random.fold_in(jax.random.key(8), index))

    trained = jax.jit(lambda feedback: jax.lax.fori_loop(0, steps, step, feedback))(feedback)
    before, after, exact = map(weights_of, (feedback, trained, params))
    for a, b, c in zip(before, after, exact, strict=True):
        assert jnp.linalg.norm(b - c) < 0.05 * jnp.linalg.norm(a - c)
    still = jaxdtp.match_feedback(f, params, params, x, jax.random.key(9))
    chex.assert_trees_all_close(still, params, rtol=1e-12)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["Dense", "Left", "DenseGeneral", "Einsum", "Conv", "Conv grouped", "Conv 1d"])
def test_fan_in_is_how_many_weights_meet_in_a_unit(kind):
    """Which is what a unit becomes of weights and signals that are all 1, whatever number of examples there are."""
    f, params, x = function_and_params(*KINDS[kind])
    (layer,), _ = layers_of(f, params, x)
    shape = [7 if axis in layer.examples else size for axis, size in enumerate(layer.signal.shape)]
    units = layer.product(jnp.ones(shape), jnp.ones(layer.weight.shape))
    assert jnp.max(units) == layer.fan_in


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("shared", "shape"), [(False, (3, 4, 4)), (True, (4, 4))])
def test_a_loop_has_the_weights_of_all_its_steps(shared, shape):
    """Each step's own, or once the one of all."""
    f, params, x = function_and_params(Scanned(shared), VECTOR)
    (kernel,) = (leaf for leaf in jax.tree.leaves(params) if leaf.ndim == len(shape))
    _, weights_of = layers_of(f, params, x)
    (weight,) = weights_of(params)
    assert weight.shape == shape
    np.testing.assert_array_equal(weight, kernel)


@pytest.mark.usefixtures("_float64")
def test_all_parameters_of_a_weight_that_changes_in_a_loop_have_feedback():
    """V, U V, U^2 V; and V, U, W, W, which come to where V was one after the other."""

    def powers(params, x):
        step = lambda kernel, _: (params["u"] @ kernel, jnp.tanh(x @ kernel))  # noqa: E731
        return jax.lax.scan(step, params["v"], length=3)[1]

    def queue(params, x):
        step = lambda kernels, _: ((*kernels[1:], kernels[-1]), jnp.tanh(x @ kernels[0]))  # noqa: E731
        return jax.lax.scan(step, (params["v"], params["u"], params["w"]), length=4)[1]

    x, *kernels = (jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(0), 4))
    for f, names in ((powers, "uv"), (queue, "uvw")):
        params = dict(zip(names, kernels, strict=False))
        feedback = jaxdtp.init_feedback(f, params, x, jax.random.key(2))
        assert all(jnp.any(params[name] != feedback[name]) for name in names)


def test_feedback_parameters_start_random_or_equal():
    f, params, x = function_and_params(*KINDS["GroupNorm and pooling"])
    random = jaxdtp.init_feedback(f, params, x, jax.random.key(0))
    names = dict(zip(parameter_names(params), zip(*map(jax.tree.leaves, (params, random)), strict=True), strict=True))
    for name, (forward, feedback) in names.items():
        assert forward.shape == feedback.shape
        assert jnp.array_equal(forward, feedback) == (not name.endswith("kernel"))
    chex.assert_trees_all_equal(jaxdtp.init_feedback(f, params, x, jax.random.key(0), symmetric=True), params)
    for value in (0.0, 0.2):
        equal = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)  # noqa: B023
        # Of 216 weights the standard deviation is off by 5 %; the limit is seven times that.
        kernel = jaxdtp.init_feedback(f, equal, x, jax.random.key(0))["layers_0"]["kernel"]
        assert float(jnp.std(kernel)) == pytest.approx((3 * 3 * 4) ** -0.5, rel=0.35)


EXPERTS = {
    "taken": lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.argmax(x, axis=1) % 3]),
    "sliced": lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, jnp.argmax(x[0]) % 3, keepdims=False).T,
    "selected": lambda w, x: x @ jnp.where(x[0, 0] > 0, w[0], w[1]),
    "branch": lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda: w[0], lambda: w[1].T),
    "scaled": lambda w, x: jnp.einsum("bi,bio->bo", x, 0.5 * w[jnp.argmax(x, axis=1) % 3]),
    "normed": lambda w, x: jnp.einsum("bi,bio->bo", x, (k := w[jnp.argmax(x, axis=1) % 3]) / jnp.linalg.norm(k)),
    "turned": lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.flip(w[jnp.argmax(x, axis=1) % 3], 1)),
    "both": lambda w, x: jnp.einsum("bi,bkio->bo", x, w[jax.lax.top_k(x[:, :3], 2)[1]]),
    "summed": lambda w, x: jnp.einsum("bi,bio->bo", x, w[jax.lax.top_k(x[:, :3], 2)[1]].sum(1) + 1e-3),
    "remat": lambda w, x: jax.checkpoint(lambda x, k: jnp.einsum("bi,bio->bo", x, k))(x, w[jnp.argmax(x, axis=1) % 3]),
    "loop": lambda w, x: jax.lax.map(lambda pair: pair[0] @ pair[1], (x, w[jnp.argmax(x, axis=1) % 3])),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_kernels_that_the_input_chooses_are_named(kind):
    """They would have no feedback weights, and be used on the way down."""
    f, w, x = EXPERTS[kind], jnp.ones((3, 4, 4)), jnp.ones((5, 4))
    for derive in (lambda: jaxdtp.with_feedback(f)(w, w, x), lambda: layers_of(f, w, x)):
        with pytest.raises(ValueError, match="parameter params: the input chooses which, and meets it in a matrix pr"):
            derive()


def test_a_stack_of_no_layers_is_nothing():
    f = lambda w, x: jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), c), x @ w["in"], w["stack"])[0]  # noqa: E731
    w, x = {"in": jnp.ones((4, 6)), "stack": jnp.ones((0, 6, 6))}, jnp.ones((5, 4))
    feedback = jaxdtp.init_feedback(f, w, x, jax.random.key(0))
    np.testing.assert_allclose(jaxdtp.with_feedback(f)(w, feedback, x), x @ w["in"])
    assert jaxdtp.match_feedback(f, w, feedback, x, jax.random.key(1))["stack"].shape == (0, 6, 6)


def test_experts_whose_results_are_chosen_have_feedback():
    """As embeddings do, which meet other weights."""

    def f(params, ids):
        x = params["embedding"][ids]
        results = jnp.einsum("bi,eio->beo", x, params["experts"])
        return jnp.take_along_axis(results, (ids % 3)[:, None, None], axis=1)[:, 0]

    params = {"embedding": jnp.ones((7, 4)), "experts": jnp.ones((3, 4, 2))}
    layers, _ = layers_of(f, params, jnp.arange(5))
    assert [layer.weight.shape for layer in layers] == [(3, 4, 2)]
    zero = jax.tree.map(jnp.zeros_like, params)
    gradient = jax.grad(lambda params: jaxdtp.with_feedback(f)(params, zero, jnp.arange(5)).sum())(params)
    assert not gradient["embedding"].any()
    assert gradient["experts"].any()


def test_what_cannot_be_derived_is_named():
    @jax.custom_jvp
    def hidden(x, kernel):
        return x @ kernel

    hidden.defjvp(lambda primals, tangents: (hidden(*primals), tangents[0] @ primals[1]))
    params, x = {"deep": {"kernel": jnp.ones((4, 4))}}, jnp.ones((3, 4))
    for f, what in (
        (lambda params, x: hidden(x, params["deep"]["kernel"]), "matrix product inside custom_jvp_call"),
        (lambda params, x: jax.scipy.linalg.solve_triangular(params["deep"]["kernel"], x.T), "triangular_solve"),
    ):
        with pytest.raises(ValueError, match=rf"parameter deep\.kernel: meets the input in a? ?{what}"):
            jaxdtp.with_feedback(f)(params, params, x)
    with pytest.raises(ValueError, match=r"feedback parameter deep\.kernel: got \(4, 3\); allowed: \(4, 4\)"):
        jaxdtp.with_feedback(lambda params, x: x @ params["deep"]["kernel"])(
            params, {"deep": {"kernel": jnp.ones((4, 3))}}, x
        )
