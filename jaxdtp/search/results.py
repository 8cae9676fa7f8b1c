"""What a search has found: a table, the best configuration as a file, and figures."""

import json
import math
import pprint
from typing import cast

import optuna
from etils import epath
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from ml_collections import ConfigDict
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from jaxdtp.configuration.config import flatten
from jaxdtp.results.plots import save, style
from jaxdtp.search.study import counted, shown_settings
from jaxdtp.system import storage

NEAR = 0.002
"""Accuracies that differ by no more count as the same in `trials_needed`."""
SHOWN = 10
"""Trials in the table."""

Setting = CategoricalDistribution | FloatDistribution | IntDistribution
"""What a setting's values are taken from: all that Optuna has."""


def accuracy(trial: FrozenTrial) -> float:
    """The validation accuracy of a trial that went to its end."""
    (value,) = trial.values
    return value


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that went to their end, the best one first."""
    trials = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    return sorted(trials, key=lambda trial: (-accuracy(trial), trial.number))


def trials_needed(study: optuna.Study) -> int:
    """How many trials had been begun when the first one came within `NEAR` of the best."""
    trials, best = counted(study), accuracy(completed(study)[0])
    return 1 + next(
        index
        for index, trial in enumerate(trials)
        if trial.state == TrialState.COMPLETE and accuracy(trial) >= best - NEAR
    )


def table(study: optuna.Study) -> list[str]:
    """The best trials, how many there were, and why some failed, in lines."""
    trials, best = counted(study), completed(study)
    pruned, failed = (
        [trial for trial in trials if trial.state == state] for state in (TrialState.PRUNED, TrialState.FAIL)
    )
    lines = [f"  {'trial':>5} {'valid %':>8}  settings"]
    lines += [
        f"  {trial.number:>5} {100 * accuracy(trial):>8.2f}  {shown_settings(trial.params)}" for trial in best[:SHOWN]
    ]
    lines.append(f"  {len(trials)} trials: {len(best)} to their end, {len(pruned)} stopped early, {len(failed)} failed")
    lines += [f"  trial {trial.number} failed: {trial.user_attrs['reason']}" for trial in failed[:SHOWN]]
    if best:
        lines.append(f"  within {100 * NEAR:.1f} points of the best after {trials_needed(study)} trials")
    return lines


def write(study: optuna.Study, directory: epath.Path, best: ConfigDict | None, command: str) -> None:
    """Write trials.json, best.py and plots/.

    Args:
        study: at its end, or some way to it.
        directory: of the search.
        best: the configuration of the best trial, resolved; None where none has gone to its end.
        command: of the search.
    """
    rows = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "validation_accuracy": trial.user_attrs.get("best"),
            "epochs": len(trial.intermediate_values),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "reason": trial.user_attrs.get("reason", ""),
            "settings": trial.params,
        }
        for trial in counted(study)
    ]
    storage.write(directory / "trials.json", json.dumps({"command": command, "trials": rows}, indent=1) + "\n")
    if best is None:
        return
    storage.write(directory / "best.py", config_file(best, completed(study)[0], len(rows), command))
    storage.make_directory(directory / "plots")
    for name, figure in figures(study).items():
        save(figure, directory / "plots" / f"{name}.png")


def config_file(best: ConfigDict, trial: FrozenTrial, trials: int, command: str) -> str:
    """A configuration file of a trial's settings."""
    values = pprint.pformat(flatten(best), width=110, sort_dicts=False)
    return f'''"""The best of {trials} trials: {accuracy(trial):.2%} on validation data."""
# {command}

from ml_collections import ConfigDict

from jaxdtp.configuration.config import default_config

VALUES = {values}


def get_config():
    config = default_config()
    config.when = ConfigDict()
    config.update_from_flattened_dict(VALUES)
    return config
'''


def figures(study: optuna.Study) -> dict[str, Figure]:
    """History and, where settings vary, slices along each of them, parallel coordinates and, of enough trials,
    importances."""
    drawn = {"history": _history(study)}
    if _varied(completed(study)):
        drawn |= {"slices": _slices(study), "parallel": _parallel(study)}
    importances = _importances(study)
    return drawn | ({"importance": importances} if importances else {})


def _history(study: optuna.Study) -> Figure:
    trials, figure = [trial for trial in counted(study) if "best" in trial.user_attrs], Figure(figsize=(6, 3.8))
    axes, low_high = figure.subplots(), _limits(completed(study))
    for state, colour, label in (
        (TrialState.COMPLETE, "tab:blue", "to its end"),
        (TrialState.PRUNED, "tab:gray", "stopped early"),
        (TrialState.FAIL, "tab:red", "failed"),
    ):
        of_state = [trial for trial in trials if trial.state == state]
        _points(axes, [trials.index(trial) + 1 for trial in of_state], of_state, low_high, colour, label)
    reached, best = [], math.nan
    for trial in trials:
        if trial.state == TrialState.COMPLETE and not best >= 100 * accuracy(trial):
            best = 100 * accuracy(trial)
        reached.append(best)
    axes.step(range(1, len(trials) + 1), reached, where="post", color="tab:blue", linewidth=1, label="best so far")
    axes.set(xlabel="trial", ylabel="validation accuracy (%)", ylim=low_high)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    style(axes)
    return figure


