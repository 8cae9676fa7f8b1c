"""The command: `python -m jaxdtp.search --config=CONFIG --space=SPACE --workdir=DIR [--trials=50]`, and --config.KEY.

The same command in the same directory goes on, also beside others, until there are so many trials. Exit codes as those
of `jaxdtp`. It leaves in DIR: best.py, a configuration file; trials.json; plots/; study.db, of Optuna.
"""

import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import optuna
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from sqlalchemy.exc import SQLAlchemyError

from jaxdtp import data
from jaxdtp.configuration.config import resolve
from jaxdtp.devices import hosts
from jaxdtp.devices.hosts import StorageError
from jaxdtp.main import exit_code, load_config, parse_overrides, shipped_configs
from jaxdtp.models.own import importing_from
from jaxdtp.search import results
from jaxdtp.search.study import Space, check_space, configured, open_study, run_trials
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, described, shown
from jaxdtp.system.places import is_file, is_local, place


class Arguments(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: as it was loaded.
        overrides: values that the command line sets, by dotted key.
        space, source: the function, and the file that it is from.
        trials: how many.
        directory: of the search.
    """

    config: ConfigDict
    overrides: dict
    space: Space
    source: str
    trials: int
    directory: epath.Path


def main(argv: list[str]) -> int:
    """Run the command line `argv` and return the exit code."""

    def run() -> None:
        hosts.check_devices()
        config, overrides, space, source, trials, directory = parse(argv)
        base = resolve(config, overrides)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        check_space(config, space, overrides)
        # Before anything is written.
        if not len(data.load(base.dataset, base.seed).validation.rows):
            raise ConfigError(
                f"config.dataset.validation_fraction: got {base.dataset.validation_fraction}, which gives no examples; "
                "allowed: more, a search chooses by validation accuracy"
            )
        try:
            study = open_study(directory, base, source)
            say(f"search in {directory}: {trials} trials of {base.algorithm} on {base.dataset.name}")
            try:
                run_trials(study, directory, base, config, space, overrides, trials)
            finally:
                best = results.completed(study)
                chosen = configured(config, space, best[0], overrides) if best else None
                results.write(study, directory, chosen, shlex.join(["python", "-m", "jaxdtp.search", *argv[1:]]))
        except StorageError:
            raise
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
            raise StorageError(
                f"--workdir: can't use {directory} ({described(error)}); allowed: a writable directory with room"
            ) from error
        say(*results.table(study))
        if best:
            say(f"  the best configuration: {directory / 'best.py'}")

    return exit_code(run)


def parse(argv: list[str]) -> Arguments:
    """What the command line `argv` asks for.

    Raises:
        ConfigError: a flag isn't allowed, or a file can't be loaded.
        SystemExit: it asks for help, which has been printed.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    flags.DEFINE_string("config", None, "Configuration file, or the name of one.", flag_values=values)
    flags.DEFINE_string("space", None, "File with get_space, or the name of one.", flag_values=values)
    flags.DEFINE_integer("trials", 50, "How many, of all processes together.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("workdir", None, "Directory of the search.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this.", flag_values=values)
    try:
        rest = values(argv, known_only=True)
    except (flags.Error, ValueError, OSError) as error:
        raise ConfigError(f"command line: {described(error)}; allowed: --help lists the flags") from error
    if values.help:
        say(f"{__doc__}{values.get_help(include_special_flags=False)}")
        raise SystemExit(0)
    for name in ("config", "space", "workdir"):
        if not values[name].value:
            raise ConfigError(f"--{name}: missing; allowed: {values[name].help}")
    overrides = parse_overrides(rest, list(values))
    directory = place(values.workdir, "--workdir")
    if not is_local(directory):
        raise ConfigError(
            f"--workdir: got {shown(values.workdir)}; allowed: a local directory, for a search's database"
        )
    space, source = load_space(values.space)
    return Arguments(load_config(values.config, overrides), overrides, space, source, values.trials, directory)


def load_space(name: str) -> tuple[Space, str]:
    """The function of a space's file, and the file's text.

    Raises:
        ConfigError: it can't be read, fails, or defines no such function.
    """
    shipped = shipped_configs("search")
    path = Path(shipped.get(name) or place(name, "--space"))
    if not is_file(path):
        raise ConfigError(
            f"--space: got {shown(name)}; allowed: a file that defines get_space(trial), or one of {', '.join(shipped)}"
        )
    try:
        with importing_from(path.resolve().parent):
            return runpy.run_path(str(path))["get_space"], path.read_text()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's file raises
        raise ConfigError(
            f"--space: can't load {path}: {described(error)}; allowed: a Python file with a function get_space(trial)"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
