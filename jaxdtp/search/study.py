"""A study in a directory: any number of processes, which may be killed, try settings until there are enough trials.

The trials are in DIR/study.db, by Optuna; each trains in DIR/trials/NUMBER. A trial whose process has died is begun
again under another number where it stopped, and counts once.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import optuna
from etils import epath
from filelock import FileLock, Timeout
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from jaxdtp.configuration.config import check_key, flatten, resolve
from jaxdtp.running.claim import differences
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import train
from jaxdtp.system import storage
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, described

IDENTITY = "search.json"
DATABASE = "study.db"
SAMPLES = 50  # of a space, that are looked at before anything begins

Space = Callable[[optuna.trial.BaseTrial], dict[str, Any]]


def configured(
    config: ConfigDict, space: Space, trial: optuna.trial.BaseTrial, overrides: dict[str, Any]
) -> ConfigDict:
    """The configuration of a trial, resolved.

    Args:
        config: as it was loaded.
        space: gives values by dotted key.
        trial: of Optuna, or one with fixed values.
        overrides: values that the command line sets, by dotted key.

    Raises:
        ConfigError: the space fails, names an unknown key, or gives a value that isn't allowed.
    """
    try:
        values = dict(space(trial))
    except optuna.TrialPruned:
        raise
    except Exception as error:  # a user's code
        raise ConfigError(
            f"--space: get_space fails ({described(error)}); allowed: a function that returns values by dotted key"
        ) from error
    for key in values:
        check_key(str(key), "space")
        if key in overrides:
            raise ConfigError(f"space.{key}: set by the command line, too; allowed: in one of the two")
    varied = ConfigDict(config.to_dict(), type_safe=False)
    varied.update_from_flattened_dict(values)
    # No tracker but what is measured, and no other rules.
    varied.trackers, varied.beside = (), ()
    return resolve(varied, {**overrides, **values})


def check_space(config: ConfigDict, space: Space, overrides: dict[str, Any]) -> None:
    """Look at some samples of a space.

    Raises:
        ConfigError: as `configured`.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(SAMPLES):
        with contextlib.suppress(optuna.TrialPruned):
            configured(config, space, study.ask(), overrides)


def open_study(directory: epath.Path, config: ConfigDict, source: str) -> optuna.Study:
    """The study in a directory, or a new one.

    Args:
        directory: of the search.
        config: that trials vary, resolved.
        source: of the space.

    Raises:
        ConfigError: it belongs to another configuration or space.
        OSError, sqlalchemy.exc.SQLAlchemyError: it can't be written.
    """
    wanted = json.loads(json.dumps({"config": flatten(config), "space": source}))
    # Of a database's URL, which its path is a part of.
    if found := set("?#%{}") & set(os.path.abspath(directory)):
        raise ConfigError(
            f"--workdir: got {os.path.abspath(directory)}, with {' '.join(sorted(found))}; allowed: without, for a "
            "search's database"
        )
    storage.make_directory(directory)
    with locked(directory):
        path = directory / IDENTITY
        if path.exists():
            found = json.loads(path.read_text())
            differing = list(differences(found["config"], config).values())
            differing += ["the space"] if found["space"] != source else []
            if differing:
                raise ConfigError(
                    f"--workdir: {directory} belongs to another search: {', '.join(differing)}; allowed: the same "
                    "configuration and space, or another directory"
                )
        elif storage.inside(directory / "trials") or (directory / "config.json").exists():
            raise ConfigError(
                f"--workdir: {directory} belongs to something else; allowed: that of a search, or a new one"
            )
        else:
            storage.write(path, json.dumps(wanted, indent=2) + "\n")
        return optuna.create_study(
            study_name="jaxdtp",
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{os.path.abspath(directory)}/{DATABASE}", engine_kwargs={"connect_args": {"timeout": 60}}
            ),
            direction="maximize",
            pruner=optuna.pruners.HyperbandPruner(max_resource=config.num_epochs),
            load_if_exists=True,
        )


def locked(directory: epath.Path) -> FileLock:
    """A lock among the processes of a search."""
    return FileLock(directory / "lock")


