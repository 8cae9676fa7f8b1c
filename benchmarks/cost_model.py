"""What a training step costs on a mesh of data x layers devices, and which mesh is the fastest.

Each of `layers` groups trains the feedback of its own blocks; the devices of a group share each batch. A step is

    passes(batch / data) + max over groups (sum over their blocks: iterations x (iteration(batch / data) + all-reduce))
    + all-reduce of the forward gradients over `data` + exchange of the trained feedback over `layers`

where `passes` (forward pass, targets, local gradients) is the same in every group. What is sent follows from the shapes
of the network alone (`exchanges`), and is compared with compiled programs by `benchmarks.parallel`. Seconds follow from
the figures of a machine (`Machine`), of which none has been measured.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from benchmarks.collectives import SENT
from benchmarks.steps import CLASSES, IMAGE
from jaxdtp.learning.derived import layers_of
from jaxdtp.learning.layers import probe_shape
from jaxdtp.learning.state import init_state
from jaxdtp.models.blocks import Block, example_of
from jaxdtp.running.build import build_network, build_settings

NUMBER = 4
"""Bytes of a float32."""

LARGE = 10**6
"""More examples than any probe has."""

# Kernels by what bounds them: a convolution or matrix product, a sweep over activations, or nothing, being short. Their
# numbers are those of VGG's program for the TPU v5e (libtpu 0.0.42): 25 to 28 in a feedback iteration, 14 for all else
# of a block. The compiler's own estimates for 16, 64 and 128 examples are 0.6 to 1.3 times what comes out here for an
# iteration, 1.1 to 1.4 times for all else.
ITERATION_SWEEPS, ITERATION_SHORT = 5, 17
PASSES_SWEEPS, PASSES_SHORT = 8, 2
UPDATE = 5
"""Accesses to memory for a parameter's update with momentum: gradient, parameter and buffer are read, two written."""


class Machine(NamedTuple):
    """Figures of many devices, in domains with fast links inside and a network between them.

    Attributes:
        name: for people.
        operations: floating-point operations per second of a device in convolutions and matrix products.
        memory: bytes per second, to and from a device's memory.
        shortest_kernel: seconds that a kernel takes at least, however little it does, launch included.
        domain: devices in a domain.
        link: bytes per second that a device sends inside its domain.
        hop: seconds from device to device there.
        network: bytes per second that a device sends to other domains.
        network_hop: seconds from domain to domain.
    """

    name: str
    operations: float
    memory: float
    shortest_kernel: float
    domain: int
    link: float
    hop: float
    network: float
    network_hop: float


# Vendors' figures: operations, memory, link and network. Our assumptions, typical of such machines: half of the
# operations are reached, and all times of kernels and hops.
MACHINES = (
    # NVIDIA H200 SXM: 989 TFLOP/s in TF32 with sparsity, half of that without; 4.8 TB/s; NVLink 900 GB/s, both ways
    # together. DGX H200: 8 GPUs in a node, and 400 Gbit/s of InfiniBand for each.
    Machine("H200 nodes of 8", 0.5 * 494e12, 4.8e12, 3e-6, 8, 450e9, 1e-6, 50e9, 5e-6),
    # Google TPU v5e: 197 TFLOP/s in bfloat16; 819 GB/s; 400 GB/s over 4 links, both ways together, of which a ring
    # along one axis of the torus uses 2; pods of 256, with 6.4 Tbit/s of network each.
    Machine("TPU v5e pods", 0.5 * 197e12, 819e9, 1.2e-6, 256, 100e9, 1e-6, 3.125e9, 25e-6),
)


def varied(machine: Machine) -> list[Machine]:
    """Machines of which one figure is 3 times larger or smaller; the domain stays as it is."""
    figures = set(Machine._fields) - {"name", "domain"}
    return [
        machine._replace(**{figure: factor * getattr(machine, figure)})
        for figure in sorted(figures)
        for factor in (1 / 3, 3)
    ]


class Mesh(NamedTuple):
    """Devices as a grid; the devices of a data shard, one of each group, are neighbours."""

    data: int
    layers: int


class BlockCost(NamedTuple):
    """Sizes of a block, which everything else follows from.

    Attributes:
        name: of the block.
        operations: floating-point operations of its linear map on one example, by definition.
        activations: numbers of one example that go into its linear map and come out of it.
        forward: numbers in its forward parameters.
        maps: how often a step without feedback training goes through its linear map, forwards or backwards.
        feedback: numbers in its feedback parameters; this and all that follows is 0 in a block without feedback.
        exchanged: numbers that come out of its feedback training: parameters, optimizer state and loss.
        reduced: numbers that a feedback iteration sums over its examples, and so over the devices that share them, by
            all-reduces that wait for each other.
        iterations: feedback iterations of a step.
        iteration_maps: as `maps`, of a feedback iteration.
        share: of the batch that takes part in them, above 1 with several noise samples.
        probe: examples in a layer's probe, if the batch has so many; 0: feedback learns from the batch itself.
    """

    name: str
    operations: float
    activations: int
    forward: int
    maps: int
    feedback: int = 0
    exchanged: int = 0
    reduced: tuple[int, ...] = ()
    iterations: int = 0
    iteration_maps: int = 0
    share: float = 0.0
    probe: int = 0


