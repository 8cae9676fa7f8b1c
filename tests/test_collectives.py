"""What compiled programs send, and the model of a step's time on many devices."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from benchmarks import cost_model, parallel
from benchmarks.collectives import collectives
from benchmarks.cost_model import Machine, Mesh
from benchmarks.steps import CLASSES, IMAGE, configure, operations
from configs import cifar10_vgg, cifar10_vgg_fast
from jaxdtp.running.build import build_network

ROOT = Path(__file__).parents[1]

# Virtual devices must be asked for before JAX starts, so programs are compiled in a process of their own.
PROGRAMS = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from benchmarks import parallel
from benchmarks.cost_model import Mesh
from configs import digits_mlp
from pathlib import Path

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((8, 10), jnp.float32)

def program(function, sharding=P(("a", "b")), out=P(("a", "b"))):
    function = jax.shard_map(function, mesh=mesh, in_specs=sharding, out_specs=out, check_vma=False)
    return jax.jit(function).lower(x).compile().as_text()

def loop(axes, times):
    return lambda x: lax.fori_loop(0, times, lambda i, x: jnp.sin(lax.psum(x, axes)), x)

def nested(x):
    return lax.fori_loop(0, 3, lambda i, x: loop("b", 5)(jnp.cos(lax.psum(x, "a"))), x)

def until_small(x):
    return lax.while_loop(lambda x: x[0, 0] > 1e-3, lambda x: lax.psum(x, "b") / 8, x)

def of_groups(x):
    def of_group(index, times):
        with jax.named_scope(f"block{index}"):
            return lax.cond(lax.axis_index("b") == index, loop("a", times), jnp.zeros_like, x)
    return lax.psum(of_group(0, 7) + of_group(1, 9), "b")

replicated, sharded = (jax.NamedSharding(mesh, spec) for spec in (P(), P(("a", "b"))))
product = jax.jit(lambda x: x.T @ x, in_shardings=sharded, out_shardings=replicated)
programs = {
    "loop": program(loop(("a", "b"), 7)),
    "once": program(loop("a", 1)),
    "nested": program(nested),
    "until_small": program(until_small),
    "of_groups": program(of_groups),
    "all_gather": program(lambda x: lax.all_gather(x, "b", tiled=True), out=P("a")),
    "reduce_scatter": program(lambda x: lax.psum_scatter(x, "b", tiled=True), P("a"), P(("a", "b"))),
    "all_to_all": program(lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), P("a"), P("a")),
    "permute": program(lambda x: lax.ppermute(x, "b", [(0, 1), (1, 2)])),
    "product": product.lower(x).compile().as_text(),
}
Path(sys.argv[1], "programs.json").write_text(json.dumps(programs))

class Small:
    def __init__(self, algorithm, **feedback):
        self.algorithm, self.feedback = algorithm, feedback

    def get_config(self):
        config = digits_mlp.get_config()
        config.algorithm, config.network.hidden, config.batch_size = self.algorithm, (6, 5), 16
        config.feedback.update(self.feedback)
        return config

parallel.CONFIGS = {
    "published": Small("ldrl", iterations=(7, 2)),
    "fast": Small("ldrl_fast", iterations=(1,), batch_share=(0.5,)),
}
parallel.RESULTS = Path(sys.argv[1])
for config, parallel.COMPILED in (("published", [Mesh(4, 2)]), ("fast", [Mesh(8, 1), Mesh(4, 2)])):
    sys.argv[1:] = [f"--config={config}", "--record"]
    parallel.main()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Directory with programs.json and what `benchmarks.parallel` has recorded of small networks."""
    directory = tmp_path_factory.mktemp("programs")
    command = [sys.executable, "-c", PROGRAMS, str(directory)]
    # Machine code as it comes: the programs are read, not run.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return directory