def run_trials(
    study: optuna.Study,
    directory: epath.Path,
    base: ConfigDict,
    config: ConfigDict,
    space: Space,
    overrides: dict[str, Any],
    trials: int,
) -> None:
    """Try until so many trials have ended or are being tried.

    Args:
        study, directory, base: as of `open_study`.
        config, space, overrides: as in `configured`.
        trials: that count: those of killed processes don't.
    """
    while (begun := next_trial(study, directory, base.seed, trials)) is not None:
        trial, ours = begun
        chosen = functools.partial(configured, config, space, trial, overrides)
        try:
            try_one(study, trial, directory, base.num_epochs, chosen)
        finally:
            ours.release()


def next_trial(
    study: optuna.Study, directory: epath.Path, seed: int, trials: int
) -> tuple[optuna.Trial, FileLock] | None:
    """A trial to do, and a lock, to be released after it; None where enough are done or being done."""
    with locked(directory):
        begin_again_what_died(study, directory)
        if len(counted(study)) >= trials:
            return None
        # The same suggestions however often the search was interrupted, as long as one process does it.
        number = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed + number, constant_liar=True)
        trial = study.ask()
        if "directory" not in trial.user_attrs:
            trial.set_user_attr("directory", str(trial.number))
        ours = lock_of(directory, trial.number)
        ours.acquire()
        return trial, ours


def lock_of(directory: epath.Path, number: int) -> FileLock:
    """What the process that does a trial holds, which whatever ends it lets go."""
    storage.make_directory(directory / "trials")
    return FileLock(directory / "trials" / f"{number}.lock")


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have ended or are being done, but for those whose process died: what fails of itself has a reason."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and (trial.state != TrialState.FAIL or "reason" in trial.user_attrs)
    ]


def begin_again_what_died(study: optuna.Study, directory: epath.Path) -> None:
    """Queue the trials of processes that are no more, on whatever machine, to go on from their checkpoints."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = lock_of(directory, trial.number)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        lock.release()
        study.tell(trial.number, state=TrialState.FAIL)
        kept = {"directory": trial.user_attrs["directory"]} if "directory" in trial.user_attrs else {}
        study.enqueue_trial(trial.params, user_attrs=kept)


def try_one(
    study: optuna.Study,
    trial: optuna.Trial,
    directory: epath.Path,
    num_epochs: int,
    chosen: Callable[[], ConfigDict],
) -> None:
    """Train with a trial's settings, `chosen`; its value is the best validation accuracy of its epochs."""
    workdir, best = directory / "trials" / trial.user_attrs["directory"], 0.0

    def report(record: dict[str, Any]) -> None:
        nonlocal best
        if "diverged" in record:
            raise DivergedError("; ".join(f"seed {seed}: {why}" for seed, why in record["diverged"].items()))
        if "validation_top1" not in record:
            raise ConfigError("space: leaves no validation examples; allowed: some, a search chooses by their accuracy")
        best = max(best, record["validation_top1"])
        trial.report(record["validation_top1"], record["epoch"])
        if trial.should_prune() and record["epoch"] < num_epochs:
            raise optuna.TrialPruned

    state, reason = TrialState.COMPLETE, ""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(chosen(), workdir, report)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except DivergedError as error:
        state, reason = TrialState.FAIL, f"diverged: {error}"
    except (ConfigError, MemoryError, jax.errors.JaxRuntimeError) as error:
        state, reason = TrialState.FAIL, described(error)
    if reason:
        trial.set_user_attr("reason", reason)
    trial.set_user_attr("best", best)
    study.tell(trial, best if state == TrialState.COMPLETE else None, state)
    (workdir / "checkpoints").rmtree(missing_ok=True)
    told = {TrialState.COMPLETE: f"{best:.2%}", TrialState.PRUNED: f"{best:.2%}, stopped early"}
    say(f"trial {trial.number}: {told.get(state, 'failed, ' + reason)} ({shown_settings(trial.params)})")


def shown_settings(params: dict[str, Any]) -> str:
    """A trial's settings in words."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )
