"""Training on many devices: a mesh of two axes, and who does what on it.

Data parallel: the batch is divided along the axis 'data', parameters are everywhere, and the compiler sums over devices
where the program sums over the batch. What is computed is the same on any number of devices, up to the order of
summation; JAX's random numbers do not depend on how an array is divided.

Layer parallel: given the activations, blocks learn their feedback independently of each other. Along the axis 'layer'
every group of devices trains the feedback of its own blocks, without a sum over devices in every iteration, and hands
the weights to the others once for each batch. Both axes go together.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "layer")
SEEDS = "seed"
"""A third axis, of meshes along which seeds are divided; nothing is summed along it."""


class Parallel(NamedTuple):
    """How one step is divided among devices.

    Attributes:
        mesh: of the axes `AXES`, and `SEEDS` before them where seeds are divided.
        owners: for each feedback path the group of devices, along 'layer', that trains it; () where all do.
    """

    mesh: Mesh
    owners: tuple[int, ...] = ()


def make_mesh(groups: int = 1, seeds: int = 1) -> Mesh:
    """All devices of all hosts, [devices / groups, groups] along `AXES`.

    Args:
        groups: along 'layer', for one seed.
        seeds: that train together. As many as can be are divided: where some number divides both these and the devices,
            the largest one is the size of an axis `SEEDS`, and the rest goes along 'data'.

    Raises:
        ValueError: the devices can't be divided into so many groups.
    """
    devices = jax.device_count()
    if devices % groups:
        divisors = ", ".join(str(number) for number in range(1, devices + 1) if devices % number == 0)
        raise ValueError(f"got {groups}; allowed: {divisors}, which divide the {devices} devices")
    sizes = {"data": devices // groups, "layer": groups}
    if (divided := math.gcd(sizes["data"], seeds)) > 1:
        sizes = {SEEDS: divided, "data": sizes["data"] // divided, "layer": groups}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def device_memory() -> int:
    """Bytes of one device; of the CPU, all of the host's."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays and random keys of the host, the same ones on every host, on all devices."""
    return _place(NamedSharding(mesh, P()), tree)


def divide_seeds(mesh: Mesh, tree: Any) -> Any:
    """As `replicate`, of arrays whose first axis is that of seeds: each device has its own seeds, if the mesh divides
    them."""
    return _place(NamedSharding(mesh, P(SEEDS) if SEEDS in mesh.shape else P()), tree)


def gather_seeds(mesh: Mesh, tree: Any) -> Any:
    """What `divide_seeds` has divided, on all devices, where a host lacks some of it."""
    if jax.process_count() == 1 or SEEDS not in mesh.shape:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)


def _place(sharding: NamedSharding, tree: Any) -> Any:

    def place(array):
        if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def divide_rows(mesh: Mesh, array: np.ndarray, rows: np.ndarray) -> jax.Array:
    """`array[rows]`, each device with its own part of the rows, which alone its host reads.

    Args:
        mesh: of the devices.
        array: may be memory-mapped.
        rows: the last one is repeated until they can be divided evenly.
    """
    rows = np.pad(rows, (0, -len(rows) % mesh.size), mode="edge")

    def read(index):
        return array[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *array.shape[1:]), NamedSharding(mesh, P(AXES)), read)


def divide_batch(mesh: Mesh | None, tree: Any) -> Any:
    """Within a jitted function: a batch, divided along the axis 'data', also where it can't be divided evenly."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P("data")))


def keep_replicated(mesh: Mesh | None, tree: Any) -> Any:
    """Within a jitted function: whole arrays on every device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def divide_jobs(parallel: Parallel, jobs: dict[str, Callable], batches: Sequence[Any], *operands: Any) -> list[Any]:
    """`[job(batch, *operands) for job, batch in zip(jobs.values(), batches)]`, each done by the group of devices that
    owns it.

    Args:
        parallel: `owners` has a group for each job.
        jobs: functions of arrays to arrays, by the name that they have in profiles.
        batches: of each job, arrays whose first axis is divided along 'data' within the group, if it can be evenly.
        operands: the same for all jobs, on all devices.
    """
    mesh = parallel.mesh

    def divide_evenly(array):
        return divide_batch(mesh, array) if len(array) % mesh.shape["data"] == 0 else keep_replicated(mesh, array)

    def in_group(number, batches, *operands):
        results = []
        for (name, job), batch, owner in zip(jobs.items(), batches, parallel.owners, strict=True):
            shapes = jax.eval_shape(job, batch, *operands)
            nothing = lambda *_, shapes=shapes: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
            with jax.named_scope(name):
                results.append(jax.lax.cond(number[0] == owner, job, nothing, batch, *operands))
        # All but one of the terms are zero, so this sum is exact.
        return jax.lax.psum(results, "layer")

    # Along 'data' the compiler divides the work. Here each group runs a program of its own, so that only sums within
    # the group are possible, and not the exchange between all devices that an uneven division may take.
    divided = jax.shard_map(
        in_group,
        mesh=mesh,
        in_specs=(P("layer"), *(P() for _ in (batches, *operands))),
        out_specs=P(),
        axis_names={"layer"},
        check_vma=False,
    )
    return divided(jnp.arange(mesh.shape["layer"]), jax.tree.map(divide_evenly, batches), *operands)
