"""Difference target propagation with L-DRL (Ernoult et al. 2022) in PyTorch, written straight from the formulas.

What `jaxdtp` is timed against, so it takes none of the short cuts of jaxdtp/learning/feedback.py: every feedback
iteration runs its feedback passes in full and leaves the gradient to autograd.

Activations are [batch, channels, height, width] or [batch, features]. Forward and feedback weights of a block are
separate tensors, of one shape for convolutions ([out, in, height, width] of the forward one) and each other's transpose
for dense layers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = tuple[int, int, int]
"""Window, stride and padding, pixels."""

GEOMETRY: dict[str, tuple[int, Pooling]] = {"vgg": (3, (2, 2, 0)), "lenet": (5, (3, 2, 1))}
"""Kernel size of the convolutions, and pooling."""


class Parameters(NamedTuple):
    """Of one linear map."""

    weight: Tensor
    bias: Tensor


class Block(NamedTuple):
    """A forward map F_n and its feedback map G_n.

    Attributes:
        name: as in jaxdtp/models/networks.py.
        forward: `forward(params, x)` to (F(x), switches); switches are None without pooling.
        feedback: `feedback(params, y, switches)` to G(y), of the shape of the block's input.
    """

    name: str
    forward: Callable[[Parameters, Tensor], tuple[Tensor, Tensor | None]]
    feedback: Callable[[Parameters, Tensor, Tensor | None], Tensor]


class Network(NamedTuple):
    """Blocks 1..N with forward parameters, and feedback parameters of blocks 2..N: G_1 is never needed."""

    blocks: list[Block]
    forward: list[Parameters]
    feedback: list[Parameters]


class Pass(NamedTuple):
    """One block on one batch: `output`, `switches` = F(`input`)."""

    input: Tensor
    output: Tensor
    switches: Tensor | None


class Optimizers(NamedTuple):
    """One for all forward parameters, and one for the feedback parameters of each of the blocks 2..N."""

    forward: torch.optim.Optimizer
    feedback: list[torch.optim.Optimizer]


def init(
    channels: tuple[int, ...],
    hidden: tuple[int, ...],
    input_shape: tuple[int, ...] = (3, 32, 32),
    num_classes: int = 10,
    kind: Literal["vgg", "lenet", "mlp"] = "vgg",
    seed: int = 0,
    device: str = "cpu",
) -> Network:
    """Convolution blocks with `channels` (none for 'mlp'), dense blocks of `hidden` features and a linear one.

    Weights and biases are uniform in +-1/sqrt(fan-in), PyTorch's default, which counts the fan-in of a transposed
    convolution by its output channels.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, network = tuple(input_shape), Network([], [], [])

    def add(block: Block, forward_shape: tuple[int, ...], feedback_shape: tuple[int, ...], in_features: int):
        network.blocks.append(block)
        network.forward.append(_uniform(forward_shape, forward_shape[0], generator, device))
        if len(network.blocks) > 1:
            network.feedback.append(_uniform(feedback_shape, in_features, generator, device))

    for index, out_channels in enumerate(channels):
        kernel_size, pooling = GEOMETRY[kind]
        window, stride, padding = pooling
        forward = partial(conv_forward, pooling=pooling)
        feedback = partial(conv_feedback, pooling=pooling, size=shape[1:])
        weight_shape = (out_channels, shape[0], kernel_size, kernel_size)
        add(Block(f"conv_{index}", forward, feedback), weight_shape, weight_shape, shape[0])
        shape = (out_channels, *((n + 2 * padding - window) // stride + 1 for n in shape[1:]))

    sizes = (*hidden, num_classes)
    for index, out_features in enumerate(sizes, start=1):
        activation, in_features = index < len(sizes), math.prod(shape)
        forward = partial(dense_forward, activation=activation)
        feedback = partial(dense_feedback, shape=shape, activation=activation)
        block = Block(f"fc{index}" if hidden else "fc", forward, feedback)
        add(block, (out_features, in_features), (in_features, out_features), in_features)
        shape = (out_features,)
    return network


def conv_forward(params: Parameters, x: Tensor, *, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Max-pool(ELU(conv(x))) and the switches of the pooling."""
    activation = F.elu(F.conv2d(x, *params, padding="same"))
    return F.max_pool2d(activation, *pooling, return_indices=True)


def conv_feedback(
    params: Parameters, y: Tensor, switches: Tensor, *, pooling: Pooling, size: tuple[int, int]
) -> Tensor:
    """Transposed convolution(ELU(un-pool(y))), to the block's input size.

    Where overlapping windows share a switch, `max_unpool2d` keeps the value written last: the later window's in
    row-major order, unless threads split a map. `torch.set_num_threads(1)` rules that out.
    """
    unpooled = F.max_unpool2d(y, switches, *pooling, output_size=size)
    return F.conv_transpose2d(F.elu(unpooled), *params, padding=params.weight.shape[-1] // 2)


def dense_forward(params: Parameters, x: Tensor, *, activation: bool) -> tuple[Tensor, None]:
    """ELU(dense(flatten(x))); the last block of a network has no activation."""
    y = F.linear(x.flatten(1), *params)
    return F.elu(y) if activation else y, None


def dense_feedback(
    params: Parameters, y: Tensor, switches: None, *, shape: tuple[int, ...], activation: bool
) -> Tensor:
    """Dense(ELU(y)), reshaped to the block's input shape."""
    return F.linear(F.elu(y) if activation else y, *params).reshape(-1, *shape)


def sgd(
    network: Network,
    forward_lr: float,
    feedback_lr: tuple[float, ...] = (),
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> Optimizers:
    """SGD with momentum, and weight decay on the forward parameters; a feedback learning rate for each block 2..N."""
    all_forward = [tensor for params in network.forward for tensor in params]
    return Optimizers(
        torch.optim.SGD(all_forward, forward_lr, momentum, weight_decay=weight_decay),
        [torch.optim.SGD(params, lr, momentum) for params, lr in zip(network.feedback, feedback_lr, strict=False)],
    )


def gaussian(like: Tensor, scale: float) -> Tensor:
    """N(0, scale^2), in the shape of `like`."""
    return scale * torch.randn_like(like)


def dtp_step(
    network: Network,
    optimizers: Optimizers,
    images: Tensor,
    labels: Tensor,
    *,
    iterations: tuple[int, ...],
    noise_scale: tuple[float, ...],
    beta: float,
    noise: Callable[[Tensor, float], Tensor] = gaussian,
) -> tuple[Tensor, list[Tensor]]:
    """One training step: clean forward pass, feedback training, targets, one forward update for all blocks together.

    Args:
        network, optimizers: updated in place.
        images: [batch, *input_shape].
        labels: [batch], integers.
        iterations, noise_scale: K_n and sigma_n of the blocks 2..N, in this order.
        beta: step size of the output target.
        noise: `noise(like, scale)`, called for a block's input and then its output, in every iteration of every block.

    Returns:
        The mean cross-entropy before the step, and the targets t[1..N].
    """
    passes = local_passes(network, images)
    detached = [clean._replace(output=clean.output.detach()) for clean in passes]
    upper = list(zip(network.blocks[1:], network.feedback, detached[1:], strict=True))
    training = zip(upper, network.forward[1:], optimizers.feedback, iterations, noise_scale, strict=True)
    for (block, params, clean), forward_params, optimizer, count, sigma in training:
        for _ in range(count):
            epsilon, eta = noise(clean.input, sigma), noise(clean.output, sigma)
            loss = ldrl_loss(block, params, forward_params, clean, epsilon, eta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    logits = detached[-1].output
    with torch.no_grad():
        targets = [logits - beta * (logits.softmax(1) - F.one_hot(labels, logits.shape[1]))]
        for block, params, (s, y, switches) in reversed(upper):
            difference = block.feedback(params, targets[0], switches) - block.feedback(params, y, switches)
            targets.insert(0, s + difference)

    losses = [(clean.output - t).square().sum() / (2 * len(images)) for clean, t in zip(passes, targets, strict=True)]
    optimizers.forward.zero_grad()
    sum(losses).backward()
    optimizers.forward.step()
    return F.cross_entropy(logits, labels), targets


def ldrl_loss(
    block: Block, params: Parameters, forward_params: Parameters, clean: Pass, epsilon: Tensor, eta: Tensor
) -> Tensor:
    """-2 epsilon . (G(F(s + epsilon)) - G(F(s))) + |G(F(s) + eta) - G(F(s))|^2, mean over the batch.

    F(s + epsilon) is fed back through the switches of its own pass, F(s) + eta through the clean ones.
    """
    s, y, switches = clean
    with torch.no_grad():
        noisy = block.forward(forward_params, s + epsilon)
    reconstruction = block.feedback(params, y, switches)
    input_difference = block.feedback(params, *noisy) - reconstruction
    output_difference = block.feedback(params, y + eta, switches) - reconstruction
    return (output_difference.square().sum() - 2 * (epsilon * input_difference).sum()) / len(s)


def local_passes(network: Network, images: Tensor) -> list[Pass]:
    """s[n] = F_n(s[n-1]) for all blocks, each with gradients for its own parameters only."""
    passes, s = [], images
    for block, params in zip(network.blocks, network.forward, strict=True):
        passes.append(Pass(s, *block.forward(params, s)))
        s = passes[-1].output.detach()
    return passes


def bp_step(network: Network, optimizers: Optimizers, images: Tensor, labels: Tensor) -> Tensor:
    """One training step by backpropagation, same arguments as `dtp_step`; returns the mean cross-entropy before it."""
    s = images
    for block, params in zip(network.blocks, network.forward, strict=True):
        s, _ = block.forward(params, s)
    loss = F.cross_entropy(s, labels)
    optimizers.forward.zero_grad()
    loss.backward()
    optimizers.forward.step()
    return loss.detach()


def _uniform(weight_shape: tuple[int, ...], bias_features: int, generator: torch.Generator, device: str) -> Parameters:
    bound = math.prod(weight_shape[1:]) ** -0.5
    weight, bias = torch.empty(weight_shape), torch.empty(bias_features)
    tensors = (tensor.uniform_(-bound, bound, generator=generator) for tensor in (weight, bias))
    return Parameters(*(tensor.to(device).requires_grad_() for tensor in tensors))
