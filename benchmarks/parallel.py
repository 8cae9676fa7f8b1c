"""What a training step sends when it is spread over devices, counted from compiled programs, and a model of its time on
1 to 4,096 devices: data parallel, layer parallel (feedback of different blocks on different devices), and both.

    python -m benchmarks.parallel [--config=cifar10_vgg_fast] [--record]

Nothing is run: one step is compiled for virtual CPU devices, as it is lowered for TPUs. --topology=v5e:2x4 compiles for
that TPU too, which needs libtpu (`pip install 'jax[tpu]'`) but no TPU. Prints bytes by mesh and the fastest meshes;
--record keeps them in benchmarks/results/parallel_CONFIG.json, and their figure beside it.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.ticker import LogLocator
from ml_collections import ConfigDict

from benchmarks import cost_model
from benchmarks.collectives import Collective, collectives
from benchmarks.cost_model import MACHINES, Blocks, Exchange, Machine, Mesh
from benchmarks.record import RESULTS, origin
from benchmarks.steps import CLASSES, IMAGE, configure
from configs import cifar10_vgg, cifar10_vgg_fast
from jaxdtp.devices.parallel import AXES, Parallel, divide_batch
from jaxdtp.learning.state import init_state
from jaxdtp.learning.step import train_step
from jaxdtp.learning.train_feedback import trained_blocks
from jaxdtp.results.plots import style
from jaxdtp.running.build import build_network, build_settings

CONFIGS = {"cifar10_vgg": cifar10_vgg, "cifar10_vgg_fast": cifar10_vgg_fast}
COMPILED = (Mesh(2, 1), Mesh(8, 1), Mesh(1, 2), Mesh(1, 5), Mesh(4, 2), Mesh(2, 4))
DEVICES = [2**power for power in range(13)]
CURVES = {
    "data": ("data parallel", "o-"),
    "layers": ("layer parallel", "s-"),
    "best": ("fastest mesh of at most as many", "D--"),
}
TOLERANCE = 1e-5
"""Of predicted bytes: the compilers disagree on a few scalars."""
PARTS = ("feedback", "rest", "all_reduces", "predicted")
ROW = "{:8} {:5} {:30}" + 4 * " {:>11} {:>14}"


def lower_step(
    config: ConfigDict, mesh: Mesh, devices: list[jax.Device], groups: list[list[str]]
) -> jax.stages.Lowered:
    """One training step on a mesh of devices, each group training the feedback of its blocks.

    It is lowered as for TPUs, with XLA's plain convolutions, as on GPUs too: the faster ones for CPUs reduce transforms
    of kernel gradients, which are larger.
    """
    network = build_network(config, IMAGE, CLASSES)
    settings = build_settings(config, network, steps_per_epoch=1)
    grid = jax.sharding.Mesh(np.array(devices).reshape(mesh), AXES, axis_types=(AxisType.Auto,) * 2)
    owner = {name: number for number, names in enumerate(groups) for name in names}
    owners = tuple(owner[name] for name in trained_blocks(network, settings)) if mesh.layers > 1 else ()
    settings = settings._replace(parallel=Parallel(grid, owners))

    def step(state, images, labels, key):
        images, labels = divide_batch(grid, (images, labels))
        return train_step(network, settings, state, images, labels, key)

    def arguments():
        key = jax.random.key(0)
        batch = config.batch_size
        return init_state(network, settings, key), jnp.zeros((batch, *IMAGE)), jnp.zeros(batch, int), key

    replicated = NamedSharding(grid, PartitionSpec())
    with jax.default_matmul_precision(config.matmul_precision):
        traced = jax.jit(step, in_shardings=replicated, out_shardings=replicated).trace(*jax.eval_shape(arguments))
    return traced.lower(lowering_platforms=("tpu",))


def count(config: ConfigDict, blocks: Blocks, mesh: Mesh, devices: list[jax.Device]) -> list[dict]:
    """What a device of each group sends in a step, counted in the compiled program and predicted from the shapes.

    Each time number of collectives and bytes. 'feedback' is what is sent in loops or by one group alone, 'rest' what
    every device sends once, and 'all_reduces' those of both, which are what is predicted.

    Raises:
        ValueError: the all-reduces aren't those that were predicted.
    """
    trained = cost_model.trained(blocks)
    groups = cost_model.assign(
        {block.name: cost_model.operations(block, config.batch_size) for block in trained}, mesh.layers
    )
    found = collectives(lower_step(config, mesh, devices, groups).compile().as_text())
    names = [block.name for block in trained]
    rows = []
    for own in groups:
        mine = [collective for collective in found if executes(own, names, collective)]
        of_feedback = [collective.in_loop or bool(collective.branches) for collective in mine]
        row = {
            "blocks": own,
            "feedback": _sums(itertools.compress(mine, of_feedback)),
            "rest": _sums(collective for collective, feedback in zip(mine, of_feedback, strict=True) if not feedback),
            "all_reduces": _sums(collective for collective in mine if collective.kind == "all-reduce"),
            "predicted": _sums(cost_model.exchanges(blocks, config.batch_size, mesh, own)),
            "collectives": [collective._asdict() for collective in mine],
        }
        counted, predicted = row["all_reduces"], row["predicted"]
        same_bytes = math.isclose(counted["bytes_sent"], predicted["bytes_sent"], rel_tol=TOLERANCE)
        if counted["count"] != predicted["count"] or not same_bytes:
            raise ValueError(f"mesh {mesh.data}x{mesh.layers}, {own}: counted {counted}, predicted {predicted}")
        rows.append(row)
    return rows


def executes(own: list[str], names: list[str], collective: Collective) -> bool:
    """Whether a group executes a collective, in a step with probes if there are steps without.

    Args:
        own: the blocks that the group trains.
        names: all blocks that are trained.
        collective: of a program whose conditionals are in a name scope of their block, and true for its group; or, for
            a whole step, in the scope 'probes'.
    """
    for conditional, index in collective.branches:
        scopes = set(conditional.split("/")).intersection(names)
        if not scopes and conditional.endswith("/probes/cond"):
            if not index:
                return False
            continue
        if len(scopes) != 1:
            raise ValueError(f"conditional {conditional}: it is in the scope of {sorted(scopes)}; allowed: one block")
        if bool(index) != (scopes <= set(own)):
            return False
    return True


def scale(machine: Machine, blocks: Blocks, batch: int, weak: bool) -> list[dict]:
    """The time of a step on each of DEVICES: data parallel, layer parallel, and on the fastest mesh.

    'best_varied' are the meshes that are the fastest on one of the machines of `cost_model.varied`.

    Args:
        machine: that it runs on.
        blocks: of the network.
        batch: examples, of the global batch, or on each device if `weak`.
        weak: whether the global batch grows with the devices.
    """
    points = []
    for devices in DEVICES:
        examples = batch * devices if weak else batch
        groups = len(cost_model.trained(blocks))
        meshes = {"best": cost_model.best_mesh(machine, blocks, devices, examples)}
        varied = {cost_model.best_mesh(other, blocks, devices, examples) for other in cost_model.varied(machine)}
        if devices <= examples:
            meshes["data"] = Mesh(devices, 1)
        if devices < 2 * groups:
            meshes["layers"] = Mesh(1, min(devices, groups))
        point = {"devices": devices, "batch": examples, "best_varied": [mesh._asdict() for mesh in sorted(varied)]}
        for name, mesh in meshes.items():
            seconds = cost_model.step_seconds(machine, blocks, examples, mesh)
            point[name] = mesh._asdict() | {"seconds": seconds.total, "parts": seconds._asdict()}
        points.append(point)
    return points


def plot(curves: list[dict], title: str) -> plt.Figure:
    """Milliseconds of a step over devices, a panel for each machine and scaling, with the fastest meshes."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained", sharex=True, sharey="row")
    for panel, curve in zip(axes.flat, curves, strict=True):
        for kind, (label, line) in CURVES.items():
            points = [point for point in curve["points"] if kind in point]
            milliseconds = [1e3 * point[kind]["seconds"] for point in points]
            panel.plot([point["devices"] for point in points], milliseconds, line, markersize=4, label=label)
        before = None
        for point in curve["points"]:
            mesh = "{data}x{layers}".format(**point["best"])
            if mesh != before:
                where = point["devices"], 1e3 * point["best"]["seconds"]
                place = {"xytext": (2, -6), "textcoords": "offset points", "ha": "right", "va": "top", "rotation": 50}
                panel.annotate(mesh, where, **place, fontsize=8)
            before = mesh
        panel.set(xscale="log", yscale="log", title=f"{curve['machine']}, {curve['scaling']}")
        panel.margins(x=0.06, y=0.16)
        panel.set_xticks(DEVICES, [str(devices) for devices in DEVICES], fontsize=8)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        style(panel)
    for panel in axes[:, 0]:
        panel.set_ylabel("milliseconds per step (model)")
    for panel in axes[1]:
        panel.set_xlabel("devices")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def _sums(items: Iterable[Collective | Exchange]) -> dict:
    """Number and bytes of collectives."""
    items = list(items)
    return {"count": sum(item.count for item in items), "bytes_sent": sum(item.bytes_sent for item in items)}


