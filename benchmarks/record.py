"""Keep a run that has ended or diverged, or a search: `python -m benchmarks.record WORKDIR NAME "COMMAND" [PLOT ...]`.

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
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


def record(workdir: Path, name: str, command: str, plots: list[str]) -> Path:
    """Write the result of the run or search in `workdir` and return its path."""
    if (workdir / "trials.json").exists():
        result = {"trials": json.loads((workdir / "trials.json").read_text())["trials"]}
    else:
        # A run that diverged has no summary.
        files = [path for path in (workdir / "summary.json", workdir / "config.json") if path.exists()]
        parts = {path.stem: json.loads(path.read_text()) for path in files}
        epochs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        result = parts | {"epochs": [rounded(epoch) for epoch in epochs]}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(in_lines(origin(command) | result))
    for plot in plots:
        shutil.copy(workdir / "plots" / f"{plot}.png", RESULTS / f"{name}-{plot}.png")
    return path


def rounded(value: Any) -> Any:
    """What is measured in an epoch, to six digits."""
    if isinstance(value, dict):
        return {key: rounded(of_key) for key, of_key in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def in_lines(result: dict) -> str:
    """A result as JSON, with a line for each epoch."""
    head = json.dumps({key: value for key, value in result.items() if key != "epochs"}, indent=1)
    if "epochs" not in result:
        return f"{head}\n"
    epochs = ",\n  ".join(json.dumps(epoch) for epoch in result["epochs"])
    return f'{head[:-2]},\n "epochs": [\n  {epochs}\n ]\n}}\n'


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


def spread(values: Any) -> Any:
    """The standard deviation over seeds, the first axis, with n - 1; 0 of one seed."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros(np.shape(values)[1:])


def mean_and_std(values: list[float]) -> str:
    """Values of several seeds in a table."""
    deviation = f" ± {spread(values):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}" if values else "-"


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    print(record(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
