"""Training steps to be timed: jaxdtp's and PyTorch's, each with its count of floating-point operations."""

import functools
import math
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.timing import interleaved
from jaxdtp.configuration.config import resolve
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.layers import RARELY, match_layers, probe_shape
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step
from jaxdtp.models.networks import NETWORKS, Network
from jaxdtp.models.plain_convolutions import slow_in_loops
from jaxdtp.running.build import build_network, build_settings

IMAGE = (32, 32, 3)
CLASSES = 10
PROBING, PLAIN = 10**6 * RARELY, 10**6 * RARELY + 1
"""Numbers of steps late in a run, with and without the probes of fast L-DRL."""


class Step(NamedTuple):
    """A training step on one batch.

    Attributes:
        run: `run(count)` does so many steps, and returns when they are done.
        operations: floating-point operations of one step, see `operations`; None where they aren't counted.
        kept_bytes: parameters, optimizer states and the batch, which live from step to step (in PyTorch gradients too).
        compile_seconds: how long it took to compile.
        program_bytes: all memory of the compiled program; None for PyTorch.
        probing: the step with probes, which all of the first ones have and later one of `RARELY`; None where steps are
            alike.
    """

    run: Callable[[int], None]
    operations: float | None
    kept_bytes: int
    compile_seconds: float
    program_bytes: int | None
    probing: Optional["Step"] = None


def timed(
    steps: dict[Hashable, Step], repeats: int, seconds: float = 0.5
) -> tuple[dict[Hashable, list[float]], dict[Hashable, list[float]]]:
    """As `timing.interleaved`, by name: seconds of a step late in a run, one of `RARELY` with probes, and of those with
    probes, where there are any."""
    runs = {(name, False): step.run for name, step in steps.items()}
    times = interleaved(
        runs | {(name, True): step.probing.run for name, step in steps.items() if step.probing}, repeats, seconds
    )
    probing = {name: times[name, True] for name, step in steps.items() if step.probing}
    later = {}
    for name in steps:
        plain = times[name, False]
        later[name] = [
            without + (with_probes - without) / RARELY
            for without, with_probes in zip(plain, probing.get(name, plain), strict=True)
        ]
    return later, probing


def jaxdtp_step(config: ConfigDict, algorithm: str, image: tuple[int, ...] = IMAGE) -> Step:
    """One of our rules with the settings of a configuration, on images of a shape."""
    config = configure(config, algorithm)
    network = build_network(config, image, CLASSES)
    settings = build_settings(config, network, steps_per_epoch=1000)
    state = init_state(network, settings, jax.random.key(config.seed))
    images, labels = (jnp.asarray(values) for values in random_batch(config.batch_size, image))
    key = jax.random.key(1)

    def one_step(state, images, labels, number):
        state = state.replace(step=number)
        return train_step(network, settings, state, images, labels, jax.random.fold_in(key, number))[0]

    def in_loop(state, images, labels, number, count):
        return jax.lax.fori_loop(0, count, lambda _, state: one_step(state, images, labels, number), state)

    # In a loop on the device or one by one, as in training.
    start = time.perf_counter()
    arguments = state, images, labels, jnp.asarray(PLAIN, jnp.int32)
    alone = slow_in_loops(jax.make_jaxpr(one_step)(*arguments))
    program, counts = (one_step, ()) if alone else (in_loop, (1,))
    steps = jax.jit(program, donate_argnums=0).lower(*arguments, *counts).compile()
    compile_seconds = time.perf_counter() - start

    def run(number, count):
        nonlocal state
        number = jnp.asarray(number, jnp.int32)
        for _ in range(count if alone else 1):
            state = steps(state, images, labels, number, *(() if alone else (count,)))
        jax.block_until_ready(state)

    memory = steps.memory_analysis()
    common = (
        sum(values.nbytes for values in jax.tree.leaves((state, images, labels))),
        compile_seconds,
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )
    rare = settings.algorithm.shared_update and settings.algorithm.feedback_rule is match_layers
    probing = Step(functools.partial(run, PROBING), operations(network, config), *common) if rare else None
    share = 1 / RARELY if rare else 1
    return Step(functools.partial(run, PLAIN), operations(network, config, probing=share), *common, probing)


