"""What a GPU does in a training step: kernels by kind, and the longest of them, as JAX's profiler sees them.

    python -m benchmarks.gpu_kernels --network=vgg --batch=128 --rules=bp,ldrl_fast,ldrl

Prints milliseconds a step, without and with the profiler, launches, and the share of each kind. With --json it writes
them as an object by rule.
"""

import argparse
import collections
import gzip
import json
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.step_time import CONFIGS
from benchmarks.steps import jaxdtp_step

KINDS = {"bw-filter": "kernel gradients", "cudnn-conv": "convolutions", "gemm": "matrix products"}


def kernels(trace: Path, steps: int) -> dict:
    """Kernels in a trace of so many steps.

    Args:
        trace: a *.trace.json.gz of JAX's profiler.
        steps: that it is of.

    Returns:
        By step: 'kernel_milliseconds', 'launches', 'by_kind' (milliseconds) and 'longest' (milliseconds by operation
        and kernel).
    """
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    by_kind, longest, launches = collections.Counter(), collections.Counter(), 0
    for event in events:
        place = (event.get("pid"), event.get("tid"))
        if event.get("ph") != "X" or "GPU" not in processes[place[0]] or "Stream" not in lines.get(place, ""):
            continue
        name = f"{event.get('args', {}).get('hlo_op', '')} {event['name']}"
        kind = next((kind for part, kind in KINDS.items() if part in name), "others")
        milliseconds = event["dur"] / 1e3 / steps
        by_kind[kind] += milliseconds
        longest[name[:80]] += milliseconds
        launches += 1
    return {
        "kernel_milliseconds": sum(by_kind.values()),
        "launches": launches / steps,
        "by_kind": dict(by_kind.most_common()),
        "longest": dict(longest.most_common(10)),
    }


def profile(network: str, rule: str, batch: int, steps: int) -> dict:
    """`kernels` of a rule's step on a network of `step_time`, and 'milliseconds' without the profiler."""
    published, fast = CONFIGS[network]
    config = (published if rule == "ldrl" else fast).get_config()
    config.batch_size = batch
    run = jaxdtp_step(config, rule).run
    run(steps)
    start = time.perf_counter()
    run(steps)
    alone = 1e3 * (time.perf_counter() - start) / steps
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run(steps)
        (trace,) = Path(directory).rglob("*.trace.json.gz")
        return {"milliseconds": alone} | kernels(trace, steps)


def main() -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CONFIGS, default="vgg")
    parser.add_argument("--batch", type=int, default=128, help="examples in a step (default 128)")
    parser.add_argument("--rules", default="bp,ldrl_fast", help="with commas between (default bp,ldrl_fast)")
    parser.add_argument("--precision", choices=("float32", "tensorfloat32", "bfloat16"), default="tensorfloat32")
    parser.add_argument("--steps", type=int, default=10, help="that are looked at (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is found there")
    arguments = parser.parse_args()
    found = {}
    with jax.default_matmul_precision(arguments.precision):
        for rule in arguments.rules.split(","):
            found[rule] = of_rule = profile(arguments.network, rule, arguments.batch, arguments.steps)
            kinds = ", ".join(f"{kind} {milliseconds:.3f}" for kind, milliseconds in of_rule["by_kind"].items())
            print(
                f"{arguments.network}, {rule}: {of_rule['milliseconds']:.3f} ms a step, kernels "
                f"{of_rule['kernel_milliseconds']:.3f} ms in {of_rule['launches']:.0f} launches: {kinds}",
                *(f"  {milliseconds:8.4f}  {name}" for name, milliseconds in of_rule["longest"].items()),
                sep="\n",
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