def row(target: str, mesh: Mesh, group: dict) -> str:
    """A line of the printed table."""
    numbers = [(group[part]["count"], f"{group[part]['bytes_sent'] / 1e6:.1f}") for part in PARTS]
    return ROW.format(target, f"{mesh.data}x{mesh.layers}", " ".join(group["blocks"]), *itertools.chain(*numbers))


def main() -> None:
    """Compile, count, compare, model, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="cifar10_vgg")
    parser.add_argument("--topology", help="of TPUs to compile for too, such as v5e:2x4")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(mesh.data * mesh.layers for mesh in COMPILED))
    targets = {"cpu": jax.devices()}
    if arguments.topology:
        targets[arguments.topology] = topologies.get_topology_desc(arguments.topology, "tpu").devices
    module = CONFIGS[arguments.config]
    config = configure(module.get_config(), module.get_config().algorithm)
    blocks = cost_model.block_costs(config)

    print(ROW.format("for", "mesh", "feedback of", *(f"{part} {what}" for part in PARTS for what in ("n", "MB"))))
    counted = []
    for target, devices in targets.items():
        for mesh in COMPILED:
            groups = count(config, blocks, mesh, devices[: mesh.data * mesh.layers])
            counted.append({"compiled_for": target} | mesh._asdict() | {"groups": groups})
            print(*(row(target, mesh, group) for group in groups), sep="\n", flush=True)

    curves = [
        {"machine": machine.name, "scaling": label, "points": scale(machine, blocks, config.batch_size, weak)}
        for weak, label in enumerate(("fixed batch", "fixed batch on each device"))
        for machine in MACHINES
    ]
    for curve in curves:
        print(f"\n{curve['machine']}, {curve['scaling']}: milliseconds per step (model)")
        for point in curve["points"]:
            meshes = [(kind, point[kind]) for kind in CURVES if kind in point]
            times = (f"{kind} {mesh['data']}x{mesh['layers']} {1e3 * mesh['seconds']:.2f}" for kind, mesh in meshes)
            varied = ", ".join("{data}x{layers}".format(**mesh) for mesh in point["best_varied"])
            print(
                f"{point['devices']:>5} devices: {', '.join(times)}; with a figure 3 times larger or smaller: {varied}"
            )

    if arguments.record:
        topology = f" --topology={arguments.topology}" if arguments.topology else ""
        command = f"python -m benchmarks.parallel --config={arguments.config}{topology} --record"
        result = origin(command) | {
            "libtpu": importlib.metadata.version("libtpu") if arguments.topology else None,
            "config": arguments.config,
            "batch": config.batch_size,
            "tolerance": TOLERANCE,
            "counted": counted,
            "blocks": [block._asdict() for block in blocks],
            "machines": [machine._asdict() for machine in MACHINES],
            "curves": curves,
        }
        path = RESULTS / f"parallel_{arguments.config}"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        title = f"A training step of {arguments.config}, batch {config.batch_size}, on meshes of data x layers devices"
        plot(curves, title).savefig(path.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
