"""One L-DRL step of the published residual networks, from the vectors of `resnet/`, in our layout."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdtp
from jaxdtp.alignment import angle_degrees, jacobian_matching, match, relative_distance
from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.feedback import Noise, feedback_update
from jaxdtp.learning.step import backprop_gradients
from jaxdtp.learning.targets import local_gradients, output_target, propagate_targets
from jaxdtp.models import networks
from jaxdtp.models.residual import residual

DIRECTORY = Path(os.environ.get("JAXDTP_PARITY_DIR") or Path(__file__).parent / "data") / "resnet"
FILES = sorted(DIRECTORY.glob("*.npz"))

pytestmark = pytest.mark.usefixtures("_float64")


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1) if array.ndim == 4 else array)


def to_ours(name, array, feedback):
    """A published array in our layout, and where it stands: ('layer_1', 'block_0', 'conv1', 'kernel')."""
    unit, *inner, last = name.split(".")
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif unit == "fc" and last == "weight" and not feedback:
        array = array.T
    inner = [f"block_{part}" if part.isdecimal() else part for part in inner]
    # A projection is 'shortcut.conv', the classifier 'linear'.
    inner = [part for part in inner if part != "linear" and not (part == "conv" and "shortcut" in inner)]
    return (unit, *inner, "bias" if last == "bias" else "kernel"), jnp.asarray(array)


class Vectors:
    def __init__(self, path):
        self.arrays = np.load(path)
        kernel = lambda name: self.arrays[f"forward_before/{name}.weight"]  # noqa: E731
        blocks = tuple(int(count) for count in self["hp/num_blocks"])
        channels = tuple(kernel(f"layer_{index + 1}.0.conv1").shape[0] for index in range(len(blocks)))
        stem, classes = kernel("layer_0.conv").shape[0], kernel("fc.linear").shape[0]
        self.images, self.labels = channels_last(self["x"]), self["labels"]
        self.network = residual(self.images.shape[1:], classes, blocks=blocks, channels=channels, stem=stem)

    def __getitem__(self, key):
        return self.arrays[key]

    def tree(self, group):
        """Parameters, or gradients, by our names."""
        tree = {}
        for key in self.arrays.files:
            if key.startswith(f"{group}/"):
                path, array = to_ours(key.removeprefix(f"{group}/"), self[key], group.startswith("feedback"))
                functools.reduce(lambda node, part: node.setdefault(part, {}), path[:-1], tree)[path[-1]] = array
        return tree

    def noise(self, name, iteration):
        return Noise(*(channels_last(self[f"noise/{name}/{iteration}/{end}"]) for end in ("input", "output")))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def vectors(request):
    return Vectors(request.param)


def assert_close(ours, published, scale=None):
    assert jax.tree.structure(ours) == jax.tree.structure(published)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(published), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 1e-6 * (scale or np.linalg.norm(b))


def trained_feedback(vectors):
    """Feedback parameters after the vectors' iterations; checks losses and first gradients on the way."""
    forward, feedback = vectors.tree("forward_before"), vectors.tree("feedback_before")
    passes = networks.forward_passes(vectors.network, forward, vectors.images)
    published, after = vectors.tree("feedback_grad_first"), {}
    rule = ALGORITHMS["ldrl"].feedback_rule
    for index, (block, clean) in enumerate(zip(vectors.network[1:], passes[1:], strict=True)):
        name, params = block.name, feedback[block.name]
        own_forward = functools.partial(block.forward, forward[name])
        _, gradient = rule(block, params, own_forward, clean, vectors.noise(name, 0))
        bias = gradient.pop("bias", None), published[name].pop("bias", None)
        assert_close(gradient, published[name])
        if name == "fc":  # the bias cancels from L-DRL: rounding noise around 0
            assert_close(*bias, scale=np.linalg.norm(published[name]["kernel"]))
        optimizer = optax.sgd(float(vectors["hp/feedback_lr"][index]), momentum=float(vectors["hp/momentum"]))
        state, losses, logged = optimizer.init(params), [], []
        update = jax.jit(
            lambda p, s, noise, b=block, o=optimizer, f=own_forward, c=clean: feedback_update(
                rule, o, b, p, s, f, c, noise
            )
        )
        for iteration in range(vectors["hp/feedback_iterations"][index]):
            if name == "fc":  # of a stage the published code logs 0
                kernels = params["kernel"].ravel(), forward[name]["kernel"].ravel()
                logged.append([relative_distance(*kernels), angle_degrees(*kernels)])
            params, state, loss = update(params, state, vectors.noise(name, iteration))
            losses.append(loss)
        assert_close(np.array(losses), vectors[f"feedback_losses/{name}"])
        if name == "fc":
            np.testing.assert_allclose(logged, vectors[f"published_metric/{name}"], rtol=1e-6)
        after[name] = params
    return forward, passes, after


def test_forward_passes_and_backprop_gradients(vectors):
    forward = vectors.tree("forward_before")
    for block, clean in zip(
        vectors.network, networks.forward_passes(vectors.network, forward, vectors.images), strict=True
    ):
        assert_close(clean.output, channels_last(vectors[f"activation/{block.name}"]))
    gradients = backprop_gradients(vectors.network, forward, vectors.images, vectors.labels)
    assert_close(gradients, vectors.tree("backprop_grad"))


