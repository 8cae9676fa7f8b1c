"""Using what was trained: by itself, as a Flax model, and by Orbax alone."""

import json

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import ROOT, final_state, run
from safetensors.numpy import load_file

import jaxdtp
from jaxdtp import data
from jaxdtp.running import checkpoints

SHORT = ("--config.num_epochs=3", "--config.steps_per_epoch=20")


class LeNet(nn.Module):
    """The hand-written network of configs/digits_lenet.py in plain Flax."""

    @nn.compact
    def __call__(self, x):
        for index, channels in enumerate((16, 32)):
            x = nn.elu(nn.Conv(channels, (5, 5), name=f"conv_{index}")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        x = nn.elu(nn.Dense(64, name="fc1")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="fc2")(x)


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lenet")
    result = run("digits_lenet", *SHORT, "--config.algorithm=ldrl_fast", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def images():
    config = jaxdtp.resolve(jaxdtp.default_config())
    test = data.load(config.dataset, 0).test
    return data.read(test, np.arange(len(test.rows)))


def test_the_best_model_predicts_as_it_was_evaluated(lenet, images):
    trained = jaxdtp.load(lenet)
    summary = json.loads((lenet / "summary.json").read_text())
    found = np.mean(np.argmax(trained.predict(images.images), -1) == images.labels)
    assert found == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert trained.classes == tuple("0123456789")
    assert trained.step == summary["best_epoch"] * 20
    np.testing.assert_allclose(trained.predict(images.images[:1]), trained.predict(images.images)[:1], atol=1e-4)
    newest = jaxdtp.load(str(lenet), step=60)
    jax.tree.map(np.testing.assert_array_equal, newest.params, final_state(lenet).forward)


def test_exported_parameters_are_those_of_a_flax_model(lenet, images, tmp_path):
    trained = jaxdtp.load(lenet)
    written = jaxdtp.export(trained, tmp_path / "lenet.msgpack")
    variables = flax.serialization.msgpack_restore(written.read_bytes())
    x = jaxdtp.running.epoch.normalise(trained.preprocessing, jnp.asarray(images.images[:50]))
    np.testing.assert_allclose(LeNet().apply(variables, x), trained.predict(images.images[:50]), rtol=1e-4, atol=1e-4)
    flat = load_file(jaxdtp.export(trained, tmp_path / "lenet.safetensors"))
    np.testing.assert_array_equal(flat["params.conv_0.kernel"], trained.params["conv_0"]["kernel"])


@pytest.mark.parametrize(
    ("name", "mean"), [("DenseNet", "batch_stats.DenseNet.BatchNorm_0.mean"), ("InNNX", "norm.InNNX.mean")]
)
def test_a_model_with_batch_statistics(tmp_path, images, name, mean):
    own = f"--config.network.module={ROOT}/tests/models.py:{name}"
    result = run("digits_mlp", own, "--config.algorithm=ldrl_fast", *SHORT, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    trained = jaxdtp.load(tmp_path)
    flat = load_file(jaxdtp.export(trained, tmp_path / "net.safetensors"))
    assert mean in flat
    assert trained.predict(images.images[:3]).shape == (3, 10)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, bool])
def test_what_was_trained_on_can_be_predicted(tmp_path, dtype):
    images, labels = np.random.default_rng(0).random((40, 5, 5)).round().astype(dtype), np.arange(40) % 2
    config = jaxdtp.default_config()
    config.num_epochs, config.batch_size, config.network.hidden = 1, 8, (6, 5)
    jaxdtp.train_and_evaluate(config, tmp_path, data=(images, labels))
    assert jaxdtp.load(tmp_path).predict(images).shape == (40, 2)


def test_orbax_alone_reads_a_checkpoint(lenet):
    """As README.md says."""
    step = checkpoints.saved_steps(lenet)[-1]
    state = ocp.StandardCheckpointer().restore(lenet.absolute() / "checkpoints" / str(step) / "state")
    np.testing.assert_array_equal(state["forward"]["fc1"]["kernel"], final_state(lenet).forward["fc1"]["kernel"])


def test_what_cannot_be_loaded_is_told(lenet, images, tmp_path):
    with pytest.raises(ValueError, match=f"there is no run in {tmp_path} yet"):
        jaxdtp.load(tmp_path)
    with pytest.raises(ValueError, match="step: got 7; allowed: one of "):
        jaxdtp.load(lenet, step=7)
    trained = jaxdtp.load(lenet)
    with pytest.raises(ValueError, match=r"images: got float32 of shape .* allowed: uint8 of shape \[batch, 8, 8, 1\]"):
        trained.predict(images.images.astype(np.float32))
    with pytest.raises(ValueError, match=r"path: got .*x\.txt; allowed: a name that ends in \.msgpack or"):
        jaxdtp.export(trained, tmp_path / "x.txt")
