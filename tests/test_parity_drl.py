"""The rules of Meulemans et al. 2020 against what their published code computed, in float64, to 1e-8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_drl import FILES, Vectors

from jaxdtp.learning import feedback as feedback_module
from jaxdtp.learning.paths import along_paths, bind
from jaxdtp.learning.step import all_targets, backprop_gradients, train_step
from jaxdtp.learning.targets import local_gradients
from jaxdtp.models import networks

pytestmark = pytest.mark.usefixtures("_float64")

WITH_FEEDBACK = [path for path in FILES if not path.stem.startswith("BP")]
TRAINED = [path for path in WITH_FEEDBACK if not path.stem.startswith("DFA")]


def assert_close(ours, published, scale=None):
    """|ours - published| <= 1e-8 |published|, array by array; `scale` stands for |published| where it cancels to 0."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(published), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float64
        assert np.linalg.norm(a - b) <= 1e-8 * (scale or np.linalg.norm(b))


def passes_of(vectors):
    return networks.forward_passes(vectors.network, vectors.forward(""), jnp.asarray(vectors["x"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_forward_pass_and_backprop_gradients(path):
    vectors = Vectors(path)
    for layer, clean in enumerate(passes_of(vectors), start=1):
        assert_close(clean.output, vectors[f"h_{layer}"])
    if vectors.method == "BP":
        gradients = backprop_gradients(vectors.network, vectors.forward(""), vectors["x"], vectors["labels"])
        assert_close(gradients, vectors.forward("g"))


@pytest.mark.parametrize("path", WITH_FEEDBACK, ids=lambda path: path.stem)
def test_targets_and_forward_gradients(path):
    vectors = Vectors(path)
    passes, forward = passes_of(vectors), vectors.forward("")
    settings = vectors.settings()
    targets, _ = all_targets(vectors.network, settings, forward, vectors.feedback(""), passes, vectors["labels"])
    for layer, target in enumerate(targets, start=1):
        assert_close(target, vectors[f"target_{layer}"])
    gradients = local_gradients(vectors.network, forward, passes, targets)
    # They come from differences that are a thousandth of the activations: four digits are lost.
    for name, published in vectors.forward("g").items():
        for key, of_key in published.items():
            np.testing.assert_allclose(
                vectors.forward_factor * gradients[name][key], of_key, rtol=0, atol=1e-8 * np.linalg.norm(of_key)
            )


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_feedback_losses_and_gradients(path):
    vectors = Vectors(path)
    forward, feedback = vectors.forward(""), vectors.feedback("")
    clean = along_paths(vectors.paths, passes_of(vectors))
    gradients, decayed = vectors.feedback("g"), vectors.feedback("g", end="wd")
    ways = bind(vectors.paths, vectors.network, forward)
    for index, (way, noise) in enumerate(zip(ways, vectors.noise(), strict=True)):
        name, factor = way.block.name, vectors.rec_factor(index)
        own_forward = vectors.algorithm.forward_map(ways, index, forward, feedback, clean)
        loss, gradient = vectors.algorithm.feedback_rule(way.block, feedback[name], own_forward, clean[index], noise)
        assert_close(factor * loss, vectors[f"rec_loss_{index + 1}"])
        assert_close(factor * gradient["kernel"], gradients[name]["kernel"])
        if "bias" in gradients[name]:
            # The bias cancels from linear difference targets: its gradient is zero up to rounding.
            scale = np.linalg.norm(gradients[name]["kernel"])
            assert_close(factor * gradient["bias"], gradients[name]["bias"], scale)
        decay = float(vectors["feedback_wd"]) / factor
        with_decay = jax.tree.map(lambda g, p, d=decay: g + d * p, gradient, feedback[name])
        assert_close(factor * with_decay["kernel"], decayed[name]["kernel"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_three_training_steps(path, monkeypatch):
    """`train_step` with the published noise: without compilation noise is drawn in the order of the blocks."""
    vectors = Vectors(path)
    state, settings = vectors.state(), vectors.settings()
    for step in range(3):
        noise = vectors.noise(step) if settings.feedback else []
        monkeypatch.setattr(feedback_module, "draw_noise", lambda *_, noise=noise: noise.pop(0))
        images, labels = jnp.asarray(vectors["traj_x"][step]), jnp.asarray(vectors["traj_labels"][step])
        with jax.disable_jit():
            state, metrics = train_step(vectors.network, settings, state, images, labels, jax.random.key(0))
        assert not noise
        assert_close(metrics["loss"], vectors["traj_loss"][step])
        for index, loss in enumerate(metrics["feedback_loss"].values()):
            assert_close(vectors.rec_factor(index) * loss, vectors[f"traj_rec_loss_{index + 1}"][step])
        assert_close(state.forward, vectors.forward("traj_", step + 1))
        if vectors.paths:
            assert_close(state.feedback, vectors.feedback("traj_", step + 1))


def test_vectors_are_there():
    assert {str(Vectors(path)["method"]) for path in FILES} >= {"DTPDRL", "DDTPlinear", "DDTPRHL", "DDTPControl", "DFA"}
