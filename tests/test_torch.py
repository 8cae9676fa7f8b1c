"""The benchmark's PyTorch: the rules against what the published code computed, residual networks against ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from published import FILES, Vectors

from jaxdtp.models import resnet

torch = pytest.importorskip("torch")

from benchmarks import torch_dtp, torch_resnet  # noqa: E402

LDRL = [path for path in FILES if path.stem.endswith("_ldrl")]


@pytest.fixture(autouse=True)
def _one_thread():
    """The order in which overlapping windows are un-pooled is fixed with one thread only, and the vectors have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LDRL, ids=lambda path: path.stem)
def vectors(request):
    return Vectors(request.param)


def tensors(vectors, group, block):
    """Weight and bias of one block, as they are in the file."""
    (key,) = [k for k in vectors.arrays.files if k.startswith(f"{group}/{block.name}.") and k.endswith("weight")]
    return torch_dtp.Parameters(*(torch.tensor(vectors[k]) for k in (key, key.removesuffix("weight") + "bias")))


def published_network(vectors):
    """The vectors' network before the step."""
    outputs = [block.output_shape for block in vectors.network]
    channels = tuple(shape[-1] for shape in outputs if len(shape) == 3)
    features = [shape[0] for shape in outputs if len(shape) == 1]
    kind = "mlp"
    if channels:
        kind = "lenet" if vectors.parameters("forward_before", vectors.network[0])["kernel"].shape[0] == 5 else "vgg"
    network = torch_dtp.init(channels, tuple(features[:-1]), vectors["x"].shape[1:], features[-1], kind)
    for group, ours, blocks in (
        ("forward_before", network.forward, network.blocks),
        ("feedback_before", network.feedback, network.blocks[1:]),
    ):
        for index, block in enumerate(blocks):
            stored = tensors(vectors, group, block)
            assert [tensor.shape for tensor in ours[index]] == [tensor.shape for tensor in stored]
            ours[index] = torch_dtp.Parameters(*(tensor.requires_grad_() for tensor in stored))
    return network


def published_sgd(vectors, network):
    hp = {name: vectors[f"hp/{name}"].tolist() for name in ("forward_lr", "feedback_lr", "momentum", "weight_decay")}
    return torch_dtp.sgd(network, **hp)


def batch(vectors):
    return torch.tensor(vectors["x"]), torch.tensor(vectors["labels"])


def assert_close(ours, published):
    """|ours - published| <= 1e-6 |published|."""
    assert ours.shape == published.shape
    assert ours.dtype == published.dtype == torch.float64
    assert torch.linalg.vector_norm(ours - published) <= 1e-6 * torch.linalg.vector_norm(published)


def assert_all_close(vectors, group, blocks, ours):
    for block, params in zip(blocks, ours, strict=True):
        for tensor, published in zip(params, tensors(vectors, group, block), strict=True):
            assert_close(tensor, published)


def test_dtp_step(vectors):
    network = published_network(vectors)
    optimizers = published_sgd(vectors, network)
    iterations = vectors["hp/feedback_iterations"].tolist()
    stored = iter(
        [
            torch.tensor(vectors[f"noise/{block.name}/{iteration}/{end}"])
            for block, count in zip(network.blocks[1:], iterations, strict=True)
            for iteration in range(count)
            for end in ("input", "output")
        ]
    )

    def noise(like, scale):
        array = next(stored)
        assert array.shape == like.shape
        return array

    settings = {
        "iterations": iterations,
        "noise_scale": vectors["hp/noise"].tolist(),
        "beta": float(vectors["hp/beta"]),
    }
    # Without a buffer SGD starts its momentum with the first gradient, as the vectors have it.
    assert not optimizers.forward.state
    _, targets = torch_dtp.dtp_step(network, optimizers, *batch(vectors), noise=noise, **settings)

    assert next(stored, None) is None
    assert_all_close(vectors, "feedback_after", network.blocks[1:], network.feedback)
    for block, target in zip(network.blocks, targets, strict=True):
        assert_close(target, torch.tensor(vectors[f"target/{block.name}"]))
    gradients = [[tensor.grad for tensor in params] for params in network.forward]
    assert_all_close(vectors, "forward_grad", network.blocks, gradients)
    assert_all_close(vectors, "forward_after", network.blocks, network.forward)


def test_bp_step(vectors):
    network = published_network(vectors)
    images, labels = batch(vectors)
    loss = torch_dtp.bp_step(network, published_sgd(vectors, network), images, labels)
    logits = vectors[f"activation/{network.blocks[-1].name}"]
    np.testing.assert_allclose(loss, torch.nn.functional.cross_entropy(torch.tensor(logits), labels), rtol=1e-6)
    gradients = [[tensor.grad for tensor in params] for params in network.forward]
    assert_all_close(vectors, "backprop_grad", network.blocks, gradients)


@pytest.mark.parametrize("kind", ["vgg", "lenet", "mlp"])
def test_drawn_noise_and_initial_weights(kind):
    torch.manual_seed(0)
    network = torch_dtp.init(() if kind == "mlp" else (3, 4), (5,), (3, 9, 9), 10, kind, seed=1)
    upper = network.blocks[1:]
    optimizers = torch_dtp.sgd(network, 0.05, [0.01] * len(upper))
    images, labels = torch.randn(4, 3, 9, 9), torch.arange(4)
    before = [params.weight.clone() for params in network.forward + network.feedback]
    settings = {"iterations": [2] * len(upper), "noise_scale": [0.1] * len(upper), "beta": 0.7}
    loss, targets = torch_dtp.dtp_step(network, optimizers, images, labels, **settings)
    assert torch.isfinite(loss)
    assert len(targets) == len(network.blocks)
    after = [params.weight for params in network.forward + network.feedback]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def in_torch(path, values):
    """A Flax parameter, or its gradient, as PyTorch has it."""
    values = torch.tensor(np.asarray(values))
    return values.permute(3, 2, 0, 1) if values.ndim == 4 else values.T if path[-1] == "kernel" else values


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_residual_networks_are_ours(name):
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3))
    labels = np.arange(4)
    model = torch_resnet.resnet(name).double()
    ours = getattr(resnet, name)(num_classes=10, dtype="float64")
    with jax.enable_x64(True):
        variables = ours.init(jax.random.key(0), images)
        order = list(flatten_dict(variables["params"]))  # that of creation, which is PyTorch's too
        generator = np.random.default_rng(1)
        params = jax.tree.map(lambda leaf: leaf + 0.1 * generator.standard_normal(leaf.shape), variables["params"])

        def mean_loss(params):
            logits, _ = ours.apply(variables | {"params": params}, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(params)
    params, gradients = flatten_dict(params), flatten_dict(gradients)
    with torch.no_grad():
        for path, tensor in zip(order, model.parameters(), strict=True):
            tensor.copy_(in_torch(path, params[path]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    theirs = torch_resnet.bp_step(
        model, optimizer, torch.tensor(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels)
    )
    np.testing.assert_allclose(theirs, loss, rtol=1e-6)
    for path, tensor in zip(order, model.parameters(), strict=True):
        assert_close(tensor.grad, in_torch(path, gradients[path]))
