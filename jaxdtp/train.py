"""Training and evaluation of one configuration, from data to summary."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxdtp import checkpoints, data, epoch, optimizers, plots, reports
from jaxdtp.algorithms import ALGORITHMS
from jaxdtp.alignment import weight_alignment
from jaxdtp.build import build_network, build_preprocessing, build_settings, for_each, steps_in_epoch
from jaxdtp.config import ConfigError, flatten
from jaxdtp.data import Split
from jaxdtp.networks import Network
from jaxdtp.step import Metrics, TrainState, feedback_step, init_state, train_step

SECONDS_PER_CALL = 1.0  # of training in one call to the device: how often the progress bar moves
SECONDS_PER_LINE = 30.0  # between progress lines where there is no terminal
EVALUATION_BATCH = 500


class DivergedError(FloatingPointError):
    """An activation, a loss or a weight is no longer finite."""


def in_precision(run: Callable[[ConfigDict, Path], reports.Record]) -> Callable:
    """`run(config, workdir)` with all numbers, and all convolutions and matrix products, in the configuration's
    precision."""

    @functools.wraps(run)
    def wrapped(config, workdir):
        with jax.enable_x64(config.float64), jax.default_matmul_precision(config.matmul_precision):
            return run(config, workdir)

    return wrapped


@in_precision
def train_and_evaluate(config: ConfigDict, workdir: Path) -> reports.Record:
    """Train, going on from the latest checkpoint in `workdir`, then evaluate the best epoch on the test data.

    Args:
        config: as from `config.resolve`.
        workdir: gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, plots/ and summary.json.

    Returns:
        The content of summary.json, see `summarise`.

    Raises:
        ConfigError: the configuration doesn't fit the data, or `workdir` belongs to another one.
        DivergedError: something became NaN or infinite; names the epoch, the block and the last good checkpoint.
    """
    dataset = data.load(config.dataset, config.seed)
    steps = steps_in_epoch(config, dataset)
    network = build_network(config, dataset.train.images.shape[1:], dataset.num_classes)
    settings = build_settings(config, network, steps)
    preprocessing = build_preprocessing(config)
    claim_workdir(workdir, config)

    init_key, train_key, measure_key = jax.random.split(jax.random.key(config.seed), 3)
    state = init_state(network, settings, init_key)
    manager = checkpoints.open_checkpoints(workdir)
    last_epoch = manager.latest_step() or 0
    if last_epoch:
        state = checkpoints.restore(manager, last_epoch, state)
    records = reports.read_records(workdir, last_epoch)
    reports.write_records(workdir, records)

    sizes = " / ".join(str(len(split.labels)) for split in (dataset.train, dataset.validation, dataset.test))
    print(f"{config.algorithm} on {config.dataset.name}: {sizes} training / validation / test images")
    dataset = jax.device_put(dataset)
    evaluate = functools.partial(epoch.evaluate, network, preprocessing, EVALUATION_BATCH)
    constants = (network, settings, preprocessing, config.batch_size)
    measured_every = config.alignment.every_epochs if settings.algorithm.target_rule else 0
    rounds = {number: rounds_of_epoch(config, number) for number in range(last_epoch + 1, config.num_epochs + 1)}
    start = time.perf_counter()
    zeros, compiled = {}, {}
    for kind in {kind: None for of_epoch in rounds.values() for kind, _ in of_epoch}:
        zeros[kind] = epoch.zero_metrics(kind, network, settings)
        lowered = epoch.train_steps.lower(kind, *constants, dataset.train, train_key, 0, state, zeros[kind], 0, 0)
        compiled[kind] = lowered.compile()
    if compiled:
        print(f"{steps} steps per epoch, compiled in {time.perf_counter() - start:.1f} s for {jax.devices()[0]}")
    print(reports.console_heading(), *map(reports.console_line, records), sep="\n", flush=True)

    with SummaryWriter(str(workdir / "tensorboard"), purge_step=last_epoch + 1) as writer:
        for number, of_epoch in rounds.items():
            seconds = 0.0
            for kind, round_number in of_epoch:
                label = f"epoch {number}" if kind is train_step else f"epoch {number}, feedback alone"
                advance = functools.partial(compiled[kind], dataset.train, train_key, round_number)
                # The sums are donated: every round needs its own zeros.
                start_totals = jax.tree.map(jnp.copy, zeros[kind])
                state, sums, took = train_round(advance, state, start_totals, steps, config.batch_size, label)
                if fault := find_fault(network, state, sums):
                    good = manager.latest_step()
                    where = f"epoch {good} in {manager.directory}" if good else "none yet"
                    raise DivergedError(f"{label}, step {state.step}: {fault}; last good checkpoint: {where}")
                seconds += took
                if kind is train_step:
                    totals = sums

            record = {"epoch": number, "step": int(state.step), "seconds": seconds}
            record["images_per_second"] = steps * config.batch_size / seconds
            record |= learning_rates(config, list(state.feedback_optimizer), steps, number)
            record |= reports.flat_metrics(jax.tree.map(lambda total: total / steps, totals), "train_")
            if settings.algorithm.paths == "consecutive":
                record |= reports.flat_metrics(weight_alignment(state.forward, state.feedback))
            if measured_every and number % measured_every == 0:
                key = jax.random.fold_in(measure_key, number)
                what = (config.alignment.probes, config.alignment.gauss_newton)
                matching = epoch.measure_alignment(*constants, *what, state, dataset.train, key)
                record |= reports.flat_metrics(matching)
            if len(dataset.validation.labels):
                record |= reports.flat_metrics(evaluate(state.forward, dataset.validation), "validation_")
            records.append(record)
            reports.append_record(workdir, record)
            reports.write_tensorboard(writer, record)
            print(reports.console_line(record), *reports.target_warnings(record), sep="\n", flush=True)
            if number % config.checkpoint_every_epochs == 0 or number == config.num_epochs:
                # Without validation data the last epoch is the best.
                checkpoints.save(manager, number, state, score=record.get("validation_top1", number))

    summary = summarise(evaluate, manager, state, dataset.test, records)
    reports.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plots.plot_run(workdir, records, title=f"{config.algorithm}, {config.network.name}, {config.dataset.name}")
    return summary


@in_precision
def evaluate_best(config: ConfigDict, workdir: Path) -> reports.Record:
    """Evaluate the best checkpoint in `workdir` on the test data.

    Returns:
        As `summarise`.

    Raises:
        ConfigError: `workdir` holds no checkpoint, or belongs to another configuration.
    """
    dataset = data.load(config.dataset, config.seed)
    network = build_network(config, dataset.train.images.shape[1:], dataset.num_classes)
    settings = build_settings(config, network, steps_in_epoch(config, dataset))
    manager = checkpoints.open_checkpoints(workdir) if (workdir / "checkpoints").is_dir() else None
    if manager is None or manager.latest_step() is None:
        raise ConfigError(f"--workdir: {workdir} holds no checkpoints; allowed: the workdir of a training run")
    claim_workdir(workdir, config)
    state = init_state(network, settings, jax.random.key(config.seed))
    evaluate = functools.partial(epoch.evaluate, network, build_preprocessing(config), EVALUATION_BATCH)
    records = reports.read_records(workdir, manager.latest_step())
    return summarise(evaluate, manager, state, jax.device_put(dataset.test), records)


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Create `workdir` for this configuration, or check that it belongs to it.

    Raises:
        ConfigError: it belongs to another configuration; names the keys that differ.
    """
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(flatten(config)))
    if not path.exists():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            reports.write_atomically(path, json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"--workdir: can't write to {workdir} ({error}); allowed: a writable directory"
            ) from error
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: isn't valid JSON ({error}); allowed: the file as a training run wrote it"
        ) from error
    differing = [
        f"{key} (there {found.get(key)!r}, here {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise ConfigError(
            f"--workdir: {workdir} belongs to a run with another configuration: {', '.join(differing)}; "
            "allowed: the same configuration, or another directory"
        )


