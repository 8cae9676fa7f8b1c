"""Training and evaluation of one configuration, from data to summary."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxdtp import checkpoints, feeding, hosts, optimizers, reports, storage
from jaxdtp.alignment import named_parameters, weight_alignment
from jaxdtp.build import (
    build_network,
    build_parallel,
    build_settings,
    check_memory,
    for_each,
    steps_in_epoch,
)
from jaxdtp.checkpoints import Checkpoint
from jaxdtp.claim import check, claim, describe, remember
from jaxdtp.compiled import kept_programs
from jaxdtp.config import resolve
from jaxdtp.console import say
from jaxdtp.data import Data, Dataset, load, read
from jaxdtp.feeding import Feed
from jaxdtp.hosts import together
from jaxdtp.learning.state import Settings, TrainState, init_state
from jaxdtp.learning.step import Metrics
from jaxdtp.learning.train_feedback import layer_parameters, trained_blocks
from jaxdtp.models.networks import Network
from jaxdtp.parallel import Parallel, device_memory, make_mesh, replicate
from jaxdtp.places import place
from jaxdtp.programs import Numbers, Programs, numbers_of, programs_of
from jaxdtp.rounds import Progress, Run, check_claim, round_at, train_round
from jaxdtp.signals import stop_requests
from jaxdtp.trackers import Tracker, track

EVALUATION_BATCH = 500


def in_precision(run: Callable[..., reports.Record]) -> Callable:
    """`run(config, ...)` with all numbers, and all convolutions and matrix products, in the configuration's
    precision."""

    @functools.wraps(run)
    def wrapped(config, *others, **named):
        precision = jax.default_matmul_precision(config.matmul_precision)
        with kept_programs(), jax.enable_x64(config.float64), precision:
            return run(config, *others, **named)

    return wrapped


def resolved(run: Callable[..., reports.Record]) -> Callable:
    """`run(config, workdir, ...)` of a configuration and a directory as users have them."""

    @functools.wraps(run)
    def wrapped(config, workdir, *others, **named):
        return run(resolve(config), place(str(workdir), "workdir"), *others, **named)

    return wrapped


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike, data: Data = None) -> reports.Record:
    """Train on all devices of all hosts, going on from the newest intact checkpoint in `workdir`, then evaluate the
    best epoch on the test data.

    Args:
        config: as from `default_config`, or `config.resolve`, which is done here.
        workdir: gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, plots/ and summary.json, all written
            by the first host.
        data: instead of what `config.dataset.name` names, see `data.load`.

    Returns:
        The content of summary.json, see `summarise`.

    Raises:
        ConfigError: the configuration doesn't fit the data or the devices, or `workdir` belongs to another one or is in
            use.
        DivergedError: something became NaN or infinite; names the epoch, the block and the last good checkpoint.
        StoppedError: SIGINT or SIGTERM was received; the state is saved.
        hosts.StorageError: `workdir` can no longer be written.
    """
    return _train(config, workdir, data, lambda record: None, tested=True)


def train(
    config: ConfigDict, workdir: str | os.PathLike, after_epoch: Callable[[reports.Record], None], data: Data = None
) -> None:
    """As `train_and_evaluate`, but without a look at the test data, and without summary and plots.

    Args:
        config, workdir, data: as there.
        after_epoch: is called with what was measured in each epoch, from the first one on, also where the run is
            continued. What it raises ends training; the epoch is saved.
    """
    _train(config, workdir, data, after_epoch, tested=False)


@resolved
@in_precision
def _train(
    config: ConfigDict,
    workdir: epath.Path,
    data: Data,
    after_epoch: Callable[[reports.Record], None],
    tested: bool,
) -> reports.Record | None:
    dataset = together(lambda: load(config.dataset, config.seed, data))
    steps = steps_in_epoch(config, dataset)
    network = build_network(config, dataset.train.images.shape[1:], len(dataset.classes))
    check_memory(config, network, device_memory())
    settings = build_settings(config, network, steps)
    init_key, train_key, measure_key = jax.random.split(jax.random.key(config.seed), 3)
    fresh = Checkpoint(jax.device_get(init_state(network, settings, init_key)), -math.inf, Progress()._asdict())
    settings = settings._replace(parallel=build_parallel(config, network, settings, fresh.state))
    mesh, megabytes = settings.parallel.mesh, config.dataset.device_megabytes
    image = dataset.train.images.shape[1:]
    programs = programs_of(config, image, len(dataset.classes), settings.parallel)
    numbers = numbers_of(config, steps, settings.parallel)

    with contextlib.ExitStack() as held:
        ours = together(lambda: held.enter_context(claim(workdir, config)), first_alone=True)
        checkpoint, records = resume(config, workdir, dataset, fresh)
        sizes = " / ".join(str(len(split.rows)) for split in (dataset.train, dataset.validation, dataset.test))
        source = config.dataset.name if data is None else "the data given"
        say(f"{config.algorithm} on {source}: {sizes} training / validation / test images")
        feed = feeding.open_feed(dataset.train, mesh, config.batch_size, megabytes)
        kept = "streamed" if feed.window else "on the devices"
        say(f"{steps} steps per epoch, images {kept}; {devices(network, settings)}")
        validation = feeding.open_feed(dataset.validation, mesh, EVALUATION_BATCH, megabytes)
        test = feeding.open_feed(dataset.test, mesh, EVALUATION_BATCH, megabytes)
        fixed = (config, network, settings, programs, numbers, steps, feed, *jax.random.split(train_key), workdir)
        layers = frozenset()
        if settings.algorithm.paths == "layers":
            layers = layer_parameters(network, fresh.state)
            say(single_parameters(fresh.state, layers))
        run = Run(*fixed, layers, stops=held.enter_context(stop_requests()), ours=ours)
        tracker = together(lambda: held.enter_context(track(config, workdir, records)), first_alone=True)
        say(reports.console_heading(), *map(reports.console_line, records))
        for record in records:
            after_epoch(record)

        state, progress = replicate(mesh, checkpoint.state), Progress(**checkpoint.progress)
        done = int(checkpoint.state.step)
        while (round := round_at(config, done // steps + 1)).epoch <= config.num_epochs:
            state, progress = train_round(run, round, state, progress)
            done = round.number * steps
            if not round.last:
                continue
            record = {"epoch": round.epoch, "step": done, "seconds": progress.seconds}
            record["images_per_second"] = steps * config.batch_size / progress.seconds
            trained = [path.block.name for path in settings.paths] if settings.feedback else []
            record |= learning_rates(config, trained, steps, round.epoch)
            record |= progress.metrics
            record |= measure(run, round.epoch, state, jax.random.fold_in(measure_key, round.epoch))
            if len(validation.split.rows):
                found = evaluate(programs, numbers, state, validation)
                record |= reports.flat_metrics(found, "validation_")
            records.append(record)
            progress = Progress()
            # Without validation data the last epoch is the best.
            score = record.get("validation_top1", float(round.epoch))
            ended = Checkpoint(jax.device_get(state), score, progress._asdict())
            together(functools.partial(write_epoch, run, tracker, records, ended), first_alone=True)
            say(reports.console_line(record), *reports.target_warnings(record))
            after_epoch(record)

        if not tested:
            return None
        summary = summarise(workdir, programs, numbers, fresh.state, test, records)
        start = measure(run, 0, replicate(mesh, fresh.state), jax.random.fold_in(measure_key, 0))
        together(lambda: write_summary(config, workdir, records, summary, start), first_alone=True)
        together(lambda: tracker.finish(summary), first_alone=True)
    return summary


@resolved
@in_precision
def evaluate_best(config: ConfigDict, workdir: epath.Path, data: Data = None) -> reports.Record:
    """Evaluate the best checkpoint in `workdir` on the test data.

    Args:
        config, workdir, data: as in `train_and_evaluate`.

    Returns:
        As `summarise`.

    Raises:
        ConfigError: `workdir` holds no checkpoint, or belongs to another configuration.
    """
    dataset = together(lambda: load(config.dataset, config.seed, data))
    network = build_network(config, dataset.train.images.shape[1:], len(dataset.classes))
    settings = build_settings(config, network, steps_in_epoch(config, dataset))
    together(lambda: check(workdir, config), first_alone=True)
    like = jax.device_get(init_state(network, settings, jax.random.key(config.seed)))
    records = hosts.json_of_first(together(lambda: reports.read_records(workdir), first_alone=True))
    parallel = Parallel(make_mesh())
    programs = programs_of(config, dataset.train.images.shape[1:], len(dataset.classes), parallel)
    numbers = numbers_of(config, steps_in_epoch(config, dataset), parallel)
    test = feeding.open_feed(dataset.test, parallel.mesh, EVALUATION_BATCH, config.dataset.device_megabytes)
    return summarise(workdir, programs, numbers, like, test, records)


def devices(network: Network, settings: Settings) -> str:
    """What a run is divided among, in words."""
    mesh, owners = settings.parallel
    words = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} host(s)"
    groups = [
        "+".join(name for name, owner in zip(trained_blocks(network, settings), owners, strict=True) if owner == group)
        for group in range(mesh.shape["layer"] if owners else 0)
    ]
    return f"{words}, feedback by groups: {' | '.join(groups)}" if groups else words


def single_parameters(state: TrainState, layers: frozenset[str]) -> str:
    """Which parameters have no feedback weight, in words."""
    single = [name for name in named_parameters(state.forward) if name not in layers]
    others = [name for name in single if name.rpartition(".")[2] not in ("bias", "scale")]
    words = f"{len(layers)} parameters have feedback weights; {len(single)} learn from their local gradients alone"
    return f"{words}, beside biases and scales {', '.join(others)}" if others else words


def resume(
    config: ConfigDict, workdir: epath.Path, dataset: Dataset, fresh: Checkpoint
) -> tuple[Checkpoint, list[reports.Record]]:
    """The newest intact checkpoint, or `fresh` where there is none, and the records of the epochs before it."""

    def read():
        checkpoints.tidy(workdir)
        found = checkpoints.restore_newest(workdir, fresh.state) or fresh
        records = reports.read_records(workdir, int(found.state.step))
        done = records[-1]["epoch"] if records else 0
        remember(workdir, config, done)
        describe(workdir, dataset)
        reports.write_records(workdir, records)
        if found.score > -math.inf and done < config.num_epochs and done % config.checkpoint_every_epochs:
            # Saved because the run ended there, which it no longer does.
            checkpoints.take_score(workdir, int(found.state.step))
        return found, records

    found, records = together(read, first_alone=True) or (fresh, [])
    progress, records = hosts.json_of_first([found.progress, records])
    return Checkpoint(hosts.of_first(found.state), found.score, progress), records


def evaluate(programs: Programs, numbers: Numbers, state: TrainState, feed: Feed) -> Metrics:
    """`epoch.evaluate`, averaged over all examples of a split."""
    examples = len(feed.split.rows)
    total = {}
    for window in feeding.windows(feed, np.arange(examples)):
        learned = (state.forward, state.model)
        batch = (window.data, window.order, window.examples)
        sums = programs.evaluate(numbers, feed.batch_size, *learned, *batch)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    return {name: value / examples for name, value in total.items()}


def measure(run: Run, number: int, state: TrainState, key: jax.Array) -> reports.Record:
    """What is measured after epoch `number` on the weights alone and, in some epochs, on the first examples of the
    training data."""
    record, config, algorithm = {}, run.config, run.settings.algorithm
    if algorithm.paths in ("consecutive", "layers"):
        names = run.layers if algorithm.paths == "layers" else None
        record |= reports.flat_metrics(weight_alignment(state.forward, state.feedback, names))
    every = config.alignment.every_epochs
    if every and number % every == 0 and algorithm.paths != "none":
        first = read(run.feed.split, np.arange(config.batch_size))
        batch, key = replicate(run.feed.mesh, (first, key))
        matching = run.programs.measure_alignment(run.numbers, state, batch, key)
        # Where a gradient is zero there is no angle to it.
        record |= {name: value for name, value in reports.flat_metrics(matching).items() if math.isfinite(value)}
    return record


def write_epoch(run: Run, tracker: Tracker, records: list[reports.Record], ended: Checkpoint) -> None:
    """An epoch's metrics and, every so many epochs and after the last one, its checkpoint."""
    check_claim(run)
    record = records[-1]
    reports.write_records(run.workdir, records)
    tracker.log(record)
    if record["epoch"] % run.config.checkpoint_every_epochs == 0 or record["epoch"] == run.config.num_epochs:
        checkpoints.save(run.workdir, ended)


