"""Keep a finished run, or a search, as a result: `python -m benchmarks.record WORKDIR NAME "COMMAND" [PLOT ...]`.

Writes benchmarks/results/NAME.json with the run's summary, epochs and configuration, or a search's trials, and machine,
versions, date and command, and copies those of its plots that are named (`accuracy`, ...) beside it as NAME-PLOT.png.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


def record(workdir: Path, name: str, command: str, plots: list[str]) -> Path:
    """Write the result of the run or search in `workdir` and return its path."""
    if (workdir / "trials.json").exists():
        result = {"trials": json.loads((workdir / "trials.json").read_text())["trials"]}
    else:
        result = {
            "summary": json.loads((workdir / "summary.json").read_text()),
            "config": json.loads((workdir / "config.json").read_text()),
            "epochs": [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        }
    result = origin(command) | result
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for plot in plots:
        shutil.copy(workdir / "plots" / f"{plot}.png", RESULTS / f"{name}-{plot}.png")
    return path


def origin(command: str) -> dict:
    """Where a result comes from: command, date, machine and versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
            **({"torch": importlib.metadata.version("torch")} if importlib.util.find_spec("torch") else {}),
        },
    }


def mean_and_std(values: list[float]) -> str:
    """Values of several seeds in a table."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}" if values else "-"


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    print(record(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
