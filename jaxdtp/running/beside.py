"""Other rules beside a configuration's own, each in a directory below the run's, and all in one picture."""

from etils import epath
from ml_collections import ConfigDict

from jaxdtp.devices import hosts
from jaxdtp.results import reports, statistics
from jaxdtp.running.claim import check, claim, remember, remembered
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import train_and_evaluate
from jaxdtp.system import storage
from jaxdtp.system.console import say

Configs = dict[str, ConfigDict]
"""Resolved configurations by rule."""


def directory(workdir: epath.Path, rule: str) -> epath.Path:
    """Of the run by another rule."""
    return workdir / "beside" / rule


def prepare(workdir: epath.Path, own: ConfigDict, configs: Configs) -> None:
    """Write the configurations into their directories, so that `workdir` knows all of its runs from the beginning.

    Args:
        workdir: of the run by a configuration's own rule, which comes first.
        own: its configuration, resolved.
        configs: of the others.

    Raises:
        ConfigError: `workdir` or one of these directories belongs to another configuration, or it is in use.
    """

    def write():
        with claim(workdir, own):
            begun = remembered(workdir) is not None
            for rule, config in configs.items():
                path = directory(workdir, rule)
                if begun:
                    check(path, config)
                if not begun or remembered(path) is None:
                    storage.make_directory(path)
                    remember(path, config, 0)

    if configs:
        hosts.together(write, first_alone=True)


def train(workdir: epath.Path, own: str, summary: reports.Record, configs: Configs) -> None:
    """Train by the other rules, one after the other, then draw all of them in plots/beside.png.

    Args:
        workdir: of the finished run by the rule `own`.
        own: its name.
        summary: of it.
        configs: as from `prepare`. One that diverges is told, and the others go on.
    """
    summaries = {own: summary}
    for rule, config in configs.items():
        say("")
        try:
            summaries[rule] = train_and_evaluate(config, directory(workdir, rule))
        except DivergedError as error:
            say(f"{rule}: {error}")
    say("", *(f"  {rule:<14} test accuracy {reports.accuracy_in_words(of):>10}" for rule, of in summaries.items()))
    say(*(line for rule, of in summaries.items() if rule != own for line in comparison(rule, of, own, summary)))

    def draw():
        from jaxdtp.results import plots  # imports Matplotlib

        workdirs = {own: workdir} | {rule: directory(workdir, rule) for rule in configs}
        plots.plot_beside(workdir, {rule: reports.read_records(path) for rule, path in workdirs.items()})

    hosts.together(draw, first_alone=True)


def comparison(rule: str, summary: reports.Record, own: str, its_summary: reports.Record) -> list[str]:
    """Whether two rules differ over seeds, in a line; none of single seeds."""
    accuracies = [
        [metrics["test_accuracy"] for metrics in of.get("seeds", {}).values()] for of in (summary, its_summary)
    ]
    found = statistics.welch(*accuracies)
    return [] if found is None else [f"  {rule} against {own}: p = {found:.2g} (Welch's t-test over seeds)"]