def _slices(study: optuna.Study) -> Figure:
    best = completed(study)
    spaces = _varied(best)
    columns = min(4, len(spaces))
    rows = math.ceil(len(spaces) / columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (name, space) in zip(panels, spaces.items(), strict=False):
        of_name = [trial for trial in best if name in trial.params]
        if isinstance(space, CategoricalDistribution):
            _points(axes, [space.choices.index(trial.params[name]) for trial in of_name], of_name, _limits(best))
            axes.set_xticks(range(len(space.choices)), map(str, space.choices))
            axes.set_xlim(-0.5, len(space.choices) - 0.5)
        else:
            _points(axes, [trial.params[name] for trial in of_name], of_name, _limits(best))
            axes.set_xscale("log" if space.log else "linear")
            axes.xaxis.set_minor_formatter(NullFormatter())
            # Which may depend on other settings.
            ranges = [cast(IntDistribution | FloatDistribution, trial.distributions[name]) for trial in of_name]
            axes.set_xlim(min(of_trial.low for of_trial in ranges), max(of_trial.high for of_trial in ranges))
        axes.set(xlabel=name, ylim=_limits(best))
        style(axes)
    for axes in panels[len(spaces) :]:
        axes.remove()
    figure.supylabel("validation accuracy (%)")
    return figure


def _points(axes, x: list, trials: list[FrozenTrial], limits: tuple[float, float], colour="tab:blue", label=None):
    """Validation accuracies; those below the axis stand at its lower end, as triangles."""
    low, accuracies = limits[0], [100 * trial.user_attrs["best"] for trial in trials]
    above = [index for index, accuracy in enumerate(accuracies) if accuracy >= low]
    below = [index for index, accuracy in enumerate(accuracies) if accuracy < low]
    marks = {"color": colour, "markersize": 4, "clip_on": False}
    if above:
        axes.plot([x[i] for i in above], [accuracies[i] for i in above], "o", label=label, **marks)
    if below:
        places, label = [low + 0.03 * (limits[1] - low)] * len(below), None if above else label
        axes.plot([x[i] for i in below], places, "v", fillstyle="none", label=label, **marks)


def _parallel(study: optuna.Study) -> Figure:
    """Every trial is a line across its settings, each between its least and its greatest value, the better ones darker
    and on top."""
    best = completed(study)
    spaces, (low, high) = _varied(best), _limits(best)
    figure = Figure(figsize=(1.6 * len(spaces) + 2, 4))
    axes = figure.subplots()
    heights, ends = {}, {}
    for name, space in spaces.items():
        values = {trial.number: trial.params[name] for trial in best if name in trial.params}
        if isinstance(space, CategoricalDistribution):
            places = {number: float(space.choices.index(value)) for number, value in values.items()}
            bottom, top = 0.0, len(space.choices) - 1.0
            ends[name] = {str(choice): index / top for index, choice in enumerate(space.choices)}
        else:
            places = {number: math.log(value) if space.log else float(value) for number, value in values.items()}
            bottom, top = min(places.values()), max(places.values())
            ends[name] = {f"{min(values.values()):.3g}": 0.0, f"{max(values.values()):.3g}": 1.0}
        heights[name] = {number: (place - bottom) / (top - bottom or 1) for number, place in places.items()}
    for trial in reversed(best):
        goal = (max(100 * accuracy(trial), low) - low) / (high - low)
        # Settings that others depend on may leave some out.
        line = [(x, heights[name][trial.number]) for x, name in enumerate(spaces) if trial.number in heights[name]]
        axes.plot(*zip(*line, (len(spaces), goal), strict=True), color=colormaps["viridis_r"](goal), linewidth=1 + goal)
    ends[""] = {f"{low:.1f} %": 0.0, f"{high:.1f} %": 1.0}
    for x, of_axis in enumerate(ends.values()):
        for text, height in of_axis.items():
            side, shift = ("bottom", 6) if height > 0 else ("top", -6)
            axes.annotate(text, (x, height), (0, shift), textcoords="offset points", ha="center", va=side, fontsize=8)
    labels = [name.replace(".", ".\n", 1) for name in spaces]
    axes.set_xticks(range(len(spaces) + 1), [*labels, "validation\naccuracy"], fontsize=8)
    axes.tick_params(axis="x", pad=16, length=0)
    axes.set(yticks=[], ylim=(-0.02, 1.02))
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _importances(study: optuna.Study) -> Figure | None:
    """How much of the variance of accuracies each setting explains (fANOVA, Hutter et al. 2014)."""
    best = completed(study)
    # Others have no shares: those that some trials lack, or whose range depends on other settings.
    names = [
        name for name, space in _varied(best).items() if all(trial.distributions.get(name) == space for trial in best)
    ]
    if len(best) < 4 or not names or len({accuracy(trial) for trial in best}) == 1:
        return None
    shares = optuna.importance.get_param_importances(
        study, params=names, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    figure = Figure(figsize=(6, 0.4 * len(shares) + 1))
    axes = figure.subplots()
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="tab:blue")
    axes.set(xlabel="share of the variance of validation accuracies")
    style(axes)
    return figure


def _varied(trials: list[FrozenTrial]) -> dict[str, Setting]:
    """What can have more than one value, by name, the settings of most trials first."""
    spaces = {
        name: space
        for trial in trials
        for name, space in trial.distributions.items()
        if isinstance(space, Setting) and not space.single()
    }
    uses = {name: sum(name in trial.params for trial in trials) for name in spaces}
    return {name: spaces[name] for name in sorted(spaces, key=lambda name: -uses[name])}


def _limits(trials: list[FrozenTrial]) -> tuple[float, float]:
    """Of an axis of validation accuracies (%) that shows the better three quarters of trials well."""
    ordered = sorted(100 * accuracy(trial) for trial in trials)
    low = ordered[len(ordered) // 4]
    margin = max(0.2, 0.15 * (ordered[-1] - low))
    return low - margin, ordered[-1] + margin