def torch_step(config: ConfigDict, algorithm: str, device: str, precision: str) -> Step:
    """BP or, for the published networks, DTP in PyTorch with the settings of a configuration; `device` is PyTorch's
    name of it."""
    import torch

    from benchmarks import torch_resnet

    torch.set_float32_matmul_precision({"float32": "highest", "tensorfloat32": "high", "bfloat16": "medium"}[precision])
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True  # as XLA tries algorithms, too
    config = configure(config, algorithm)
    images, labels = random_batch(config.batch_size)
    images, labels = (
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device),
        torch.from_numpy(labels).to(device),
    )
    make = _torch_residual if config.network.name in torch_resnet.SIZES else _torch_published
    one_step, tensors, optimizers = make(config, device)

    def run(count):
        for _ in range(count):
            one_step(images, labels)
        if device != "cpu":
            torch.cuda.synchronize()

    run(1)
    buffers = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    kept = sum(tensor.nbytes for tensor in (*tensors, *buffers, *gradients, images, labels))
    ours = build_network(config, IMAGE, CLASSES)
    return Step(run, operations(ours, config, torch=True), kept, 0.0, None)


def _torch_published(config: ConfigDict, device: str) -> tuple[Callable, list, list]:
    """A step on images and labels, its tensors and its optimizers."""
    from benchmarks import torch_dtp

    feedback, forward = config.feedback, config.forward
    channels, hidden = tuple(config.network.channels), tuple(config.network.hidden)
    network = torch_dtp.init(channels, hidden, IMAGE[::-1], CLASSES, config.network.name, device=device)
    rates = () if config.algorithm == "bp" else tuple(feedback.learning_rate)
    optimizers = torch_dtp.sgd(network, forward.learning_rate, rates, forward.momentum, forward.weight_decay)
    one_step = functools.partial(torch_dtp.bp_step, network, optimizers)
    if config.algorithm != "bp":
        settings = {
            "iterations": tuple(feedback.iterations),
            "noise_scale": tuple(feedback.noise_scale),
            "beta": config.beta,
        }
        one_step = functools.partial(torch_dtp.dtp_step, network, optimizers, **settings)
    tensors = [tensor for params in (*network.forward, *network.feedback) for tensor in params]
    return one_step, tensors, [optimizers.forward, *optimizers.feedback]


def _torch_residual(config: ConfigDict, device: str) -> tuple[Callable, list, list]:
    """As `_torch_published`, by backpropagation."""
    import torch

    from benchmarks import torch_resnet

    forward, model = config.forward, torch_resnet.resnet(config.network.name, CLASSES).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), forward.learning_rate, forward.momentum, weight_decay=forward.weight_decay
    )
    one_step = functools.partial(torch_resnet.bp_step, model, optimizer)
    return one_step, [*model.parameters(), *model.buffers()], [optimizer]


def configure(config: ConfigDict, algorithm: str) -> ConfigDict:
    """The resolved configuration of an algorithm."""
    config = config.copy_and_resolve_references()
    config.algorithm = algorithm
    return resolve(config)


def random_batch(batch_size: int, image: tuple[int, ...] = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """Normal images and random labels, always the same."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((batch_size, *image)).astype(np.float32)
    return images, generator.integers(0, CLASSES, batch_size)


def operations(network: Network, config: ConfigDict, torch: bool = False, probing: float = 1) -> float | None:
    """Floating-point operations of a step, counted from shapes: those of convolutions and matrix products, each by its
    definition, whatever algorithm computes it.

    With c the operations of a block's linear map on the batch, its gradients with respect to input or weights cost c
    each. A step: forward c, weight gradient c and, except in the first block, c for what goes down to the block below.
    To this L-DRL adds per iteration F, one feedback projection and two weight gradients (in PyTorch, written as
    published: F, three feedback passes and their three weight gradients); fast L-DRL three products of each layer with
    its probe, in a share `probing` of steps. Other rules, and networks that aren't those of the published runs, aren't
    counted: None.
    """
    per_iteration = {"bp": 0, "ldrl": 7 if torch else 4, "ldrl_fast": 3}
    if config.algorithm not in per_iteration or config.network.name not in NETWORKS:
        return None
    settings = build_settings(config, network, steps_per_epoch=1000)
    state = jax.eval_shape(lambda key: init_state(network, settings, key), jax.random.key(0))
    total = 0.0
    for index, block in enumerate(network):
        shape = state.forward[block.name]["kernel"].shape
        positions = math.prod(block.input_shape[:2]) if len(shape) == 4 else 1
        of_example = 2.0 * positions * math.prod(shape)
        total += (3 if index else 2) * config.batch_size * of_example
        if settings.algorithm.paths == "layers":
            example = jax.ShapeDtypeStruct((config.batch_size, *block.input_shape), jnp.float32)
            layers, _ = layers_of(
                lambda params, x, block=block: block.forward(params, x)[0], state.forward[block.name], example
            )
            probed = sum(probe_shape(layer, settings.layers.share)[0] for layer in layers)
            total += per_iteration[config.algorithm] * settings.layers.iterations * probed * probing * of_example
        elif settings.feedback and index:
            training = settings.feedback[index - 1]
            examples = training.noise_samples * training.examples
            total += per_iteration[config.algorithm] * training.iterations * examples * of_example
    return total
