"""Compiled programs, shared by all runs of a process that differ in nothing but numbers.

What decides a program's operations and shapes is a configuration's structure; it is compiled once for each. Numbers
(the seed, rates, beta, noise, weight decay, means of pixels, ...) are its arguments. The programs of the last `KEPT`
structures stay in memory. Seeds that train together share one program, too, by `jax.vmap`.
"""

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict

from jaxdtp.configuration.config import flatten, nest
from jaxdtp.devices.parallel import SEEDS, Parallel, device_memory
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.step import train_step
from jaxdtp.models.networks import NETWORKS
from jaxdtp.models.plain_convolutions import slow_in_loops
from jaxdtp.running import epoch
from jaxdtp.running.build import build_network, build_preprocessing, build_settings, own_model
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError

KEPT = 4

LAPACK = re.compile('custom_call_target="(lapack|blas)_')

NUMBERS = (
    "seed",
    "beta",
    "dataset.mean",
    "dataset.std",
    "forward.learning_rate",
    "forward.rate_factors",
    "forward.momentum",
    "forward.adam_betas",
    "forward.adam_epsilon",
    "forward.weight_decay",
    "forward.warmup_steps",
    "forward.schedule_epochs",
    "forward.final_learning_rate",
    "forward.schedule_milestones",
    "forward.schedule_factor",
    "feedback.noise_scale",
    "feedback.learning_rate",
    "feedback.momentum",
    "feedback.adam_betas",
    "feedback.adam_epsilon",
    "feedback.weight_decay",
    "target.damping",
    "target.tolerance",
)
"""Keys whose values are arguments of programs; of tuples, how many there are is structure."""

OUTSIDE = (
    "seeds",
    "num_epochs",
    "steps_per_epoch",
    "checkpoint_every_epochs",
    "beside",
    "trackers",
    "dataset.name",
    "dataset.data_dir",
    "dataset.cache_dir",
    "dataset.train_split",
    "dataset.validation_split",
    "dataset.test_split",
    "dataset.image_key",
    "dataset.label_key",
    "dataset.size",
    "dataset.validation_fraction",
    "dataset.device_megabytes",
    "parallel.layer_groups",
    "parallel.seeds",
    "alignment.every_epochs",
)
"""Keys that no program depends on, but by the shapes of its arguments and how it is divided."""


class Numbers(NamedTuple):
    """What programs are called with.

    Attributes:
        by_key: values of `NUMBERS`, scalars or tuples of them; the seed, where several train together, an array.
        steps_per_epoch: which learning rate schedules count in.
    """

    by_key: dict[str, Any]
    steps_per_epoch: Any


class Steps(NamedTuple):
    """A compiled program.

    Attributes:
        run: as `epoch.train_steps`.
        alone: `alone()`, whether it may run only while no other does; asked where several could. Each of LAPACK's
            routines waits for XLA's threads on the CPU; as many of them at a time as there are threads wait forever
            (jaxlib 0.10).
    """

    run: Callable
    alone: Callable[[], bool]


class Programs(NamedTuple):
    """The programs of one structure. Their first argument are numbers. For seeds that train together the arrays of what
    they don't share have one more axis, the first.

    Attributes:
        zero_metrics: `zero_metrics(step)`: metrics of a kind of step, to start a round's sums from.
        steps: `steps(step, numbers, data, order, key, state, totals)`: `Steps` for such arguments, to be called as
            `run(numbers, data, order, key, state, totals, first, count)`.
        evaluate: `epoch.evaluate`, as `evaluate(numbers, batch_size, params, model, data, order, count)`.
        measure_alignment: `epoch.measure_alignment`, as `measure_alignment(numbers, state, batch, key)`.
    """

    zero_metrics: Callable[[Callable], epoch.Metrics]
    steps: Callable[..., Steps]
    evaluate: Callable[..., epoch.Metrics]
    measure_alignment: Callable[..., epoch.Metrics]


def numbers_of(config: ConfigDict, seed: Any, steps_per_epoch: int, parallel: Parallel) -> Numbers:
    """A configuration's numbers, on all devices.

    Args:
        config: as from `config.resolve`.
        seed: one, or a list of those that train together.
        steps_per_epoch: which learning rate schedules count in.
        parallel: has the devices.
    """
    flat = flatten(config)
    numbers = Numbers({key: flat[key] for key in NUMBERS} | {"seed": np.asarray(seed, np.uint32)}, steps_per_epoch)
    # As Python's numbers do, these leave the precision to what they meet.
    arrays = jax.tree.map(jnp.asarray, numbers)
    return jax.device_put(arrays, NamedSharding(parallel.mesh, P()))


def programs_of(
    config: ConfigDict, input_shape: tuple[int, ...], num_classes: int, parallel: Parallel, *, together: bool = False
) -> Programs:
    """The programs of a configuration.

    Args:
        config: as from `config.resolve`.
        input_shape, num_classes: as in `build_network`.
        parallel: how steps are divided among devices.
        together: whether they are of several seeds at once.
    """
    flat = flatten(config)
    structure = {key: value for key, value in flat.items() if key not in OUTSIDE}
    structure |= {key: jax.tree.map(lambda _: 0, flat[key]) for key in NUMBERS}
    # JAX's own switches change programs, too.
    switches = tuple(sorted((name, repr(value)) for name, value in jax.config.values.items()))
    # What names stand for may have changed since, in a user's file or a notebook.
    meant = (own_model(config) or NETWORKS[config.network.name], ALGORITHMS[config.algorithm])
    return _programs(FrozenConfigDict(nest(structure)), meant, input_shape, num_classes, parallel, together, switches)