def test_feedback_training_targets_and_the_forward_step(vectors):
    forward, passes, feedback = trained_feedback(vectors)
    published = vectors.tree("feedback_after")
    assert_close(feedback, {name: published[name] for name in feedback})
    for key in vectors.arrays.files:
        group, _, name = key.partition("/")
        if group in ("angle_degrees", "distance"):
            path, _ = to_ours(f"{name}.linear.weight" if name == "fc" else f"{name}.weight", np.zeros(()), True)
            pair = [functools.reduce(dict.__getitem__, path, tree).ravel() for tree in (feedback, forward)]
            measure = angle_degrees if group == "angle_degrees" else relative_distance
            # The published code moves the cosine by 1e-8 to stay clear of arccos(1).
            np.testing.assert_allclose(measure(*pair), vectors[key], rtol=1e-6, atol=1e-5 if "angle" in group else 0)

    target = output_target(passes[-1].output, vectors.labels, float(vectors["hp/beta"]))
    ways = paths.bind(paths.consecutive(vectors.network), vectors.network, forward)
    targets, _ = propagate_targets(ALGORITHMS["ldrl"].target_rule, ways, forward, feedback, passes, target)
    for block, of_block in zip(vectors.network, targets, strict=True):
        assert_close(of_block, channels_last(vectors[f"target/{block.name}"]))
    losses = [np.sum((clean.output - t) ** 2) / 2 / len(t) for clean, t in zip(passes, targets, strict=True)]
    assert_close(np.array(losses), vectors["forward_layer_losses"])
    gradients = local_gradients(vectors.network, forward, passes, targets)
    assert_close(gradients, vectors.tree("forward_grad"))

    exact = vectors.tree("backprop_grad")
    for key in vectors.arrays.files:
        group, _, name = key.partition("/")
        if group in ("update_angle_degrees", "update_distance"):
            path, _ = to_ours(name, np.zeros(()), False)
            update, reference = (functools.reduce(dict.__getitem__, path, tree) for tree in (gradients, exact))
            found = match(update / float(vectors["hp/beta"]), reference)
            if group == "update_distance":  # the published one is relative to the update, ours to the gradient
                np.testing.assert_allclose(found.distance / found.ratio, vectors[key], rtol=1e-6, atol=1e-12)
            else:  # the published code adds 1e-8 to the product of the norms
                norms = found.ratio * jnp.sum(reference**2)
                angle = jnp.degrees(jnp.arccos(found.cosine * norms / (norms + 1e-8)))
                # Of the classifier they are rounding noise: arccos near 1.
                np.testing.assert_allclose(angle, vectors[key], rtol=1e-6, atol=1e-6 if name.startswith("fc") else 0)

    optimizer = optax.chain(
        optax.add_decayed_weights(float(vectors["hp/weight_decay"])),
        optax.sgd(float(vectors["hp/forward_lr"]), momentum=float(vectors["hp/momentum"])),
    )
    updates, _ = optimizer.update(gradients, optimizer.init(forward), forward)
    assert_close(optax.apply_updates(forward, updates), vectors.tree("forward_after"))


def test_a_symmetric_start_copies_every_kernel():
    network = residual((8, 8, 3), 10, blocks=(1, 2), channels=(4, 6), stem=4)
    forward, _ = networks.init(network, jax.random.key(0))
    feedback = paths.init(paths.consecutive(network), jax.random.key(0), like=forward)

    def kernels(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if path[-1].key == "kernel"}

    copied, started_from = kernels(feedback), kernels({name: forward[name] for name in feedback})
    assert len(copied) == 8  # two of each block, a projection and the classifier
    assert copied.keys() == started_from.keys()
    for name, kernel in copied.items():
        np.testing.assert_array_equal(kernel, started_from[name])


def test_tied_weights_give_the_transposed_jacobian_of_the_stem_alone():
    """As published: the inner masks of a mirrored stage are its own; and the classifier's copy doesn't divide."""
    network = residual((8, 8, 3), 10, blocks=(1, 1), channels=(4, 6), stem=4)
    forward, _ = networks.init(network, jax.random.key(0))
    feedback = paths.init(paths.consecutive(network), jax.random.key(0), like=forward) | {
        "layer_0": {"conv": forward["layer_0"]["conv"]}
    }
    passes = networks.forward_passes(network, forward, jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
    angles = {
        block.name: float(
            jacobian_matching(block, forward[block.name], feedback[block.name], clean.input, jax.random.key(2))[1].value
        )
        for block, clean in zip(network, passes, strict=True)
    }
    assert angles["layer_0"] < 1e-5
    assert angles["fc"] < 1e-5
    assert min(angles["layer_1"], angles["layer_2"]) > 5


@pytest.mark.parametrize("rule", ["ldrl", "ldrl_fast"])
def test_it_trains(rule):
    network = residual((8, 8, 1), 10, blocks=(1, 1), channels=(4, 6), stem=4)
    learner = jaxdtp.learner(network, optax.sgd(0.01), rule=rule, iterations=2)
    x, labels = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), jnp.arange(8)
    state = learner.init(jax.random.key(1), x)
    for index in range(3):
        state, metrics = learner.step(state, x, labels, jax.random.key(index))
    assert np.isfinite(metrics["loss"])


def test_sizes_that_cannot_be_halved_are_named():
    with pytest.raises(ValueError, match=r"input_shape: got \(9, 8, 1\); allowed: height and width divisible by 2"):
        residual((9, 8, 1), 10, blocks=(1, 1), channels=(4, 6))


def test_vectors_are_there():
    assert FILES
