"""The command: `python -m jaxdtp.main --config=configs/digits_mlp.py [--config.KEY=VALUE ...] [--workdir=DIR]`.

Exit codes: 0 done, 2 bad input (one line says what), 3 training diverged, 130 interrupted.
"""

import re
import sys
import time
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxdtp.config import RULES, ConfigError, check_key, resolve
from jaxdtp.reports import summary_table
from jaxdtp.train import DivergedError, evaluate_best, train_and_evaluate

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, for example configs/digits_mlp.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; an existing one is continued. Default: a fresh one under runs/."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate the best checkpoint in the workdir.")


def main(argv: list[str]) -> int:
    """Run the command line `argv` and return the exit code."""
    try:
        config = parse(argv)
        workdir = Path(WORKDIR.value or default_workdir())
        print(f"workdir: {workdir}")
        summary = (train_and_evaluate if MODE.value == "train" else evaluate_best)(config, workdir)
    except ConfigError as error:
        print(f"jaxdtp: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"jaxdtp: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("jaxdtp: interrupted; the same command with the same workdir goes on from here", file=sys.stderr)
        return 130
    print(summary_table(summary))
    return 0


def parse(argv: list[str]) -> ConfigDict:
    """The validated configuration that the command line asks for.

    Raises:
        ConfigError: a flag, a key or a value isn't allowed.
    """
    if not any(re.match(r"--?(config(=|$)|help)", argument) for argument in argv):
        raise ConfigError("--config: missing; allowed: a configuration file, for example configs/digits_mlp.py")
    for argument in argv[1:]:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_key(override[1])
    app.define_help_flags()
    try:
        unused = FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        override = re.match(r"flag --config\.([^=]*)=(.*?): ", str(error))
        if override and override[1] in RULES:
            allowed = RULES[override[1]].allowed
            raise ConfigError(f"config.{override[1]}: got {override[2]!r}; allowed: {allowed}") from error
        raise ConfigError(one_line(error)) from error
    except (flags.Error, AttributeError, KeyError) as error:
        raise ConfigError(one_line(error)) from error
    if unused:
        raise ConfigError(f"{unused[0]}: unexpected argument; allowed: flags, which begin with --")
    try:
        values = CONFIG.value.to_dict()
    except Exception as error:  # whatever the user's file raises
        path = config_flags.get_config_filename(FLAGS["config"])
        raise ConfigError(f"--config: can't load {path}: {one_line(error)}") from error
    return resolve(ConfigDict(values), config_flags.get_override_values(FLAGS["config"]))


def default_workdir() -> str:
    """A fresh directory under runs/, named after the config file and the time."""
    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def one_line(error: BaseException) -> str:
    """An exception's type and message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
