"""Any model learns: the library's few lines on models of users, by every rule that means something for them."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jaxdtp
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.targets import cross_entropy
from jaxdtp.testing import assert_jacobian_matches_transpose, assert_updates_match_backprop

DIGITS = load_digits()
IMAGES = (DIGITS.images[..., None] / 16 - 0.3).astype(np.float32)
IDS, LABELS = DIGITS.images.reshape(-1, 64).astype(np.int32), DIGITS.target


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2, axis=(1, 2, 3))


MODELS = {
    "DenseNet": (models.DenseNet(), IMAGES, LABELS),
    "ConvNeXt": (models.ConvNeXt(), IMAGES, LABELS),
    "Mixer": (models.Mixer(), IMAGES, LABELS),
    "Encoder": (models.Encoder(), IDS, LABELS),
    "Shared": (models.Shared(), IMAGES, LABELS),
    "UNet": (models.UNet(), IMAGES, IMAGES[:, ::-1]),
    "Partitioned": (models.Partitioned(), IMAGES, LABELS),
    "NNX": (models.InNNX(nnx.Rngs(0)), IMAGES, LABELS),
    "pair": ((models.init, models.apply), IMAGES, LABELS),
    "blocks": (models.three_blocks(), IMAGES, LABELS),
}


def make(name, optimizer, rule, **settings):
    model, x, labels = MODELS[name]
    loss = {"loss": squared_error} if name == "UNet" else {}
    return jaxdtp.learner(model, optimizer, rule=rule, **loss, **settings), x, labels


@pytest.mark.parametrize("name", MODELS)
def test_fast_ldrl_learns_as_backprop_does(name):
    final = {}
    for rule in ("ldrl_fast", "bp"):
        schedule = optax.linear_schedule(0.0, 0.003, 40)
        learner, x, labels = make(name, optax.adam(schedule), rule)
        state = learner.init(jax.random.key(0), x[:32])
        losses = []
        for index in range(120):
            batch = slice(32 * (index % 40), 32 * (index % 40) + 32)
            state, metrics = learner.step(state, x[batch], labels[batch], jax.random.key(index))
            losses.append(float(metrics["loss"]))
        final[rule] = np.mean(losses[-10:])
        assert learner.predict(state, x[:7]).shape[0] == 7
    assert final["bp"] < losses[0]
    # Where BP has come, within 15 % of the way (the first steps go in directions of their own).
    assert final["ldrl_fast"] < final["bp"] + 0.15 * (losses[0] - final["bp"])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "Partitioned"])
def test_at_equal_weights_the_update_is_backprops(name):
    steps = {}
    for rule in ("ldrl_fast", "bp"):
        learner, x, labels = make(name, optax.sgd(1.0), rule, symmetric=True)
        x = jnp.asarray(x[:8], None if name == "Encoder" else float)
        state = learner.init(jax.random.key(0), x)
        new, _ = learner.step(state, x, labels[:8], jax.random.key(1))
        steps[rule] = jax.tree.map(jnp.subtract, new.forward, state.forward)
    for ours, theirs in zip(*map(jax.tree.leaves, steps.values()), strict=True):
        size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(steps["bp"]))
        np.testing.assert_allclose(ours, theirs, atol=1e-12 * size)


@pytest.mark.parametrize("rule", jaxdtp.ALGORITHMS)
def test_every_rule_trains_blocks_of_modules(rule):
    """Derived feedback, and a module of its own for one block."""
    blocks = [models.Lower(), jaxdtp.OwnFeedback(models.Middle(), models.MirroredMiddle()), nn.Dense(10)]
    learner = jaxdtp.learner(blocks, optax.sgd(0.02), rule=rule, noise_scale=0.1)
    state, losses = learner.init(jax.random.key(0), IMAGES[:64]), []
    for index in range(20):
        state, metrics = learner.step(state, IMAGES[:64], LABELS[:64], jax.random.key(index))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    # These two feed back something else than a direction of descent, at least at first.
    assert losses[-1] < losses[0] or rule in ("tp", "inverse_output")


def test_steps_of_layers_go_all_the_way_but_the_mirrors():
    """Without a rate: to the forward weights at once, and by a twentieth where feedback weights are averages."""
    x, labels = IMAGES[:32], LABELS[:32]

    def feedback(rule, **settings):
        learner = jaxdtp.learner((models.init, models.apply), optax.sgd(0.0), rule=rule, **settings)
        state = learner.init(jax.random.key(0), x)
        new, _ = learner.step(state, x, labels, jax.random.key(1))
        return jax.tree.leaves(state.forward), jax.tree.leaves(state.feedback), jax.tree.leaves(new.feedback)

    for forward, _, after in zip(*feedback("jml"), strict=True):
        np.testing.assert_allclose(after, forward, rtol=1e-5, atol=1e-7)
    _, _, whole = feedback("weight_mirror", feedback_rate=1.0)
    _, before, after = feedback("weight_mirror")
    for start, end, found in zip(before, whole, after, strict=True):
        np.testing.assert_allclose(found, 0.95 * start + 0.05 * end, rtol=1e-4, atol=1e-6)


def test_a_share_below_one_example_is_the_first_example():
    learner = jaxdtp.learner(models.three_blocks(), optax.sgd(0.1), rule="ldrl", batch_share=0.01)
    state = learner.init(jax.random.key(0), IMAGES[:8])
    batches = IMAGES[:8], IMAGES[[0, *range(8, 15)]]
    one, other = (learner.step(state, x, LABELS[:8], jax.random.key(1))[0].feedback for x in batches)
    for ours, theirs in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_finite_noise_ldrl_aligns_derived_feedback():
    """L-DRL turns the derived feedback of a residual block with LayerNorm towards its transposed Jacobian."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(12)(nn.elu(nn.Dense(24)(nn.LayerNorm()(x))))

    learner = jaxdtp.learner(
        [nn.Dense(12), Block(), nn.Dense(4)],
        optax.sgd(0.0),
        rule="ldrl",
        iterations=200,
        noise_scale=0.1,
        feedback_optimizer=optax.adam(3e-3),
    )
    x = jax.random.normal(jax.random.key(0), (64, 6))
    state = learner.init(jax.random.key(1), x)
    block = learner.network(x)[1]
    hidden = x @ state.forward["Dense_0"]["kernel"] + state.forward["Dense_0"]["bias"]

    def angle(state):
        found = jaxdtp.jacobian_matching(
            block, state.forward[block.name], state.feedback[block.name], hidden, jax.random.key(2)
        )[1]
        return float(found.value)

    before = angle(state)
    for index in range(4):
        state, _ = learner.step(state, x, jnp.arange(64) % 4, jax.random.key(index))
    assert angle(state) < 0.5 * before


