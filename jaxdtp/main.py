"""The command: `jaxdtp --config=digits_mlp [--config.KEY=VALUE ...] [--workdir=DIR]`, or `python -m jaxdtp.main ...`.

    jaxdtp --list                                      the configurations that come with it
    jaxdtp --config=digits_mlp                         train by one of these
    jaxdtp --config=my_config.py --workdir=runs/mine   train by a file of your own, or go on
    jaxdtp --workdir=runs/mine --mode=eval             evaluate the best checkpoint

Exit codes: 0 done, 2 bad input (one line says what), 3 training diverged, 4 stopped by a signal (SIGTERM, SIGINT,
SIGHUP, SIGUSR1 or SIGUSR2), with the state saved, 5 the workdir can't be written, 6 other hosts can't be reached, 130
interrupted with nothing to save.
"""

import ast
import contextlib
import os
import re
import runpy
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from jaxdtp import __version__
from jaxdtp.configuration.allowed import RULES
from jaxdtp.configuration.config import check_key, default_config, resolve
from jaxdtp.devices import hosts
from jaxdtp.devices.hosts import StorageError
from jaxdtp.models.own import importing_from
from jaxdtp.results.reports import summary_table
from jaxdtp.running import beside
from jaxdtp.running.claim import remembered, stored_config
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import evaluate_best, train_and_evaluate
from jaxdtp.system.console import leave_nothing_to_write, say
from jaxdtp.system.errors import ConfigError, described, one_line, shown
from jaxdtp.system.places import is_file, is_local, of_storage, place
from jaxdtp.system.signals import StoppedError

EXIT_CODES = {ConfigError: 2, DivergedError: 3, StoppedError: 4, StorageError: 5}


class Arguments(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: of the run, validated.
        beside: those of the other rules that are trained, too.
        config_file: the name of where it comes from; '': from the workdir.
        workdir: directory of the run; None for a fresh one.
        mode: 'train' or 'eval'.
        hosts: of `hosts.connect`: coordinator, num_processes, process_id and timeout.
    """

    config: ConfigDict
    beside: dict[str, ConfigDict]
    config_file: str
    workdir: epath.Path | None
    mode: str
    hosts: tuple[str | None, int | None, int | None, int]


def command() -> None:
    """The console command, which finds the modules of the working directory as `python -m` does."""
    sys.path.insert(0, os.getcwd())
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Run the command line `argv` and return the exit code."""

    def run() -> None:
        arguments = parse(argv)
        hosts.connect(*arguments.hosts)
        hosts.check_devices()
        with contextlib.redirect_stdout(sys.stdout if hosts.is_first() else open(os.devnull, "w")):
            workdir = arguments.workdir or default_workdir(arguments.config_file)
            say(f"workdir: {workdir}")
            if arguments.mode == "eval":
                say(summary_table(evaluate_best(arguments.config, workdir)))
                return
            beside.prepare(workdir, arguments.config, arguments.beside)
            summary = train_and_evaluate(arguments.config, workdir)
            say(summary_table(summary))
            if arguments.beside:
                beside.train(workdir, arguments.config.algorithm, summary, arguments.beside)

    return exit_code(run)


def exit_code(run: Callable[[], None]) -> int:
    """The exit code of a command, whose failures are told in one line."""
    try:
        run()
        return 0
    except tuple(EXIT_CODES) as error:
        say(f"jaxdtp: {error}", to_errors=True)
        return EXIT_CODES[type(error)]
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            hosts.leave(f"lost the other hosts, or one of them failed: {one_line(error)}")
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(f"jaxdtp: out of memory: {one_line(error)}; allowed: smaller batches or networks", to_errors=True)
        return 2
    except KeyboardInterrupt:
        say("jaxdtp: interrupted; the same command with the same workdir starts again", to_errors=True)
        return 130
    finally:
        leave_nothing_to_write()


def parse(argv: list[str]) -> Arguments:
    """What the command line `argv` asks for, its configuration validated.

    Raises:
        ConfigError: a flag, a key or a value isn't allowed, or the configuration file can't be loaded.
        SystemExit: it asks for help, the version or the list of configurations, which has been printed.
    """
    values = command_flags()
    try:
        rest = values(argv, known_only=True)
    except (flags.Error, ValueError, OSError) as error:  # of --flagfile, too
        raise ConfigError(f"command line: {described(error)}; allowed: --help lists the flags") from error
    if values.help:
        say(f"{__doc__}{values.get_help(include_special_flags=False)}")
        raise SystemExit(0)
    if values.version:
        say(f"jaxdtp {__version__}")
        raise SystemExit(0)
    if values.list:
        say(*(f"{name:<26} {about(path)}" for name, path in shipped_configs().items()))
        raise SystemExit(0)
    workdir = values.workdir
    if workdir is not None and not (workdir and workdir.isprintable()):
        raise ConfigError(f"--workdir: got {shown(workdir)}; allowed: a directory's name, of printable characters")
    overrides = parse_overrides(rest, list(values))
    workdir = place(workdir, "--workdir") if workdir else None
    config = load_config(values.config, overrides) if values.config else stored_config(workdir, overrides)
    own = resolve(config, overrides)
    others = {}
    if values.mode == "train" and ("beside" in overrides or "algorithm" not in overrides):
        others = configs_beside(own, None if values.config else workdir, config, overrides)
    config_file = re.split(":(?!/)", values.config or "", maxsplit=1)[0]
    return Arguments(
        own,
        others,
        config_file,
        workdir,
        values.mode,
        (values.coordinator, values.num_processes, values.process_id, values.connect_timeout),
    )


def configs_beside(
    own: ConfigDict, workdir: epath.Path | None, config: ConfigDict, overrides: dict[str, Any]
) -> dict[str, ConfigDict]:
    """The configurations of the rules beside a run's own, by rule.

    Args:
        own: the run's, resolved.
        workdir: that the run is continued from without a configuration file; None: there is one.
        config: as it was loaded.
        overrides: values that the command line sets, by dotted key.
    """
    others = {}
    for rule in own.beside:
        if workdir is None:
            varied = ConfigDict(config.to_dict(), type_safe=False)
            varied.algorithm = rule
            others[rule] = resolve(varied, overrides | {"algorithm": rule})
        elif remembered(beside.directory(workdir, rule)) is not None:
            others[rule] = resolve(stored_config(beside.directory(workdir, rule), overrides))
    others.pop(own.algorithm, None)
    return others


def command_flags() -> flags.FlagValues:
    """The flags of the command, without those of the configuration's keys."""
    values = flags.FlagValues()
    # Flags may stand behind the value of a configuration's key, which looks like the end of all flags until then.
    values.set_gnu_getopt()
    flags.DEFINE_string("config", None, "Configuration file, or the name of one that --list lists.", flag_values=values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; an existing one is continued. Default: a fresh one under runs/.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "mode", "train", ["train", "eval"], "Train, or evaluate the best checkpoint in the workdir.", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of the first of several hosts. TPU pods and Slurm steps need none of these three.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "How many hosts there are.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is: 0, 1, ...", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "connect_timeout",
        300,
        "Seconds in which the hosts must have found each other.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "Print this.", flag_values=values)
    flags.DEFINE_bool("version", False, "Print the version.", flag_values=values)
    flags.DEFINE_bool("list", False, "List the configurations that come with jaxdtp.", flag_values=values)
    return values


def parse_overrides(argv: list[str], known: list[str]) -> dict[str, Any]:
    """Values of the flags --config.KEY, by key.

    Args:
        argv: a command line with no other flags.
        known: names of the other flags, for errors.
    """
    for argument in argv[1:]:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_key(override[1])
    options, argv = untyped_values(argv)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", default_config(), flag_values=values, sys_argv=argv)
        unused = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        allowed = ", ".join(f"--{name}" for name in known)
        raise ConfigError(f"--{one_line(error.flagname)}: unknown flag; allowed: {allowed}, --config.KEY") from error
    except Exception as error:  # Python's parser, which reads tuples, has its own
        flag = re.match(r"flag --config\.([\w.]*)=(.*?): ", str(error), re.DOTALL)
        if flag and flag[1] in RULES:
            raise ConfigError(f"config.{flag[1]}: got {shown(flag[2])}; allowed: {RULES[flag[1]].allowed}") from error
        raise ConfigError(f"command line: {described(error)}; allowed: --config.KEY=VALUE") from error
    if unused:
        raise ConfigError(f"{shown(unused[0])}: unexpected argument; allowed: flags, which begin with --")
    return config_flags.get_override_values(values["config"]) | options


def untyped_values(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of the flags --config.network.options.NAME=VALUE, a model's own, and --config.seeds=VALUE, which have no
    one type, by key: Python literals or text; and the other arguments."""
    options, others = {}, []
    for argument in argv:
        if found := re.fullmatch(r"--?config\.(network\.options\.\w+|seeds)=(.*)", argument, re.DOTALL):
            try:
                options[found[1]] = ast.literal_eval(found[2])
            except (ValueError, SyntaxError):
                options[found[1]] = found[2]
        else:
            others.append(argument)
    return options, others


def load_config(source: str, overrides: dict[str, Any]) -> ConfigDict:
    """The configuration of a file, not validated yet.

    Args:
        source: the file's name, or that of a configuration that comes with jaxdtp, and after a colon, if there is one,
            what to call its `get_config` with.
        overrides: values to set, by dotted key.

    Raises:
        ConfigError: the file can't be read, fails, or returns something else.
    """
    name, *argument = re.split(":(?!/)", source, maxsplit=1)  # the colon of a URL is part of its name
    shipped = shipped_configs().get(name)
    path = epath.Path(shipped) if shipped else place(name, "--config")
    try:
        found = name.isprintable() and is_file(path)
    except Exception as error:
        if not of_storage(error):
            raise
        raise ConfigError(
            f"--config: can't read {path} ({described(error)}); allowed: a configuration file that can be read"
        ) from error
    if not found:
        raise ConfigError(
            f"--config: got {shown(name)}; allowed: a configuration file, for example configs/digits_mlp.py, or one of "
            f"{', '.join(shipped_configs())}"
        )
    try:
        with local_file(path) as file, importing_from(file.resolve().parent):
            config = runpy.run_path(str(file))["get_config"](*argument)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's file raises, SystemExit too
        raise ConfigError(
            f"--config: can't load {path}: {described(error)}; allowed: a Python file with a function get_config"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config: get_config of {path} returns {shown(config)}; allowed: a ConfigDict, as from default_config()"
        )
    if overrides:
        try:
            with config.unlocked(), config.ignore_type():
                config.update_from_flattened_dict(overrides)
        except Exception as error:  # it is frozen, or a group is a value
            raise ConfigError(
                f"--config: can't set {', '.join(overrides)} in what get_config of {path} returns: {described(error)}; "
                "allowed: a ConfigDict, as from default_config()"
            ) from error
    return config


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[Path]:
    """A file on a local disk: itself, or a temporary copy."""
    if is_local(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="jaxdtp-") as directory:
        copy = Path(directory, path.name)
        copy.write_bytes(path.read_bytes())
        yield copy


def shipped_configs(kind: str = "") -> dict[str, Path]:
    """The configurations that come with jaxdtp, by name: inside of an installed wheel, or beside it in a checkout; of
    another kind, those in a directory below."""
    package = Path(__file__).parent
    directory = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted((directory / kind).glob("*.py"))}


def about(config_file: Path) -> str:
    """The first line of what a configuration file says of itself."""
    return (ast.get_docstring(ast.parse(config_file.read_text())) or "").partition("\n")[0]


def default_workdir(config_file: str) -> epath.Path:
    """A fresh directory under runs/, named after the config file and the time; commands may begin in one second."""
    return epath.Path("runs", f"{Path(config_file).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")


if __name__ == "__main__":
    command()
