"""Everything that wants a GPU, in calls of a few minutes: step times, rows of `benchmarks.tables` in TF32, figures.

    python -m benchmarks.gpu_runs --minutes=9 --data_dir=DIR --out=DIR

Step times come first, alone, then what takes too long on a CPU, as many runs at a time as --at_once says: while one
starts and compiles, the GPU does the others' steps; where NVIDIA's MPS runs (`nvidia-cuda-mps-control -d`), they share
it instead of taking turns. What is finished is skipped, and a run that the last call cut short goes on from its
checkpoint: call it until it says that everything is done. Results are kept in benchmarks/results/ and, where --out is
given, in OUT/results.tar.gz. --small does the same with a few steps of a few images, to try it on a CPU.
"""

import argparse
import os
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks import published
from benchmarks.record import RESULTS
from benchmarks.tables import ROWS

TRAINING = ("--config.matmul_precision=tensorfloat32",)
SMALL_TRAINING = ("--config.num_epochs=2", "--config.steps_per_epoch=2", "--config.batch_size=8")
STEP_TIMES = [
    ["--network=vgg", "--batch=128", "--precision=float32"],
    ["--network=vgg", "--batch=128", "--precision=tensorfloat32"],
    ["--network=resnet20", "--batch=128", "--precision=tensorfloat32"],
    ["--network=resnet18", "--batch=128", "--precision=tensorfloat32"],
    ["--network=lenet", "--batch=256", "--precision=tensorfloat32"],
]
SMALL_STEP_TIMES = [["--network=lenet", "--batch=2", "--repeats=1"]]


def once(workdir: Path, name: str, command: list[str], deadline: float) -> bool:
    """Run `python COMMAND` unless it has been done; whether it ended well, before the deadline."""
    done = workdir / f"{name}.done"
    if not done.exists() and published.run_until(deadline, command, workdir / f"{name}.log") == 0:
        done.touch()
    return done.exists()


def measurements(arguments: argparse.Namespace, deadline: float) -> list[Callable[[], bool]]:
    """Step times."""
    tasks = []
    for options in SMALL_STEP_TIMES if arguments.small else STEP_TIMES:
        name = "step_time" + "".join(options).replace("-", "")
        keep = ["--json", f"{arguments.workdir / name}.json"] if arguments.small else ["--record"]
        command = ["-m", "benchmarks.step_time", *options, *keep]
        tasks.append(partial(once, arguments.workdir, name, command, deadline))
    return tasks


def trainings(arguments: argparse.Namespace, deadline: float) -> list[Callable[[], bool]]:
    """The rows that are missing, in the order in which they are asked for, else those first that need a GPU; after all
    rows the alignment figures."""
    workdir, small, data_dir = arguments.workdir, arguments.small, arguments.data_dir
    options = TRAINING + (SMALL_TRAINING if small else ())
    wanted = arguments.rows.split(",") if arguments.rows else []
    order = {name: place for place, name in enumerate(wanted)}
    rows = sorted(
        (row for row in ROWS if not wanted or row.name in order), key=lambda row: order.get(row.name, not row.gpu)
    )
    tasks = [
        partial(published.train, row, workdir, data_dir, options, deadline, keep=not small, log=True)
        for row in rows
        if published.is_missing(row)
    ]
    if small or wanted:
        return tasks
    figures = ["-m", "benchmarks.feedback_training", f"--data_dir={data_dir}", f"--workdir={workdir}"]
    return [*tasks, partial(once, workdir, "feedback_training", figures, deadline)]


def work(deadline: float, arguments: argparse.Namespace) -> bool:
    """Do what is left, as far as the time (`time.monotonic`) allows; whether everything is done."""
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    alone = [] if arguments.rows else measurements(arguments, deadline)
    done = [task() for task in alone]
    # Each process takes this share of the GPU's memory at its start.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / arguments.at_once:.3f}"
    with ThreadPoolExecutor(arguments.at_once) as pool:
        return all([*done, *pool.map(lambda task: task(), trainings(arguments, deadline))])


def main() -> None:
    """Work until everything is done or time is up."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for this call (default 9)")
    parser.add_argument("--at_once", type=int, default=4, help="runs at a time (default 4)")
    parser.add_argument("--rows", default="", help="names, with commas between, and nothing else (default: all)")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    parser.add_argument("--workdir", type=Path, default=Path("runs/gpu"), help="of unfinished work (default runs/gpu)")
    parser.add_argument("--out", type=Path, help="where results.tar.gz goes")
    parser.add_argument("--small", action="store_true", help="try the script; nothing is recorded")
    arguments = parser.parse_args()
    done = work(start + 60 * arguments.minutes, arguments)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(arguments.out / "results.tar.gz", "w:gz") as archive:
            archive.add(RESULTS, "results")
            for path in (*arguments.workdir.glob("*/metrics.jsonl"), *arguments.workdir.glob("*.log")):
                archive.add(path, path.relative_to(arguments.workdir))
    print("everything is done" if done else "time is up, or something failed: the same command goes on from here")


if __name__ == "__main__":
    main()
