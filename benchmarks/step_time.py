"""Time of one training step: jaxdtp's BP, published DTP and fast DTP (in its first steps, with probes, and later, with
rare ones), and PyTorch's BP and published DTP, in one run.

    python -m benchmarks.step_time --network=vgg --batch=32

Prints a table, and with --json writes it as a list of objects. --record keeps it in benchmarks/results/, from where
`python -m benchmarks.readme` takes it into the README. Without PyTorch (`pip install torch`) its rows are left out.
"""

import argparse
import importlib.util
import json
import sys

import jax

from benchmarks.flax_step import flax_step
from benchmarks.record import RESULTS, origin
from benchmarks.steps import Step, jaxdtp_step, timed, torch_step
from benchmarks.timing import matmul_peak, resident_bytes_added, summary
from configs import (
    cifar10_lenet,
    cifar10_lenet_fast,
    cifar10_resnet18_fast,
    cifar10_resnet20_fast,
    cifar10_vgg,
    cifar10_vgg_fast,
)

CONFIGS = {
    "vgg": (cifar10_vgg, cifar10_vgg_fast),
    "lenet": (cifar10_lenet, cifar10_lenet_fast),
    "resnet20": (None, cifar10_resnet20_fast),
    "resnet18": (None, cifar10_resnet18_fast),
}
"""The published settings, where there are any, and those of fast L-DRL."""
COLUMNS = "{:22} {:>9} {:>19} {:>10} {:>7} {:>9} {:>9} {:>7} {:>9}"


def build_steps(network: str, batch: int, device: str, precision: str) -> dict[str, Step]:
    """All steps by name, with the settings of the network's CIFAR-10 configurations; the published rule where it
    has settings for the network, PyTorch where it is installed."""
    published, fast = (module and module.get_config() for module in CONFIGS[network])
    for config in (published, fast):
        if config:
            config.batch_size = batch
    steps = {
        "flax_bp": flax_step(fast),
        "jaxdtp_bp": jaxdtp_step(fast, "bp"),
        "jaxdtp_dtp_fast_later": jaxdtp_step(fast, "ldrl_fast"),
    }
    if published:
        steps["jaxdtp_dtp"] = jaxdtp_step(published, "ldrl")
    torch_device = "cuda" if device == "gpu" else device
    if not torch_runs_on(torch_device):
        print(f"there is no PyTorch for {torch_device} here: its rows are left out", file=sys.stderr)
        return steps
    steps["torch_bp"] = torch_step(published or fast, "bp", torch_device, precision)
    if published:
        steps["torch_dtp"] = torch_step(published, "ldrl", torch_device, precision)
    return steps


def torch_runs_on(device: str) -> bool:
    """Whether PyTorch is installed, and for this device of PyTorch's naming."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def measure(steps: dict[str, Step], batch: int, repeats: int, device: str) -> list[dict]:
    """One object per step: name, times, images per second, memory, operations."""
    later, probing = timed(steps, repeats)
    measured = []
    for name, step in steps.items():
        if step.probing:
            measured.append((name.removesuffix("_later"), step.probing, probing[name]))
        measured.append((name, step, later[name]))
    rows = []
    for name, step, times in measured:
        seconds = summary(times)
        rows.append(
            {"name": name}
            | seconds
            | {
                "images_per_second": batch / seconds["seconds_median"],
                "peak_memory_bytes": peak_memory(step, device),
                "compile_seconds": step.compile_seconds,
                "operations": step.operations,
            }
        )
    return rows


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes that a step keeps, and needs beside that while it runs; None where that can't be measured."""
    if device == "cpu":
        added = resident_bytes_added(lambda: step.run(1))
        return None if added is None else step.kept_bytes + added
    if step.program_bytes is not None:
        return step.program_bytes
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run(1)
    return step.kept_bytes + torch.cuda.max_memory_allocated() - before


def table(rows: list[dict], peak: float) -> str:
    """The rows as text; `peak` in operations per second."""
    baseline = {row["name"]: row["seconds_median"] for row in rows}
    lines = [
        COLUMNS.format(
            "", "median s", "min to max s", "images/s", "x BP", "memory MB", "compile s", "TFLOP", "% of peak"
        )
    ]
    for row in rows:
        times_bp = row["seconds_median"] / baseline[row["name"].split("_")[0] + "_bp"]
        memory = row["peak_memory_bytes"]
        lines.append(
            COLUMNS.format(
                row["name"],
                f"{row['seconds_median']:.4f}",
                f"{row['seconds_min']:.4f} to {row['seconds_max']:.4f}",
                f"{row['images_per_second']:.1f}",
                f"{times_bp:.2f}",
                "" if memory is None else f"{memory / 1e6:.0f}",
                f"{row['compile_seconds']:.1f}",
                "" if row["operations"] is None else f"{row['operations'] / 1e12:.3f}",
                "" if row["operations"] is None else f"{100 * row['operations'] / row['seconds_median'] / peak:.0f}",
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CONFIGS, default="vgg")
    parser.add_argument("--batch", type=int, default=32, help="examples in a step (default 32)")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: JAX's own choice")
    parser.add_argument("--precision", choices=("float32", "tensorfloat32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="rounds through all steps (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(arguments.device, arguments.device))
    device = jax.default_backend()

    with jax.default_matmul_precision(arguments.precision):
        peak = matmul_peak()
        steps = build_steps(arguments.network, arguments.batch, device, arguments.precision)
        rows = measure(steps, arguments.batch, arguments.repeats, device)
        peak = max(peak, matmul_peak())
    print(
        f"{arguments.network}, batch {arguments.batch}, {jax.devices()[0].device_kind}, {arguments.precision}; "
        f"matrix products reach {peak / 1e9:.0f} GFLOP/s\n{table(rows, peak)}"
    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    if arguments.record:
        options = {name: getattr(arguments, name) for name in ("network", "batch", "precision")}
        name = "_".join(["step_time", device, *map(str, options.values())])
        command = " ".join(f"--{option}={value}" for option, value in options.items())
        result = origin(f"python -m benchmarks.step_time {command} --record") | {
            **options,
            "matmul_operations_per_second": peak,
            "rows": rows,
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