def write_summary(
    config: ConfigDict,
    workdir: epath.Path,
    records: list[reports.Record],
    summary: reports.Record,
    start: reports.Record,
) -> None:
    """summary.json and the figures, which begin with what was measured at the start."""
    from jaxdtp import plots  # imports Matplotlib

    storage.write(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plots.plot_run(workdir, records, f"{config.algorithm}, {config.network.name}, {config.dataset.name}", start)


def learning_rates(config: ConfigDict, trained: list[str], steps: int, number: int) -> reports.Record:
    """The learning rates in the last step of epoch `number` = 1, 2, ...: forward, and of the feedback weights of the
    blocks `trained`."""
    rates = {"learning_rate": float(optimizers.schedule(config.forward, steps)(number * steps - 1))}
    of_feedback = for_each(config.feedback.learning_rate, len(trained))
    return rates | {
        f"feedback_learning_rate/{name}": rate for name, rate in zip(trained, of_feedback, strict=bool(trained))
    }


def summarise(
    workdir: epath.Path,
    programs: Programs,
    numbers: Numbers,
    like: TrainState,
    test: Feed,
    records: list[reports.Record],
) -> reports.Record:
    """Test metrics of the best checkpoint, and the cost of the run.

    Returns:
        'test_accuracy' (share, 0 to 1), 'test_loss' (nats), 'test_top5' (above 10 classes), 'best_epoch', 'epochs',
        'seconds' (of training) and 'images_per_second'.
    """
    best = together(lambda: checkpoints.restore_best(workdir, like).state, first_alone=True)
    best = hosts.of_first(best or like)
    metrics = evaluate(programs, numbers, replicate(test.mesh, best), test)
    metrics = reports.flat_metrics(metrics, "test_")
    metrics["test_accuracy"] = metrics.pop("test_top1")
    seconds = sum(record["seconds"] for record in records)
    images = sum(record["seconds"] * record["images_per_second"] for record in records)
    (best_epoch,) = [record["epoch"] for record in records if record["step"] == best.step] or [0]
    return metrics | {
        "best_epoch": best_epoch,
        "epochs": len(records),
        "seconds": seconds,
        "images_per_second": images / seconds,
    }