def test_batch_statistics_are_the_last_clean_pass_and_used_in_evaluation():
    learner, x, labels = make("DenseNet", optax.sgd(0.0), "ldrl_fast")
    state = learner.init(jax.random.key(0), x[:32])
    new, _ = learner.step(state, x[:32], labels[:32], jax.random.key(1))
    module, params = models.DenseNet(), state.forward["DenseNet"]
    variables = {"params": params, **state.model["DenseNet"]}
    _, after = module.apply(variables, x[:32], train=True, mutable=["batch_stats"])
    for ours, theirs in zip(*map(jax.tree.leaves, (new.model["DenseNet"], dict(after))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = module.apply({"params": params, **new.model["DenseNet"]}, x[:32], train=False)
    np.testing.assert_allclose(learner.predict(new, x[:32]), expected, rtol=1e-4, atol=1e-5)


class Norm(nn.Module):
    """Is told by a field whether it is in training."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=not self.train)(x)


@pytest.mark.parametrize("norm", [Norm(), nn.BatchNorm(), nn.BatchNorm(use_running_average=False)])
def test_modules_are_told_by_fields_too(norm):
    learner = jaxdtp.learner([nn.Dense(6), norm, nn.Dense(4)], optax.sgd(0.1))
    x = 3 + jax.random.normal(jax.random.key(0), (32, 5))
    state = learner.init(jax.random.key(1), x)
    for index in range(300):
        state, _ = learner.step(state, x, jnp.arange(32) % 4, jax.random.key(index))
    in_training = learner.step(state, x, jnp.arange(32) % 4, jax.random.key(0))[1]["loss"]
    in_evaluation = jnp.mean(cross_entropy(learner.predict(state, x), jnp.arange(32) % 4))
    np.testing.assert_allclose(in_evaluation, in_training, rtol=0.05)
    alone = learner.predict(state, x[:1])  # batch statistics of one example would leave nothing of it
    np.testing.assert_allclose(alone, learner.predict(state, x)[:1], atol=1e-5)


@pytest.mark.usefixtures("_float64")
def test_assertions_take_modules():
    module, x = models.Shared(), jax.random.normal(jax.random.key(0), (6, 5))
    f = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    params = module.init(jax.random.key(1), x)["params"]
    equal = jaxdtp.init_feedback(f, params, x, jax.random.key(2), symmetric=True)
    other = jaxdtp.init_feedback(f, params, x, jax.random.key(2))
    labels = jnp.arange(6)
    assert_jacobian_matches_transpose(module, (params, equal), x, max_degrees=1e-6, max_relative_error=1e-8)
    assert_updates_match_backprop(module, (params, equal), (x, labels), max_degrees=1e-6, max_relative_error=1e-8)
    with pytest.raises(AssertionError, match="block Shared: the angle between J_G and J_F"):
        assert_jacobian_matches_transpose(module, (params, other), x, max_degrees=1)
    with pytest.raises(AssertionError, match=r"block Shared, Dense_1\.kernel: angle of update"):
        assert_updates_match_backprop(module, (params, other), (x, labels), max_degrees=1)


class Wrong(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "two outputs":
            return x, x
        if self.kind == "no batch":
            return jnp.ones(3)
        if self.kind == "noisy":
            return x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.5)(x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Wrong("two outputs"), "module Wrong: gives a tuple"),
        (Wrong("no batch"), r"module Wrong: gives shape \(3,\)"),
        (Wrong("undecided"), "module Wrong: can't be called"),
        (Wrong("noisy"), r"module Wrong: can't be called with an input of shape \(2, 8, 8, 1\) in evaluation"),
        ([nn.Dense(3), nn.Conv(2, (9, 9, 9, 9))], "module Conv_1: can't be called with an input of shape"),
        ("model", "model model: got a str; allowed: a Flax module"),
        (jaxdtp.OwnFeedback(models.Middle(), nn.Dense(3)), r"its feedback Dense gives shape .*allowed: \(2, 8, 8, 1\)"),
        (jaxdtp.OwnFeedback(nn.Dense(3), nn.BatchNorm()), "its feedback BatchNorm can't be called with an output of"),
        ((nn.Dense(3), nn.Dense(2)), "model model: got a tuple; allowed: .* or a list of these"),
        ([], "model: got blocks named nothing"),
        (
            (lambda key, x: {"order": jnp.arange(3), "kernel": jnp.ones((64, 3))}, models.apply),
            "module model: its parameter order is int32; allowed: floating point or complex",
        ),
    ],
)
def test_bad_models_are_named(model, words):
    with pytest.raises(ValueError, match=words) as error:
        jaxdtp.learner(model, optax.sgd(0.1)).init(jax.random.key(0), IMAGES[:2])
    assert "\n" not in str(error.value)


def test_pairs_may_have_arguments_of_their_own():
    apply = lambda params, x, train=True: models.apply(params, x)  # noqa: E731
    learner = jaxdtp.learner((models.init, apply), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), IMAGES[:4])
    learner.step(state, IMAGES[:4], LABELS[:4], jax.random.key(1))


def split_up(key, x):
    """As people write it by hand: a part of the key is split for the weights."""
    _, key = jax.random.split(key)
    return [jax.random.normal(own, (64, 64)) / 8 for own in jax.random.split(key, 3)]


def tanh_layers(params, x):
    for kernel in params:
        x = jnp.tanh(x.reshape(len(x), -1) @ kernel)
    return x


@pytest.mark.parametrize("rule", ["fa", "kp", "dtp_fixed", "ddtp_linear"])
def test_random_feedback_has_nothing_of_the_forward_weights(rule):
    """However a model makes its numbers. Any two of these matrices of 64 x 64 would be closer than 85 degrees to each
    other or their opposite, if they were random, with a probability below 1e-5."""
    pair = (split_up, tanh_layers)
    learner = jaxdtp.learner([pair, pair] if rule in ("dtp_fixed", "ddtp_linear") else pair, optax.sgd(0.1), rule=rule)
    for seed in range(3):
        state = learner.init(jax.random.key(seed), IMAGES[:4])
        kernels = [leaf for leaf in jax.tree.leaves(state.feedback) if leaf.ndim == 2]
        assert kernels
        for ours in kernels:
            for theirs in jax.tree.leaves(state.forward):
                cosine = jnp.vdot(ours, theirs) / (jnp.linalg.norm(ours) * jnp.linalg.norm(theirs))
                assert abs(cosine) < 0.0872


def test_zeros_are_taken_as_they_are_or_refused():
    """A feedback rate of 0 is the control experiment in which feedback is frozen."""
    for rule in ("ldrl", "ldrl_layers"):
        learner = jaxdtp.learner(MODELS["blocks"][0], optax.sgd(0.1), rule=rule, feedback_rate=0.0)
        state = learner.init(jax.random.key(0), IMAGES[:4])
        new, _ = learner.step(state, IMAGES[:4], LABELS[:4], jax.random.key(1))
        chex.assert_trees_all_equal(new.feedback, state.feedback)
    for name, value, words in (
        ("iterations", 0, "whole numbers from 1"),
        ("iterations", (1, 0), "whole numbers from 1"),
        ("noise_samples", 0, "whole numbers from 1"),
        ("batch_share", 0.0, "above 0, up to 1"),
        ("batch_share", 1.5, "above 0, up to 1"),
        ("iterations", 2.5, "whole numbers from 1"),
        ("iterations", float("inf"), "whole numbers from 1"),
        ("iterations", "5", "whole numbers from 1"),
        ("noise_scale", -1, "finite numbers from 0"),
        ("feedback_rate", float("nan"), "finite numbers from 0"),
        ("beta", 0, "finite numbers above 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: got ") + f".*; allowed: {words}"):
            jaxdtp.learner(MODELS["blocks"][0], optax.sgd(0.1), rule="ldrl", **{name: value})


def test_whole_numbers_may_be_written_as_others_and_tuples_as_lists():
    learner = jaxdtp.learner(models.three_blocks(), optax.sgd(0.1), rule="ldrl", iterations=[2.0, 1], noise_samples=2.0)
    state = learner.init(jax.random.key(0), IMAGES[:4])
    learner.step(state, IMAGES[:4], LABELS[:4], jax.random.key(1))
    with pytest.raises(ValueError, match="optimizer: got a NoneType; allowed: an Optax transformation"):
        jaxdtp.learner(nn.Dense(10), None)
    with pytest.raises(ValueError, match=r"rule: got \['bp'\]; allowed: "):
        jaxdtp.learner(nn.Dense(10), optax.sgd(0.1), ["bp"])


@pytest.mark.parametrize("x", [{"image": IMAGES}, [1.0, 2.0], np.float32(1), IMAGES[:0]])
def test_inputs_are_one_array_of_examples(x):
    learner = jaxdtp.learner(nn.Dense(10), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"x: got .*; allowed: an array \[batch, ...\] of one example or more"):
        learner.init(jax.random.key(0), x)


class Noisy(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(12)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))


@pytest.mark.parametrize("rule", ["ldrl", "dtpdrl", "ddtp_linear"])
@pytest.mark.parametrize(("share", "samples"), [(0.5, 1), (1.0, 2)])
def test_noisy_and_clean_passes_are_of_one_function(monkeypatch, rule, share, samples):
    """Whatever examples take part: with noise 0 the noisy pass is the clean one."""
    settings = {"batch_share": share, "noise_samples": samples, "iterations": 1}
    learner = jaxdtp.learner([Noisy(), Noisy(), Noisy(), nn.Dense(10)], optax.sgd(0.1), rule=rule, **settings)
    state = learner.init(jax.random.key(0), IMAGES[:8])

    def distance(block, params, forward, clean, noise):
        y, _, _ = forward(clean.input)
        return jnp.linalg.norm(y - clean.output) / jnp.linalg.norm(clean.output), jax.tree.map(jnp.zeros_like, params)

    watching = ALGORITHMS[rule]._replace(feedback_rule=distance)
    monkeypatch.setitem(ALGORITHMS, rule, watching)
    learner = jaxdtp.learner([Noisy(), Noisy(), Noisy(), nn.Dense(10)], optax.sgd(0.1), rule=rule, **settings)
    _, metrics = learner.step(state, IMAGES[:8], LABELS[:8], jax.random.key(1))
    assert max(metrics["feedback_loss"].values()) < 1e-5


def test_parameters_of_any_form():
    """Of functions: arrays, lists and dictionaries, also by rules that begin with the forward weights."""
    x, labels = IMAGES[:8].reshape(8, -1), LABELS[:8]
    kernel = jax.random.normal(jax.random.key(0), (64, 10)) / 8
    for params, apply in (
        (kernel, lambda params, x: x @ params),
        ([kernel], lambda params, x: x @ params[0]),
        ([kernel, jnp.zeros(10)], lambda params, x: x @ params[0] + params[1]),
        ({"model": kernel}, lambda params, x: x @ params["model"]),
    ):
        pair = (lambda key, x, params=params: params, apply)
        found = jaxdtp.alignment.updates_and_gradients(pair, None, params, params, x, labels, 1.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
    first = (lambda key, x: jax.random.normal(key, (64, 12)) / 8, lambda params, x: jnp.tanh(x @ params))
    last = (lambda key, x: jax.random.normal(key, (12, 10)) / 3, lambda params, x: x @ params)
    learner = jaxdtp.learner([first, last], optax.sgd(0.1), rule="dtp", symmetric=True)
    state = learner.init(jax.random.key(0), x)
    np.testing.assert_array_equal(state.feedback["model_1"], state.forward["model_1"])


def test_a_state_that_is_donated_takes_nothing_from_an_nnx_module():
    model = models.InNNX(nnx.Rngs(0))
    learner = jaxdtp.learner(model, optax.sgd(0.1))
    state = learner.init(jax.random.key(0), IMAGES[:4])
    jax.jit(learner.step, donate_argnums=0)(state, IMAGES[:4], LABELS[:4], jax.random.key(1))
    assert jnp.isfinite(model(IMAGES[:4])).all()
    learner.init(jax.random.key(0), IMAGES[:4])


def test_an_nnx_module_is_measured_as_it_is():
    """Its state may have changed since the last time."""
    model = models.InNNX(nnx.Rngs(0))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)

    def measure():
        found = jaxdtp.alignment.updates_and_gradients(model, None, params, params, IMAGES[:8], LABELS[:8], 1.0)
        return found[1]

    before = measure()
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.BatchStat):
            variable[...] = variable[...] + 3.0
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), before, measure())))


def test_bad_rules_are_named():
    with pytest.raises(ValueError, match="rule: got 'magic'; allowed: ldrl, "):
        jaxdtp.learner(models.Shared(), optax.sgd(0.1), rule="magic")
    with pytest.raises(ValueError, match="rule: got 'ldrl', which feeds targets from block to block"):
        jaxdtp.learner(models.Shared(), optax.sgd(0.1), rule="ldrl").init(jax.random.key(0), IMAGES[:2])


MASK = lambda tree: {"Sequential": {name: name == "layers_0" for name in tree["Sequential"]}}  # noqa: E731
OPTIMIZERS = {
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "freeze": optax.chain(optax.adamw(1e-2), optax.freeze(MASK)),
    "accumulate": optax.MultiSteps(optax.adam(1e-2), 2),
    "read": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.0, 0.1, 10)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["ldrl_fast", "bp"])
def test_any_transformation_of_optax(name, rule):
    model, x = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(10)]), IMAGES[:16].reshape(16, -1)
    learner = jaxdtp.learner(model, OPTIMIZERS[name], rule=rule)
    start = state = learner.init(jax.random.key(0), x)
    for key in jax.random.split(jax.random.key(1), 4):
        state, _ = learner.step(state, x, LABELS[:16], key)
    for layer in ("layers_0", "layers_2"):
        before, after = (tree.forward["Sequential"][layer]["kernel"] for tree in (start, state))
        assert bool((before == after).all()) == (name == "freeze" and layer == "layers_0")
    if name == "read":
        assert float(state.forward_optimizer.hyperparams["learning_rate"]) == pytest.approx(0.03)


WEIGHTS = jnp.linspace(0.5, 1.5, 10)
LOSSES = {
    "regression": (lambda outputs, y: (outputs[:, 0] - y) ** 2, lambda y: y / 10),
    "weights": (
        lambda outputs, y: WEIGHTS[y] * optax.softmax_cross_entropy_with_integer_labels(outputs, y),
        lambda y: y,
    ),
    "several labels": (
        lambda outputs, y: optax.sigmoid_binary_cross_entropy(outputs, y).mean(-1),
        lambda y: jnp.stack([y % 2, y // 5], -1),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(name):
    loss, labels_of = LOSSES[name]
    x, labels = IMAGES[:64].reshape(64, -1), labels_of(LABELS[:64])
    outputs = {"regression": 1, "weights": 10, "several labels": 2}[name]
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(outputs)])
    learner = jaxdtp.learner(model, optax.adam(1e-2), loss=loss)
    state, losses = learner.init(jax.random.key(0), x), []
    for key in jax.random.split(jax.random.key(1), 60):
        state, metrics = learner.step(state, x, labels, key)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2


def test_values_that_fit_no_block_are_named():
    with pytest.raises(
        ValueError, match=r"iterations: got \(2, 1\); allowed: one number, ldrl_fast trains the feedback"
    ):
        jaxdtp.learner(models.Shared(), optax.sgd(0.1), iterations=(2, 1))
    dense = [nn.Dense(6), nn.Dense(5), nn.Dense(4)]
    learner = jaxdtp.learner(dense, optax.sgd(0.1), rule="ldrl", noise_scale=(0.1,) * 3)
    with pytest.raises(
        ValueError, match=r"noise_scale: got .*; allowed: one number, or 2, for the blocks Dense_1, Dense_2"
    ):
        learner.init(jax.random.key(0), IMAGES[:2].reshape(2, -1))


@pytest.mark.parametrize("rule", ["dfa", "ddtp_rhl"])
def test_direct_feedback_wants_an_output_of_one_axis(rule):
    learner = jaxdtp.learner([nn.Dense(6), nn.Dense(5)], optax.sgd(0.1), rule=rule)
    with pytest.raises(ValueError, match=r"block Dense_1: gives \(3, 5\); allowed: one axis, for direct feedback"):
        learner.init(jax.random.key(0), jnp.zeros((2, 3, 4)))


def test_alignment_of_a_learners_blocks_and_of_its_model():
    """The same, with the batch statistics of training."""
    x, labels = IMAGES[:8], LABELS[:8]
    learner = jaxdtp.learner(models.DenseNet(), optax.sgd(0.1))
    state, _ = learner.step(learner.init(jax.random.key(0), x), x, labels, jax.random.key(1))
    params, statistics = (state.forward, state.feedback), state.model
    network, alone = learner.network(x), [tree["DenseNet"] for tree in (*params, statistics)]
    found = [
        jaxdtp.gradient_matching(network, None, *params, x, labels, 1.0, state=statistics),
        jaxdtp.gradient_matching(models.DenseNet(), None, *alone[:2], x, labels, 1.0, state=alone[2]),
    ]
    chex.assert_trees_all_close(*found, rtol=1e-5)
    key = jax.random.key(2)
    found = [
        jaxdtp.jacobian_matching(model, *alone[:2], x, key, state=of_model)
        for model, of_model in ((network[0], statistics), (models.DenseNet(), alone[2]))
    ]
    chex.assert_trees_all_close(*found, rtol=1e-5)
    with pytest.raises(ValueError, match="state of block DenseNet: got none; allowed: its collections batch_stats"):
        jaxdtp.gradient_matching(network, None, *params, x, labels, 1.0)


BATCHES = [
    (
        IMAGES[:4],
        LABELS[:3],
        r"labels: got int.. of shape \(3,\); allowed: integers of shape \(4,\), a class for each out",
    ),
    (IMAGES[:4], LABELS[:1], r"labels: got int.. of shape \(1,\); allowed: integers of shape \(4,\)"),
    (IMAGES[:4], LABELS[:4].astype(np.float32), "labels: got float32 of shape"),
    (IMAGES[:4], LABELS[:4].tolist(), "labels: got a list; allowed: an array of integers"),
    (IMAGES[:4], np.array([0, 1, 2, 10]), "labels: got 10; allowed: 0 to 9, the classes of block "),
    (IMAGES[:4], jnp.array([0, -1, 2, 3]), "labels: got -1; allowed: 0 to 9, the classes of block "),
]


@pytest.mark.parametrize(("x", "labels", "words"), BATCHES)
def test_labels_that_fit_nothing_are_named(x, labels, words):
    learner = jaxdtp.learner(models.Shared(), optax.sgd(0.1))
    state = learner.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=words):
        learner.step(state, x, labels, jax.random.key(1))


@pytest.mark.parametrize(
    ("x", "labels", "words"), [*BATCHES, (IMAGES[:4, :7], LABELS[:4], r"images: got shape \(4, 7, ")]
)
def test_a_batch_that_does_not_fit_is_named(x, labels, words):
    network = jaxdtp.mlp((8, 8, 1), 10, hidden=(6,))
    settings = jaxdtp.Settings(jaxdtp.ALGORITHMS["bp"], (), 1.0, optax.sgd(0.1))
    state = jaxdtp.init_state(network, settings, jax.random.key(0))
    with pytest.raises(ValueError, match=words):
        jaxdtp.train_step(network, settings, state, x, labels, jax.random.key(1))