Blocks = tuple[BlockCost, ...]
"""Of a network, in forward order."""


class Exchange(NamedTuple):
    """All-reduces of one device in one step: `count` of them, of `size` bytes each, between `devices` devices."""

    purpose: str
    devices: int
    count: int
    size: float

    @property
    def bytes_sent(self) -> float:
        """By each device, by the ring algorithm."""
        return self.count * SENT["all-reduce"](self.size, self.devices)


class StepSeconds(NamedTuple):
    """Of one training step: computing what every group computes, feedback training of the slowest group (computing and
    exchanging), and all other exchanges."""

    passes: float
    feedback: float
    feedback_exchange: float
    exchange: float

    @property
    def total(self) -> float:
        """Of the step; nothing is taken to overlap."""
        return sum(self)


def block_costs(config: ConfigDict) -> tuple[BlockCost, ...]:
    """All blocks of a resolved configuration, with algorithm 'ldrl' or 'ldrl_fast', on images of CIFAR-10's shape."""
    network = build_network(config, IMAGE, CLASSES)
    settings = build_settings(config, network, steps_per_epoch=1)
    state = jax.eval_shape(lambda: init_state(network, settings, jax.random.key(0)))
    by_layer = settings.algorithm.paths == "layers"
    trainings = {} if by_layer else dict(zip(state.feedback, settings.feedback, strict=True))

    def cost(block: Block) -> BlockCost:
        name = block.name
        kernel = state.forward[name]["kernel"]
        features = kernel.shape[-1]
        positions = math.prod(block.input_shape[:2]) if kernel.ndim == 4 else 1
        activations = math.prod(block.input_shape) + positions * features
        maps = 2 if block is network[0] else 3  # nothing goes down from the first block
        forward = BlockCost(name, 2.0 * positions * kernel.size, activations, _numbers(state.forward[name]), maps)
        if by_layer:
            run = lambda params, x: block.forward(params, x)[0]  # noqa: E731
            # Of so many examples that no probe is cut.
            (layer,), _ = layers_of(run, state.forward[name], example_of(block, LARGE))
            return forward._replace(
                feedback=_numbers(state.feedback[name]),
                exchanged=_numbers(state.feedback[name]) + 1,
                reduced=(kernel.size + 1, 1),  # direction and loss; then the curvature along it
                iterations=settings.layers.iterations,
                iteration_maps=3,  # residual, direction, curvature
                share=settings.layers.share,
                probe=probe_shape(layer, 1.0)[0],
            )
        if name not in trainings:
            return forward
        training = trainings[name]
        return forward._replace(
            feedback=_numbers(state.feedback[name]),
            exchanged=_numbers((state.feedback[name], state.feedback_optimizer[name])) + 1,
            reduced=(2 * kernel.size + 1,),  # a gradient of each of the loss's two terms, and the loss
            iterations=training.iterations,
            iteration_maps=4,
            share=training.examples * training.noise_samples / config.batch_size,
        )

    return tuple(map(cost, network))