def rounds_of_epoch(config: ConfigDict, number: int) -> list[tuple[Callable, int]]:
    """The passes through the data that epoch `number` = 1, 2, ... consists of: the step of each, and its number from
    the run's beginning."""
    if ALGORITHMS[config.algorithm].feedback_rule is None:
        return [(train_step, number)]
    alone, extra = config.feedback.pretraining_epochs, config.feedback.extra_epochs
    first = alone + (number - 1) * (1 + extra) + 1
    before = range(1, first) if number == 1 else ()
    after = range(first + 1, first + 1 + extra)
    return [
        *((feedback_step, index) for index in before),
        (train_step, first),
        *((feedback_step, index) for index in after),
    ]


def train_round(
    advance: Callable, state: TrainState, totals: Metrics, steps: int, batch_size: int, label: str
) -> tuple[TrainState, Metrics, float]:
    """One pass through the data in calls of about a second, with a progress bar on a terminal and now and then a line
    elsewhere.

    Args:
        advance: `advance(state, totals, first, count)`, as `epoch.train_steps` with what stays fixed filled in.
        state: at the start of the round.
        totals: zero metrics.
        steps: in the round.
        batch_size: images per step.
        label: what to call the round.

    Returns:
        The state after the round (or after the first step that wasn't finite), the metrics summed over its steps, and
        the seconds it took.
    """
    start = last_line = time.perf_counter()
    done, count = 0, 1
    with tqdm(total=steps * batch_size, desc=label, unit=" images", unit_scale=True, leave=False, disable=None) as bar:
        while done < steps:
            count = min(count, steps - done)
            state, totals, ran = advance(state, totals, done, count)
            done += int(ran)
            bar.update(int(ran) * batch_size)
            if ran < count:
                break
            loss = f"loss {float(totals['loss']) / done:.4f}"
            bar.set_postfix_str(loss)
            now = time.perf_counter()
            seconds_per_step = (now - start) / done
            if bar.disable and now - last_line > SECONDS_PER_LINE:
                left = tqdm.format_interval((steps - done) * seconds_per_step)
                speed = f"{batch_size / seconds_per_step:.0f} images/s"
                print(f"{label}: step {done}/{steps}, {loss}, {speed}, {left} left", flush=True)
                last_line = now
            count = max(1, round(SECONDS_PER_CALL / seconds_per_step))
    return state, jax.device_get(totals), time.perf_counter() - start


