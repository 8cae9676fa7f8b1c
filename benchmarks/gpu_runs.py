"""Everything that wants a GPU, in calls of a few minutes each: step times, and runs of `benchmarks.tables` in TF32.

    python -m benchmarks.gpu_runs --minutes=9 --data_dir=DIR --out=DIR

Rows that take too long on a CPU come first. What is finished (or failed) is skipped, and a run that the last call cut
short goes on from its checkpoint: call it until it says that everything is done. Results are kept in
benchmarks/results/ and, where --out is given, in OUT/results.tar.gz. --small does the same with a few steps of a few
images, to try it on a CPU.
"""

import argparse
import tarfile
import time
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


def work(deadline: float, workdir: Path, small: bool, data_dir: str) -> bool:
    """Do what is left, as far as the time (`time.monotonic`) allows; whether everything is done."""
    workdir.mkdir(parents=True, exist_ok=True)
    for options in SMALL_STEP_TIMES if small else STEP_TIMES:
        done = workdir / ("step_time" + "".join(options).replace("-", ""))
        if not done.exists():
            keep = ["--json", str(done) + ".json"] if small else ["--record"]
            if published.run_until(deadline, ["-m", "benchmarks.step_time", *options, *keep]) is None:
                return False
            done.touch()
    for row in sorted(ROWS, key=lambda row: not row.gpu):
        done = workdir / f"{row.name}-{row.rule}.done"
        if done.exists() or len(published.kept(row)[0]) >= row.seeds:
            continue
        options = TRAINING + (SMALL_TRAINING if small else ())
        if not published.train(row, workdir, data_dir, options, deadline, keep=not small):
            return False
        done.touch()
    return True


def main() -> None:
    """Work until everything is done or time is up."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for this call (default 9)")
    parser.add_argument("--data_dir", default="", help="of TFDS; empty: its own default")
    parser.add_argument("--workdir", type=Path, default=Path("runs/gpu"), help="of unfinished work (default runs/gpu)")
    parser.add_argument("--out", type=Path, help="where results.tar.gz goes")
    parser.add_argument("--small", action="store_true", help="try the script; nothing is recorded")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    done = work(start + 60 * arguments.minutes, arguments.workdir, arguments.small, arguments.data_dir)
    if arguments.out:
        with tarfile.open(arguments.out / "results.tar.gz", "w:gz") as archive:
            archive.add(RESULTS, "results")
            for path in arguments.workdir.glob("*/metrics.jsonl"):
                archive.add(path, f"{path.parent.name}/metrics.jsonl")
    print("everything is done" if done else "time is up: the same command goes on from here")


if __name__ == "__main__":
    main()
