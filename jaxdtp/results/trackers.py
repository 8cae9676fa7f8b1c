"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, or what a user writes.

A tracker is made by a function

    open(config, workdir, records) -> Tracker

of the resolved configuration, the run's directory and the epochs that it has had; `config.trackers` names it, one of
`TRACKERS` or FILE.py:NAME or PACKAGE.MODULE:NAME of one's own. It gets the numbers of each epoch, and of the summary.
"""

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from jaxdtp.configuration.config import flatten
from jaxdtp.models import own
from jaxdtp.results.reports import Record
from jaxdtp.system import storage
from jaxdtp.system.console import say
from jaxdtp.system.errors import ConfigError, described, one_line
from jaxdtp.system.places import is_local


class Tracker(NamedTuple):
    """Where metrics go.

    Attributes:
        log: `log(record)`, the numbers of one epoch by name, 'epoch' and 'step' among them.
        finish: `finish(summary)`, the numbers of the finished run by name; {} for one that was stopped.
    """

    log: Callable[[Record], None]
    finish: Callable[[Record], None]


NOWHERE = Tracker(lambda record: None, lambda summary: None)
"""That of hosts other than the first one."""

Open = Callable[[ConfigDict, epath.Path, list[Record]], Tracker]


def tensorboard(config: ConfigDict, workdir: epath.Path, records: list[Record]) -> Tracker:
    """Scalars over epochs, in WORKDIR/tensorboard."""
    del config
    from tensorboardX import SummaryWriter  # imports PyTorch where that is installed

    target = workdir / "tensorboard"
    # Events are appended, which object storage can't: there the file is written anew after each epoch.
    held = None if is_local(workdir) else tempfile.TemporaryDirectory(prefix="jaxdtp-")
    directory = epath.Path(held.name) if held else target
    writer = SummaryWriter(str(directory), purge_step=len(records) + 1)

    def copy() -> None:
        for path in directory.iterdir() if held else ():
            storage.write(target / path.name, path.read_bytes())

    def log(record: Record) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record["epoch"])
        writer.flush()
        copy()

    def finish(summary: Record) -> None:
        del summary
        writer.close()
        copy()

    return Tracker(log, finish)


def wandb(config: ConfigDict, workdir: epath.Path, records: list[Record]) -> Tracker:
    """A run of Weights & Biases, which a continued run goes on with; WANDB_MODE=offline keeps it in WORKDIR/wandb, if
    that is on a local disk."""
    del records
    import wandb

    identity = _identity(workdir / "wandb.id", lambda: uuid.uuid4().hex[:8])
    directory = str(workdir) if is_local(workdir) else None
    run = wandb.init(
        project="jaxdtp", id=identity, resume="allow", dir=directory, name=workdir.name, config=flatten(config)
    )

    def finish(summary: Record) -> None:
        run.summary.update(summary)
        run.finish()

    return Tracker(lambda record: run.log(record, step=record["epoch"]), finish)


def mlflow(config: ConfigDict, workdir: epath.Path, records: list[Record]) -> Tracker:
    """A run of MLflow, which a continued run goes on with; where it is kept says MLFLOW_TRACKING_URI."""
    del records
    import mlflow

    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name("jaxdtp")
    experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment("jaxdtp")

    def begin() -> str:
        identity = client.create_run(experiment_id, run_name=workdir.name).info.run_id
        for key, value in flatten(config).items():  # which MLflow doesn't let change
            client.log_param(identity, key, value)
        return identity

    identity = _identity(workdir / "mlflow.id", begin)

    def log(record: Record) -> None:
        for key, value in record.items():
            client.log_metric(identity, key, value, step=record["epoch"])

    def finish(summary: Record) -> None:
        for key, value in summary.items():
            client.log_metric(identity, key, value)
        client.set_terminated(identity)

    return Tracker(log, finish)


TRACKERS: dict[str, Open] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@contextlib.contextmanager
def track(config: ConfigDict, workdir: epath.Path, records: list[Record]) -> Iterator[Tracker]:
    """All of a configuration's trackers as one. What fails at the beginning is told before anything is trained; what
    fails later is told once, and training goes on without it.

    Raises:
        ConfigError: a tracker isn't there, or can't be opened.
    """
    opened = {name: _open(name, config, workdir, records) for name in config.trackers}
    working, finished = dict(opened), False

    def for_all(do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(working.items()):
            try:
                do(tracker)
            except Exception as error:  # a network, a server, a user's code
                del working[name]
                say(f"the tracker {name} failed, training goes on without it: {described(error)}")

    def finish(summary: Record) -> None:
        nonlocal finished
        finished = True
        for_all(lambda tracker: tracker.finish(summary))

    try:
        yield Tracker(lambda record: for_all(lambda tracker: tracker.log(record)), finish)
    finally:
        if not finished:
            finish({})


def _open(name: str, config: ConfigDict, workdir: epath.Path, records: list[Record]) -> Tracker:
    try:
        make = TRACKERS[name] if name in TRACKERS else own.load(name)
        return make(config, workdir, records)
    except Exception as error:  # not installed, no server, no key, a user's code
        raise ConfigError(
            f"config.trackers: can't open {one_line(repr(name))} ({described(error)}); allowed: {', '.join(TRACKERS)}, "
            "where it is installed, or FILE.py:NAME of a function that opens one"
        ) from error


def _identity(path: epath.Path, new: Callable[[], str]) -> str:
    """What a tracker calls this run, the same when it is continued."""
    if not path.exists():
        path.write_text(new())
    return path.read_text()