@functools.lru_cache(maxsize=KEPT)
def _programs(
    structure: FrozenConfigDict,
    meant: Any,
    input_shape: tuple[int, ...],
    num_classes: int,
    parallel: Parallel,
    together: bool,
    switches: Any,
) -> Programs:
    del meant, switches
    values = flatten(structure)
    network = build_network(nest(values), input_shape, num_classes)

    def fixed(step: Callable, numbers: Numbers) -> epoch.Fixed:
        config = nest(values | numbers.by_key)
        settings = build_settings(config, network, numbers.steps_per_epoch)._replace(parallel=parallel)
        return epoch.Fixed(step, network, settings, build_preprocessing(config), structure.batch_size)

    def by_seed(run: Callable) -> Callable:
        """`run(numbers, *arguments)`, of several seeds if they train together."""
        if not together:
            return run
        axis = SEEDS if SEEDS in parallel.mesh.shape else None
        of_numbers = Numbers({key: 0 if key == "seed" else None for key in NUMBERS}, None)
        return lambda numbers, *arguments: jax.vmap(run, (of_numbers, *(0 for _ in arguments)), spmd_axis_name=axis)(
            numbers, *arguments
        )

    def one_step(step, numbers, data, order, key, state, totals, index):
        # One number for all seeds (what has diverged is behind, and stays as it is), so that what isn't due in a step
        # isn't done: `jax.vmap` does both sides of a condition that each seed has its own of.
        count = jnp.max(state.step)

        def run(numbers, order, key, state, totals):
            state = state.replace(step=count)
            return epoch.one_step(fixed(step, numbers), data, order, key, state, totals, index)

        return by_seed(run)(numbers, order, key, state, totals)

    def train_steps(step, numbers, data, order, key, state, totals, first, count):
        def of_index(state, totals, index):
            return one_step(step, numbers, data, order, key, state, totals, index)

        return epoch.steps_in_loop(of_index, state, totals, first, count)

    @functools.cache
    def zero_metrics(step):
        some = Numbers({key: values[key] for key in NUMBERS}, 1)
        return epoch.zero_metrics(fixed(step, some))

    compiled = {}

    def steps(step, numbers, *others):
        arguments = (numbers, *others)
        shapes = jax.tree.map(lambda array: (jnp.shape(array), jnp.result_type(array)), arguments)
        kind = (step, str(shapes))
        if kind not in compiled:
            start = time.perf_counter()
            one, many = (functools.partial(run, step) for run in (one_step, train_steps))
            what = f"config.batch_size: got {structure.batch_size}"
            if together:
                what += f" with {len(numbers.by_key['seed'])} seeds together (config.parallel.seeds)"
            compiled[kind] = _compile(one, many, arguments, what)
            say(f"{step.__name__} compiled in {time.perf_counter() - start:.1f} s")
        return compiled[kind]

    @functools.partial(jax.jit, static_argnums=1)
    def evaluate(numbers, batch_size, params, model, data, order, count):
        def run(numbers, params, model, order):
            preprocessing = fixed(train_step, numbers).preprocessing
            return epoch.evaluate(network, preprocessing, batch_size, parallel.mesh, params, model, data, order, count)

        return by_seed(run)(numbers, params, model, order)

    @jax.jit
    def measure_alignment(numbers, *arguments):
        def run(numbers, *arguments):
            _, _, settings, preprocessing, _ = fixed(train_step, numbers)
            what = (structure.alignment.probes, structure.alignment.gauss_newton)
            return epoch.measure_alignment(network, settings, preprocessing, *what, *arguments)

        return by_seed(run)(numbers, *arguments)

    return Programs(zero_metrics, steps, evaluate, measure_alignment)


def _compile(one_step: Callable, train_steps: Callable, arguments: tuple, what: str) -> Steps:
    """The program for such arguments as its first ones; of one step at a time where XLA is slow at what is in loops.

    Raises:
        ConfigError: it takes more memory than a device has.
    """
    if jax.config.values["jax_disable_jit"]:
        return Steps(epoch.steps_one_by_one(one_step), alone=lambda: True)
    of_one, of_many = (jax.jit(run, donate_argnums=(4, 5)) for run in (one_step, train_steps))
    traced = of_one.trace(*arguments, 0)
    singly = slow_in_loops(traced.jaxpr)
    program = (traced if singly else of_many.trace(*arguments, 0, 0)).lower().compile()
    size = program.memory_analysis()
    needed = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    if size.temp_size_in_bytes + needed > device_memory():
        raise ConfigError(
            f"{what}, which needs {(size.temp_size_in_bytes + needed) / 1e9:.3g} GB of "
            f"each device; allowed: what fits into {device_memory() / 1e9:.3g} GB"
        )
    run = epoch.steps_one_by_one(program) if singly else program
    return Steps(run, alone=functools.cache(lambda: LAPACK.search(program.as_text()) is not None))
