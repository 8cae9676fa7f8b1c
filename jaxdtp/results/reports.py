"""What a run tells: a line per epoch on the console, metrics.jsonl, summary.json and the closing table."""

import json
import math
from typing import Any

from etils import epath

from jaxdtp.system import storage

Record = dict[str, Any]
"""One epoch's metrics by name; those of a block are named 'metric/block'. Of many seeds see `statistics.over_seeds`."""

MANY = 10
"""More blocks or layers than that are not told one by one."""

_COLUMNS = (
    # heading, key, format
    ("epoch", "epoch", "{:d}"),
    ("train loss", "train_loss", "{:.4f}"),
    ("train %", "train_top1", "{:.2f}"),
    ("valid loss", "validation_loss", "{:.4f}"),
    ("valid %", "validation_top1", "{:.2f}"),
    ("rate", "learning_rate", "{:.4g}"),
    ("images/s", "images_per_second", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
)


def console_heading() -> str:
    """The headings above `console_line`."""
    return " ".join(f"{heading:>10}" for heading, _, _ in _COLUMNS) + "  weight angles"


def console_line(record: Record) -> str:
    """One epoch in one line, aligned with `console_heading`; '-' for what the run doesn't have."""
    cells = []
    for _, key, template in _COLUMNS:
        scale = 100 if key.endswith("top1") else 1
        cell = template.format(scale * record[key]) if key in record else "-"
        if key.endswith("top1") and key in record.get("std", {}):
            cell += f"±{template.format(scale * record['std'][key])}"
        cells.append(cell)
    angles = sorted(of_blocks(record, "weight_angle").values())
    if len(angles) > MANY:
        shown = f"median {angles[len(angles) // 2]:.0f}°, largest {angles[-1]:.0f}° of {len(angles)}"
    else:
        shown = " ".join(f"{angle:.0f}°" for angle in of_blocks(record, "weight_angle").values())
    if "diverged" in record:
        shown += f"  diverged: {', '.join(record['diverged'])}"
    return " ".join(f"{cell:>10}" for cell in cells) + "  " + shown


def target_warnings(record: Record) -> list[str]:
    """A line for each block whose inverse iterations (`jaxdtp.learning.inverse`) don't converge."""
    contraction, stopped = of_blocks(record, "target_contraction"), of_blocks(record, "target_diverged")
    return [
        f"  the inverse iterations of block {block} don't converge: steps grow by a factor of {factor:.2f}, "
        f"{stopped[block]:.0%} of the examples were stopped"
        for block, factor in contraction.items()
        if factor >= 1
    ]


def flat_metrics(metrics: dict[str, Any], prefix: str = "") -> Record:
    """Numbers by name: `prefix` + metric, or metric/block for the metrics that come by block."""
    flat: Record = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{block}": float(of_block) for block, of_block in value.items()}
        else:
            flat[prefix + name] = float(value)
    return flat


def of_blocks(record: Record, metric: str) -> dict[str, float]:
    """The values of a metric by the name of the block or layer."""
    return {key.split("/")[1]: value for key, value in record.items() if key.startswith(f"{metric}/")}


def numbers(record: Record) -> dict[str, float]:
    """What of a record, or of a summary, is a number."""
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def read_records(workdir: epath.Path, last_step: float = math.inf) -> list[Record]:
    """The epochs of metrics.jsonl up to step `last_step`: a killed run may have written more epochs, and half a line,
    than its last checkpoint knows of."""
    records: list[Record] = []
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


def write_records(workdir: epath.Path, records: list[Record]) -> None:
    """Write metrics.jsonl, all of it: object storage can't append."""
    storage.write(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def summary_table(summary: Record) -> str:
    """The closing table."""
    rows = {
        "test accuracy": accuracy_in_words(summary),
        "test loss": f"{summary['test_loss']:.4f}",
        "best epoch": f"{summary['best_epoch']:g}",
        "training time": f"{summary['seconds']:.1f} s",
        "speed": f"{summary['images_per_second']:.0f} images/s",
    }
    if "test_top5" in summary:
        rows["test top-5"] = f"{summary['test_top5']:.2%}"
    if "test_accuracy" in summary.get("ci95", {}):
        accuracy, half = summary["test_accuracy"], summary["ci95"]["test_accuracy"]
        rows["95 % interval"] = f"{accuracy - half:.2%} to {accuracy + half:.2%}"
    for seed, metrics in summary.get("seeds", {}).items():
        rows[f"seed {seed}"] = f"{metrics['test_accuracy']:.2%}"
    rows |= {f"seed {seed}": f"diverged: {why}" for seed, why in summary.get("diverged", {}).items()}
    width = max(len(value) for value in rows.values())
    return "\n".join(f"  {name:<14} {value:>{width}}" for name, value in rows.items())


def accuracy_in_words(summary: Record) -> str:
    """A run's test accuracy, of many seeds the mean and the standard deviation."""
    spread = summary.get("std", {}).get("test_accuracy")
    return f"{summary['test_accuracy']:.2%}" + (f" ± {spread:.2%}" if spread is not None else "")