# Each device has 10 numbers of 40 bytes, and a ring of n sends 2 (n-1)/n of them; a, b: axes of 2 and 4 devices.
ALL, A, B = 70.0, 40.0, 60.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loop", [("all-reduce", 8, True, (), 7, 7 * ALL)]),
        ("once", [("all-reduce", 2, False, (), 1, A)]),
        ("nested", [("all-reduce", 2, True, (), 3, 3 * A), ("all-reduce", 4, True, (), 15, 15 * B)]),
        ("all_gather", [("all-gather", 4, False, (), 1, 3 * 40)]),
        ("reduce_scatter", [("reduce-scatter", 4, False, (), 1, 3 * 40)]),
        ("all_to_all", [("all-to-all", 4, False, (), 1, 3 * 40)]),
        ("permute", [("collective-permute", 6, False, (), 1, 40)]),  # three of each four, in two rows
        ("product", [("all-reduce", 8, False, (), 1, 10 * ALL)]),
    ],
)
def test_a_program_sends_what_it_was_written_to_send(results, name, expected):
    program = json.loads((results / "programs.json").read_text())[name]
    assert collectives(program) == expected


def test_branches_are_told_apart(results):
    program = json.loads((results / "programs.json").read_text())["of_groups"]
    found = collectives(program)
    blocks = ["block0", "block1"]
    sent = {own: sum(item.bytes_sent for item in found if parallel.executes([own], blocks, item)) for own in blocks}
    assert sent == {"block0": 7 * A + B, "block1": 9 * A + B}
    in_branch = next(item for item in found if item.branches)
    for names in (["block3"], ["block0", "cond"]):  # nobody's block, or that of two
        with pytest.raises(ValueError, match="allowed: one block"):
            parallel.executes(names, names, in_branch)


def test_a_loop_of_unknown_length_is_refused(results):
    program = json.loads((results / "programs.json").read_text())["until_small"]
    with pytest.raises(ValueError, match=r"loop while.*: there are collectives in it, and no telling how often"):
        collectives(program)
    collectives(program.replace("all-reduce(", "negate("))


@pytest.mark.parametrize(
    ("start", "step", "direction", "rounds"), [(0, 1, "LT", 9), (2, 1, "LT", 7), (0, 2, "LT", None), (0, 1, "GT", None)]
)
def test_loops_of_tpu_programs(start, step, direction, rounds):
    """As the TPU compiler writes them: without known_trip_count, with the number of rounds in the condition."""
    program = f"""HloModule m, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[]{{:T(128)}} parameter(0)
  %y = f32[]{{:T(128)}} parameter(1)
  ROOT %sum = f32[]{{:T(128)}} add(%x, %y)
}}

%body (p.1: (s32[], f32[3,5])) -> (s32[], f32[3,5]) {{
  %p.1 = (s32[]{{:T(128)}}, f32[3,5]{{1,0:T(8,128)S(1)}}) parameter(0)
  %one = s32[]{{:T(128)}} constant({step})
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %next = s32[]{{:T(128)}} add(%i.1, %one)
  %values = f32[3,5]{{1,0:T(8,128)S(1)}} get-tuple-element(%p.1), index=1
  %reduced = f32[3,5]{{1,0:T(8,128)S(1)}} all-reduce(%values), replica_groups={{}}, to_apply=%add
  ROOT %tuple.1 = (s32[]{{:T(128)}}, f32[3,5]{{1,0:T(8,128)S(1)}}) tuple(%next, %reduced)
}}

%condition (p.2: (s32[], f32[3,5])) -> pred[] {{
  %nine = s32[]{{:T(128)}} constant(9)
  %p.2 = (s32[]{{:T(128)}}, f32[3,5]{{1,0:T(8,128)S(1)}}) parameter(0)
  %i.2 = s32[]{{:T(128)}} get-tuple-element(%p.2), index=0
  ROOT %goes.on = pred[]{{:T(512)}} compare(%i.2, %nine), direction={direction}
}}

ENTRY %main (p: f32[3,5]) -> (s32[], f32[3,5]) {{
  %p = f32[3,5]{{1,0:T(8,128)}} parameter(0)
  %start = s32[]{{:T(128)}} constant({start})
  %copied = s32[]{{:T(128)}} copy(%start)
  %tuple = (s32[]{{:T(128)}}, f32[3,5]{{1,0:T(8,128)}}) tuple(%copied, %p)
  ROOT %while = (s32[]{{:T(128)}}, f32[3,5]{{1,0:T(8,128)}}) while(%tuple), condition=%condition, body=%body
}}
"""
    if rounds is None:
        with pytest.raises(ValueError, match="loop while: "):
            collectives(program)
    else:
        assert collectives(program) == [("all-reduce", 4, True, (), rounds, rounds * 1.5 * 60)]


