"""Figures of a run, from its metrics."""

import io
import math

from etils import epath
from matplotlib import colormaps

# Not pyplot, whose backend and open figures are the user's.
from matplotlib.figure import Figure

from jaxdtp.results.reports import MANY, Record, of_blocks
from jaxdtp.system import storage

_COLOURS = [colormaps["tab10"](index) for index in range(10)]


def plot_run(workdir: epath.Path, records: list[Record], title: str, start: Record | None = None) -> list[epath.Path]:
    """Write the PNGs of a run into workdir/plots: accuracy, losses and, where feedback is learned, its losses,
    the angles between forward and feedback weights and what was measured of Jacobians, updates and targets, all over
    epochs.

    Args:
        workdir: of the run.
        records: of its epochs.
        title: above each figure.
        start: what was measured before the first epoch, as epoch 0.

    Returns:
        Their paths.
    """
    measured = [{"epoch": 0} | start, *records] if start else records
    directory = workdir / "plots"
    storage.make_directory(directory)
    figures = {
        "accuracy": _splits(records, "top1", "accuracy (%)", 100),
        "loss": _splits(records, "loss", "cross-entropy (nats)", 1),
        "weight_angles": _blocks(measured, "weight_angle", "angle of feedback to\ntransposed forward weights (°)"),
        "feedback_loss": _blocks(records, "feedback_loss", "feedback loss"),
        "update_angles": _blocks(measured, "update_angle", "angle of update to\nbackpropagation gradient (°)"),
        "jacobian_angles": _blocks(measured, "jacobian_angle", "angle of feedback to\ntransposed forward Jacobian (°)"),
        "gauss_newton_angles": _blocks(
            measured, "gauss_newton_angle", "angle of targets' changes to\nthose of Gauss-Newton (°)"
        ),
        "target_contraction": _blocks(records, "target_contraction", "factor between steps\nof the inverse iterations"),
    }
    paths = []
    for name, figure in figures.items():
        if figure is None:
            continue
        paths.append(_finish(figure, directory / f"{name}.png", over_seeds(title, records)))
    return paths


def _finish(figure: Figure, path: epath.Path, title: str) -> epath.Path:
    axes = figure.axes[0]
    axes.set(xlabel="epoch", title=title)
    axes.locator_params(axis="x", integer=True)
    style(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    return path


def save(figure: Figure, path: epath.Path) -> None:
    """Write a figure as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160, bbox_inches="tight")
    storage.write(path, drawn.getvalue())


def plot_beside(workdir: epath.Path, records: dict[str, list[Record]]) -> epath.Path:
    """Write workdir/plots/beside.png: accuracy over epochs, on validation data where there are any, by rule."""
    held_out = all("validation_top1" in record for of_rule in records.values() for record in of_rule)
    split = "validation" if held_out else "training"
    figure, axes = _new_figure(f"{split} accuracy (%)")
    key = "validation_top1" if held_out else "train_top1"
    for index, (rule, of_rule) in enumerate(records.items()):
        curve(axes, of_rule, key, 100, "o-", color=_COLOURS[index % 10], markersize=3, linewidth=1, label=rule)
    title = over_seeds("by the rules beside each other", next(iter(records.values())))
    return _finish(figure, workdir / "plots" / "beside.png", title)


def over_seeds(title: str, records: list[Record]) -> str:
    """A figure's title, which says what its bands are where there are any."""
    seeds = max((len(record.get("seeds", {})) for record in records), default=0)
    return f"{title}\nmean over {seeds} seeds; bands: one standard deviation" if seeds > 1 else title


def style(axes) -> None:
    """The look that all our curves share: a faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _splits(records: list[Record], metric: str, label: str, scale: float):
    """Training and validation curve of a metric."""
    figure, axes = _new_figure(label)
    for index, split in enumerate(("train", "validation")):
        key = f"{split}_{metric}"
        if key in records[0]:
            curve(axes, records, key, scale, "o-", color=_COLOURS[index], markersize=4, label=split)
    return figure


def curve(axes, records: list[Record], key: str, scale: float, *style, color, **more) -> None:
    """One metric over epochs; of many seeds the mean, with a band of one standard deviation to both sides."""
    epochs = [record["epoch"] for record in records]
    means = [scale * record.get(key, math.nan) for record in records]
    axes.plot(epochs, means, *style, color=color, **more)
    spreads = [scale * record.get("std", {}).get(key, math.nan) for record in records]
    if not all(map(math.isnan, spreads)):
        low, high = zip(
            *((mean - spread, mean + spread) for mean, spread in zip(means, spreads, strict=True)), strict=True
        )
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)


def _blocks(records: list[Record], metric: str, label: str):
    """One curve for each block, or None where no block has the metric."""
    records = [record for record in records if of_blocks(record, metric)]
    if not records:
        return None
    figure, axes = _new_figure(label)
    names = list(dict.fromkeys(name for record in records for name in of_blocks(record, metric)))
    blocks = list(of_blocks(records[-1], "activation"))
    for index, name in enumerate(names):
        key = f"{metric}/{name}"
        if len(names) > MANY:
            # Of so many only the order can be seen: from the input, dark, to the output; a few are named.
            colour = colormaps["viridis"](index / (len(names) - 1))
            named = name if index % -(-len(names) // MANY) == 0 else None
            curve(axes, records, key, 1, "-", color=colour, linewidth=1, label=named)
        else:
            # A block has the same colour in every figure, also where others are missing.
            colour = _COLOURS[(blocks.index(name) if name in blocks else index) % 10]
            curve(axes, records, key, 1, "o-", color=colour, markersize=4, label=name)
    if metric.endswith("angle"):
        axes.set_ylim(bottom=0)
    return figure


def _new_figure(label: str):
    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    axes.set_ylabel(label)
    return figure, axes