def find_fault(network: Network, state: TrainState, totals: Metrics) -> str | None:
    """What is not finite, beginning with what would be the cause of the rest; None if all is well."""
    for metric, words in (("activation", "activations"), ("feedback_loss", "feedback loss")):
        for block in network:
            value = totals[metric].get(block.name, 0.0)
            if not jnp.isfinite(value):
                return f"the {words} of block {block.name} became {value}"
    if not jnp.isfinite(totals["loss"]):
        return f"the training loss became {totals['loss']}"
    for block in network:
        weights = (state.forward[block.name], state.feedback.get(block.name))
        if not all(jnp.isfinite(array).all() for array in jax.tree.leaves(weights)):
            return f"the weights of block {block.name} are no longer finite"
    return None


def learning_rates(config: ConfigDict, trained: list[str], steps: int, number: int) -> reports.Record:
    """The learning rates in the last step of epoch `number` = 1, 2, ...: forward, and of the feedback weights of the
    blocks `trained`."""
    rates = {"learning_rate": float(optimizers.schedule(config.forward, steps)(number * steps - 1))}
    of_feedback = for_each(config.feedback.learning_rate, len(trained))
    return rates | {
        f"feedback_learning_rate/{name}": rate for name, rate in zip(trained, of_feedback, strict=bool(trained))
    }


def summarise(
    evaluate: Callable, manager: CheckpointManager, like: TrainState, test: Split, records: list[reports.Record]
) -> reports.Record:
    """Test metrics of the best checkpoint, and the cost of the run.

    Returns:
        'test_accuracy' (share, 0 to 1), 'test_loss' (nats), 'test_top5' (above 10 classes), 'best_epoch', 'epochs',
        'seconds' (of training) and 'images_per_second'.
    """
    best = manager.best_step()
    metrics = reports.flat_metrics(evaluate(checkpoints.restore(manager, best, like).forward, test), "test_")
    metrics["test_accuracy"] = metrics.pop("test_top1")
    seconds = sum(record["seconds"] for record in records)
    images = sum(record["seconds"] * record["images_per_second"] for record in records)
    return metrics | {
        "best_epoch": best,
        "epochs": records[-1]["epoch"],
        "seconds": seconds,
        "images_per_second": images / seconds,
    }