def program_of(instruction, computations=""):
    return f"""HloModule m, is_scheduled=true, replica_count=2, num_partitions=4
{computations}
ENTRY %main (x: f32[6,2], y: bf16[5]) -> f32[6,2] {{
  %x = f32[6,2]{{1,0}} parameter(0)
  %y = bf16[5]{{0:T(8,128)(2,1)}} parameter(1)
  {instruction}
  ROOT %result = f32[6,2]{{1,0}} copy(%x)
}}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("{{0},{1}}", 1),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", 2),
    ],
)
def test_ways_of_writing_groups(groups, devices):
    found = collectives(program_of(f"%r = f32[6,2]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, a=%b"))
    size = 6 * 2 * 4
    assert found == (
        [] if devices == 1 else [("all-reduce", devices, False, (), 1, 2 * (devices - 1) / devices * size)]
    )


ASYNCHRONOUS = """
%inside (v: f32[6,2]) -> f32[6,2] {
  %v = f32[6,2]{1,0} parameter(0)
  ROOT %moved = f32[6,2]{1,0} all-to-all(%v), replica_groups={{0,1,2}}, dimensions={0}
}
"""


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (
            "%s = (f32[6,2]{1,0}, /*index=1*/bf16[5]{0:T(8,128)(2,1)}) all-reduce-start(%x, /*index=1*/%y), "
            "replica_groups={{0,1}}, to_apply=%add\n"
            "  %d = (f32[6,2]{1,0}, bf16[5]{0:T(8,128)(2,1)}) all-reduce-done(%s)",
            ("all-reduce", 2, 48 + 10),
        ),
        (
            "%s = ((f32[6,2]{1,0}), f32[12,2]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}\n"
            "  %d = f32[12,2]{1,0} all-gather-done(%s)",
            ("all-gather", 2, 48),
        ),
        (
            "%s = (bf16[5]{0}, bf16[5]{0}, u32[], u32[]) collective-permute-start(%y), "
            "source_target_pairs={{0,1},{1,0},{2,2}}",
            ("collective-permute", 2, 10),
        ),
        (
            "%s = ((f32[6,2]{1,0}), f32[6,2]{1,0}, s32[]) async-start(%x), calls=%inside\n"
            "  %d = f32[6,2]{1,0} async-done(%s)",
            ("all-to-all", 3, 32),
        ),
    ],
)
def test_asynchronous_forms_count_once(instruction, expected):
    kind, devices, sent = expected
    assert collectives(program_of(instruction, ASYNCHRONOUS)) == [(kind, devices, False, (), 1, sent)]


def test_an_uncounted_kind_is_refused():
    with pytest.raises(ValueError, match=r"instruction b: got collective-broadcast; allowed: all-reduce, .*"):
        collectives(program_of("%b = f32[6,2]{1,0} collective-broadcast(%x), replica_groups={{0,1}}"))


def test_a_step_sends_what_the_formulas_say(results):
    """Dense blocks 3072-6-5-10: kernels of 30 and 50 numbers with feedback."""
    published = json.loads((results / "parallel_published.json").read_text())
    (counted,) = published["counted"]
    assert (counted["data"], counted["layers"]) == (4, 2)
    forward = 3072 * 6 + 6 + 30 + 5 + 50 + 10
    # Parameters, momentum and loss of both blocks; and forward gradients with three activations, loss and accuracy.
    rest = 2 * 1 / 2 * 4 * 2 * (30 + 6 + 50 + 5 + 1) + 2 * 3 / 4 * 4 * (forward + 5)
    for group in counted["groups"]:
        (name,) = group["blocks"]
        iterations, kernel = {"fc2": (7, 30), "fc3": (2, 50)}[name]
        assert group["feedback"] == {
            "count": iterations,
            "bytes_sent": iterations * 2 * 3 / 4 * 4 * (2 * kernel + 1),
        }
        assert group["rest"] == {"count": 2, "bytes_sent": rest}
    for name in ("published", "fast"):
        result = json.loads((results / f"parallel_{name}.json").read_text())
        for counted in result["counted"]:
            for group in counted["groups"]:
                assert group["all_reduces"] == pytest.approx(group["predicted"], rel=result["tolerance"])
        assert [point["devices"] for point in result["curves"][0]["points"]][-1] == 4096
        assert (results / f"parallel_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", [cifar10_vgg, cifar10_vgg_fast])
def test_costs_are_the_operations_of_a_step(module):
    config = configure(module.get_config(), module.get_config().algorithm)
    blocks = cost_model.block_costs(config)
    passes = config.batch_size * sum(block.maps * block.operations for block in blocks)
    feedback = sum(cost_model.operations(block, config.batch_size) for block in blocks)
    assert passes + feedback == pytest.approx(operations(build_network(config, IMAGE, CLASSES), config))


@hypothesis.given(
    strategies.lists(strategies.floats(0, 1e6), min_size=1, max_size=8), strategies.integers(min_value=1, max_value=8)
)
def test_groups_have_every_block_once_and_are_balanced(costs, groups):
    costs = dict(enumerate(costs))
    assigned = cost_model.assign(costs, groups)
    assert len(assigned) == groups
    assert sorted(itertools.chain(*assigned)) == sorted(costs)
    loads = [sum(costs[name] for name in names) for names in assigned]
    # What the last block of the fullest group found there was at most the mean.
    assert max(loads) <= sum(loads) / groups + max(costs.values()) + 1e-6


IDEAL = Machine("ideal", 1e12, math.inf, 0.0, 8, math.inf, 0.0, math.inf, 0.0)


@pytest.fixture(scope="module")
def vgg():
    return cost_model.block_costs(configure(cifar10_vgg.get_config(), "ldrl"))


def test_without_latency_and_traffic_data_parallelism_is_perfect(vgg):
    alone = cost_model.step_seconds(IDEAL, vgg, 128, Mesh(1, 1)).total
    for devices in (2, 16, 128):
        assert cost_model.best_mesh(IDEAL, vgg, devices, 128) == Mesh(devices, 1)
        assert cost_model.step_seconds(IDEAL, vgg, 128, Mesh(devices, 1)).total == pytest.approx(alone / devices)


def test_groups_share_feedback_training_alone(vgg):
    alone, shared = (cost_model.step_seconds(IDEAL, vgg, 128, Mesh(1, layers)) for layers in (1, 5))
    assert shared.passes == alone.passes
    of_blocks = [cost_model.operations(block, 128) for block in vgg]
    assert shared.feedback / alone.feedback == pytest.approx(max(of_blocks) / sum(of_blocks))


def test_slow_links_favour_layers_and_slower_ones_a_single_device(vgg):
    slow = IDEAL._replace(link=1e9, network=1e9)
    assert cost_model.best_mesh(slow, vgg, 4, 128).data == 1
    assert cost_model.best_mesh(slow, vgg, 4, 128).layers > 1
    assert cost_model.best_mesh(slow._replace(link=1e3), vgg, 4, 128) == Mesh(1, 1)


@pytest.mark.parametrize("machine", cost_model.MACHINES)
def test_more_devices_never_slow_the_fastest_mesh_down(machine, vgg):
    seconds = []
    for devices in (1, 2, 4, 8, 64, 4096):
        mesh = cost_model.best_mesh(machine, vgg, devices, 128)
        assert mesh.data * mesh.layers <= devices
        seconds.append(cost_model.step_seconds(machine, vgg, 128, mesh).total)
    assert seconds == sorted(seconds, reverse=True)


def test_an_all_reduce_leaves_its_domain_when_it_must(vgg):
    """Data shards of 8 devices beside 4 groups fill 4 nodes, with 2 devices of each group in a node."""
    machine = IDEAL._replace(link=100.0, network=10.0)
    exchange = cost_model.Exchange("forward", 8, 1, 800.0)
    sent = 2 * 7 / 8 * 800
    assert cost_model.exchange_seconds(machine, Mesh(8, 1), exchange) == pytest.approx(sent / 100)
    assert cost_model.exchange_seconds(machine, Mesh(8, 4), exchange) == pytest.approx(sent / (2 * 10))