def _numbers(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def assign(costs: Mapping[str, float], groups: int) -> list[list[str]]:
    """Blocks of each group, by name: the costliest first, each to the group that has least so far."""
    assigned = [[] for _ in range(groups)]
    for name in sorted(costs, key=costs.get, reverse=True):
        min(assigned, key=lambda names: sum(costs[name] for name in names)).append(name)
    return assigned


def trained(blocks: Blocks) -> Blocks:
    """Those with feedback."""
    return tuple(block for block in blocks if block.iterations)


def examples(block: BlockCost, batch: int) -> float:
    """Of a feedback iteration."""
    most = block.share * batch
    return min(block.probe, math.ceil(most)) if block.probe else most


def divided(block: BlockCost, batch: int, mesh: Mesh) -> bool:
    """Whether the devices of a group share the examples of a feedback iteration. Those of probes are the same
    everywhere: only groups divide them, if they can be evenly."""
    return not block.probe or (mesh.layers > 1 and examples(block, batch) % mesh.data == 0)


def operations(block: BlockCost, batch: int) -> float:
    """Of a block's feedback training in one step."""
    return block.iteration_maps * block.iterations * examples(block, batch) * block.operations


def exchanges(blocks: Blocks, batch: int, mesh: Mesh, own: Collection[str]) -> list[Exchange]:
    """What a device of the group that trains the blocks `own` communicates in a step.

    A single iteration is no loop, and without groups the compiler puts the all-reduces of all blocks into one.
    """
    found, once = [], 0
    for block in trained(blocks):
        for reduced in block.reduced if block.name in own and divided(block, batch, mesh) else ():
            if block.iterations == mesh.layers == 1:
                once += reduced
            else:
                found.append(Exchange("feedback", mesh.data, block.iterations, NUMBER * reduced))
    if once:
        found.append(Exchange("feedback", mesh.data, 1, NUMBER * once))
    # With the gradients go the metrics: loss, accuracy, and each block's activation.
    numbers = sum(block.forward for block in blocks) + len(blocks) + 2
    found.append(Exchange("forward", mesh.data, 1, NUMBER * numbers))
    found.append(Exchange("layers", mesh.layers, 1, NUMBER * sum(block.exchanged for block in trained(blocks))))
    return [exchange for exchange in found if exchange.devices > 1]


def step_seconds(machine: Machine, blocks: Blocks, batch: int, mesh: Mesh) -> StepSeconds:
    """Of one training step on a global batch; blocks go to the groups by `assign`, by their seconds."""
    computing = {
        block.name: block.iterations
        * iteration_seconds(
            machine, block, math.ceil(examples(block, batch) / (mesh.data if divided(block, batch, mesh) else 1))
        )
        for block in trained(blocks)
    }

    def exchanging(own: Collection[str], feedback: bool) -> float:
        return sum(
            exchange_seconds(machine, mesh, exchange)
            for exchange in exchanges(blocks, batch, mesh, own)
            if (exchange.purpose == "feedback") == feedback
        )

    total = {name: seconds + exchanging([name], feedback=True) for name, seconds in computing.items()}
    groups = [
        (sum(computing[name] for name in own), exchanging(own, feedback=True)) for own in assign(total, mesh.layers)
    ]
    return StepSeconds(
        sum(passes_seconds(machine, block, math.ceil(batch / mesh.data)) for block in blocks),
        *max(groups, key=sum),
        exchanging([], feedback=False),
    )


def passes_seconds(machine: Machine, block: BlockCost, examples: int) -> float:
    """A block's forward pass, target, local gradient and update on `examples` examples."""
    return (
        block.maps * kernel_seconds(machine, operations=block.operations * examples)
        + PASSES_SWEEPS * kernel_seconds(machine, traffic=NUMBER * block.activations * examples)
        + PASSES_SHORT * machine.shortest_kernel
        + kernel_seconds(machine, traffic=UPDATE * NUMBER * block.forward)
    )


def iteration_seconds(machine: Machine, block: BlockCost, examples: int) -> float:
    """One feedback iteration of a block on `examples` examples, without communication."""
    return (
        block.iteration_maps * kernel_seconds(machine, operations=block.operations * examples)
        + ITERATION_SWEEPS * kernel_seconds(machine, traffic=NUMBER * block.activations * examples)
        + ITERATION_SHORT * machine.shortest_kernel
        + kernel_seconds(machine, traffic=UPDATE * NUMBER * block.feedback)
    )


def kernel_seconds(machine: Machine, operations: float = 0.0, traffic: float = 0.0) -> float:
    """A kernel of so many floating-point operations, or so many bytes from and to memory."""
    return max(machine.shortest_kernel, operations / machine.operations, traffic / machine.memory)


def exchange_seconds(machine: Machine, mesh: Mesh, exchange: Exchange) -> float:
    """All-reduces take the latency of a reduction and a broadcast along a tree, and the time to send their bytes.

    Where a group has several devices in each domain, all of them send to other domains at once.
    """
    stride = mesh.layers if exchange.purpose != "layers" else 1
    inside = max(1, min(exchange.devices, machine.domain // stride))
    domains = math.ceil(exchange.devices / inside)
    latency = 2 * (math.log2(inside) * machine.hop + math.log2(domains) * machine.network_hop)
    bandwidth = machine.link if domains == 1 else min(machine.link, inside * machine.network)
    return exchange.count * (machine.shortest_kernel + latency) + exchange.bytes_sent / bandwidth


def meshes(blocks: Blocks, devices: int, batch: int) -> list[Mesh]:
    """All meshes of at most `devices` devices whose data axis is a power of two that divides the batch."""
    return [
        Mesh(2**power, layers)
        for power in range(devices.bit_length())
        for layers in range(1, len(trained(blocks)) + 1)
        if 2**power * layers <= devices and batch % 2**power == 0
    ]


def best_mesh(machine: Machine, blocks: Blocks, devices: int, batch: int) -> Mesh:
    """The fastest mesh of at most `devices` devices; of equally fast ones the smallest."""
    return min(
        meshes(blocks, devices, batch),
        key=lambda mesh: (step_seconds(machine, blocks, batch, mesh).total, mesh.data * mesh.layers),
    )
