"""Training and evaluation of one configuration, from data to summary."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable
from typing import TypeVar

import jax
from etils import epath
from ml_collections import ConfigDict

from jaxdtp.alignment import named_parameters
from jaxdtp.configuration import optimizers
from jaxdtp.configuration.config import of_seed, resolve, seeds_of
from jaxdtp.data import Data, Dataset, load_for_seeds
from jaxdtp.devices import hosts
from jaxdtp.devices.hosts import together
from jaxdtp.devices.parallel import Parallel, device_memory, make_mesh
from jaxdtp.learning.state import TrainState, init_state
from jaxdtp.learning.train_feedback import layer_parameters, trained_blocks
from jaxdtp.models.networks import Network
from jaxdtp.results import reports, statistics
from jaxdtp.results.trackers import NOWHERE, Tracker, track
from jaxdtp.running import checkpoints
from jaxdtp.running.build import (
    build_network,
    build_parallel,
    build_settings,
    check_memory,
    for_each,
    steps_in_epoch,
)
from jaxdtp.running.checkpoints import Checkpoint
from jaxdtp.running.claim import about_data, check, check_data, claim, describe, remember
from jaxdtp.running.groups import Group, division, groups_of, keys_of, place_by_seed
from jaxdtp.running.measuring import evaluate, measure
from jaxdtp.running.rounds import Run, check_claim, round_at, save_and_stop, train_round
from jaxdtp.running.standing import Best, Standing, best_of, checkpoint_of, fresh, restore_best, standing_of
from jaxdtp.system import storage
from jaxdtp.system.compiled import kept_programs
from jaxdtp.system.console import say
from jaxdtp.system.places import place
from jaxdtp.system.signals import stop_requests

Result = TypeVar("Result")


def in_precision(run: Callable[..., Result]) -> Callable[..., Result]:
    """`run(config, ...)` with all numbers, and all convolutions and matrix products, in the configuration's
    precision."""

    @functools.wraps(run)
    def wrapped(config, *others, **named):
        precision = jax.default_matmul_precision(config.matmul_precision)
        with kept_programs(), jax.enable_x64(config.float64), precision:
            return run(config, *others, **named)

    return wrapped


def resolved(run: Callable[..., Result]) -> Callable[..., Result]:
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
        The content of summary.json, see `summarise`; of many seeds with what `statistics.over_seeds` gives.

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
) -> reports.Record:
    """The summary; {} where the test data aren't looked at."""
    datasets = together(lambda: load_for_seeds(config.dataset, seeds_of(config), data))
    steps = steps_in_epoch(config, datasets[0])
    network, states = start(config, datasets[0], steps)
    settings = build_settings(config, network, steps)
    members = division(config, datasets, network, states[0])
    # Only of one group are they divided among devices.
    parallel = build_parallel(config, network, settings, states[0], len(members[0]))
    settings = settings._replace(parallel=parallel)

    with contextlib.ExitStack() as held:
        # The first host is the one that keeps other runs out.
        ours = together(lambda: held.enter_context(claim(workdir, config)), first_alone=True) or (lambda: True)
        standing, records = resume(config, workdir, datasets[0], fresh(states))
        say(*about(config, datasets, data, members))
        groups = groups_of(config, datasets, steps, parallel, members)
        kept = "streamed" if groups[0].train.window else "on the devices"
        say(f"{steps} steps per epoch, images {kept}; {devices(trained_blocks(network, settings), parallel)}")
        layers: frozenset[str] = frozenset()
        if settings.algorithm.paths == "layers":
            layers = layer_parameters(network, states[0])
            say(single_parameters(states[0], layers))
        fixed = (config, network, settings, steps, groups, workdir, layers)
        run = Run(*fixed, stops=held.enter_context(stop_requests()), ours=ours)
        tracker = together(lambda: held.enter_context(track(config, workdir, records)), first_alone=True) or NOWHERE
        say(reports.console_heading(), *map(reports.console_line, records))
        for record in records:
            after_epoch(record)

        while (round := round_at(config, standing.step // steps + 1)).epoch <= config.num_epochs:
            standing = train_round(run, round, standing)
            if not round.last:
                continue
            standing, record = end_epoch(run, round.epoch, standing)
            records.append(record)
            ended = checkpoint_of(config, standing)
            together(functools.partial(write_epoch, run, tracker, records, ended), first_alone=True)
            say(reports.console_line(record), *reports.target_warnings(record))
            stop_if_asked(run, standing, f"epoch {round.epoch}")
            after_epoch(record)

        if not tested:
            return {}
        summary = summarise(config, groups, best_by_seed(config, workdir, states), records)
        by_seed = measured(run, 0, fresh(states))
        begun = statistics.over_seeds(by_seed) if config.seeds else by_seed[config.seed]
        together(lambda: write_summary(config, workdir, records, summary, begun), first_alone=True)
        together(lambda: tracker.finish(reports.numbers(summary)), first_alone=True)
        # What comes after this run mustn't begin.
        stop_if_asked(run, standing, "the last epoch")
    return summary


@resolved
@in_precision
def evaluate_best(config: ConfigDict, workdir: epath.Path, data: Data = None) -> reports.Record:
    """Evaluate the best checkpoint in `workdir` on the test data; of many seeds the best epoch of each.

    Args:
        config, workdir, data: as in `train_and_evaluate`.

    Returns:
        As `summarise`.

    Raises:
        ConfigError: `workdir` holds no checkpoint, or belongs to another configuration; or its model is for other
            images or classes than those of the data.
    """
    datasets = together(lambda: load_for_seeds(config.dataset, seeds_of(config), data))
    steps = steps_in_epoch(config, datasets[0])

    def fitting():
        check(workdir, config)
        check_data(workdir, about_data(datasets[0]), ("image_shape", "dtype", "classes"))

    together(fitting, first_alone=True)
    network, states = start(config, datasets[0], steps)
    records = hosts.json_of_first(together(lambda: reports.read_records(workdir), first_alone=True))
    members = division(config, datasets, network, states[0])
    groups = groups_of(config, datasets, steps, Parallel(make_mesh(seeds=len(members[0]))), members)
    return summarise(config, groups, best_by_seed(config, workdir, states), records)


def start(config: ConfigDict, dataset: Dataset, steps: int) -> tuple[Network, list[TrainState]]:
    """The network of the first seed, and the state before the first step of each, on the host."""
    image, classes = dataset.train.images.shape[1:], len(dataset.classes)
    by_seed = [of_seed(config, seed) for seed in seeds_of(config)]
    networks = [build_network(own, image, classes) for own in by_seed]
    check_memory(config, networks[0], device_memory())
    states = [
        jax.device_get(init_state(network, build_settings(own, network, steps), keys_of(own.seed).init))
        for own, network in zip(by_seed, networks, strict=True)
    ]
    return networks[0], states


def about(config: ConfigDict, datasets: list[Dataset], data: Data, members: tuple[tuple[int, ...], ...]) -> list[str]:
    """What is trained, on what, and which seeds train together, in lines."""
    first = datasets[0]
    sizes = " / ".join(str(len(split.rows)) for split in (first.train, first.validation, first.test))
    source = config.dataset.name if data is None else "the data given"
    lines = [f"{config.algorithm} on {source}: {sizes} training / validation / test images"]
    groups = [", ".join(str(config.seeds[member]) for member in group) for group in members if config.seeds]
    return lines + ([f"seeds {' | '.join(groups)}"] if groups else [])


def devices(trained: list[str], parallel: Parallel) -> str:
    """What a run and the feedback training of these blocks are divided among, in words."""
    mesh, owners = parallel
    words = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} host(s)"
    groups = [
        "+".join(name for name, owner in zip(trained, owners, strict=True) if owner == group)
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
    config: ConfigDict, workdir: epath.Path, dataset: Dataset, begun: Standing
) -> tuple[Standing, list[reports.Record]]:
    """Where the newest intact checkpoint is, or `begun` where there is none, and the records of the epochs before
    it."""
    like = checkpoint_of(config, begun)

    def read():
        data = about_data(dataset)
        check_data(workdir, data)
        checkpoints.tidy(workdir)
        found = checkpoints.restore_newest(workdir, like.state) or like
        records = reports.read_records(workdir, standing_of(config, found).step)
        done = records[-1]["epoch"] if records else 0
        remember(workdir, config, done)
        describe(workdir, data)
        reports.write_records(workdir, records)
        if found.score > -math.inf and done < config.num_epochs and done % config.checkpoint_every_epochs:
            # Saved because the run ended there, which it no longer does.
            checkpoints.take_score(workdir, int(found.state.step))
        return found, records

    found, records = together(read, first_alone=True) or (like, [])
    progress, records = hosts.json_of_first([found.progress, records])
    found = Checkpoint(hosts.of_first(found.state), found.score, progress)
    return standing_of(config, found), records


def end_epoch(run: Run, epoch: int, standing: Standing) -> tuple[Standing, reports.Record]:
    """What is measured after an epoch."""
    config, steps = run.config, run.steps
    trained = [path.block.name for path in run.settings.paths] if run.settings.feedback else []
    rates = learning_rates(config, trained, steps, epoch)
    found = measured(run, epoch, standing, validate=True)
    records = {}
    for seed, metrics in zip(seeds_of(config), standing.metrics, strict=True):
        if seed in found:
            records[seed] = rates | (metrics or {}) | found[seed]
    # Without validation data the last epoch is the best.
    scores = [
        records[seed].get("validation_top1", float(epoch)) if seed in records else None for seed in seeds_of(config)
    ]
    done: reports.Record = {"epoch": epoch, "step": standing.step, "seconds": standing.seconds}
    done["images_per_second"] = len(records) * steps * config.batch_size / standing.seconds
    record = done | (statistics.over_seeds(records) if config.seeds else records[config.seed])
    if any(standing.faults):
        given_up = zip(config.seeds, standing.faults, strict=True)
        record["diverged"] = {str(seed): fault for seed, fault in given_up if fault}
    standing = standing._replace(scores=scores, metrics=[None] * len(scores), seconds=0.0)
    kept = epoch % config.checkpoint_every_epochs == 0
    return standing._replace(best=best_of(standing)) if kept else standing, record


def measured(run: Run, epoch: int, standing: Standing, *, validate: bool = False) -> dict[int, reports.Record]:
    """What `measure` finds and, if asked for, the metrics on validation data, by seed that goes on."""
    found: dict[int, reports.Record] = {}
    seeds = seeds_of(run.config)
    for group in run.groups:
        going = [member for member in group.members if standing.faults[member] is None]
        if not going:
            continue
        state = place_by_seed(group, [standing.states[member] for member in group.members])
        records = measure(run.config, group, run.layers, epoch, state)
        if validate and group.validation.examples:
            metrics = evaluate(group, group.validation, state.forward, state.model, "validation_")
            records = [record | more for record, more in zip(records, metrics, strict=True)]
        of_group = dict(zip(group.members, records, strict=True))
        found |= {seeds[member]: of_group[member] for member in going}
    return found


def stop_if_asked(run: Run, standing: Standing, where: str) -> None:
    """Save and raise StoppedError where a signal has come since the last call of a round, which looks at them, too."""
    stop, _ = hosts.agree(bool(run.stops), 0)
    if stop:
        save_and_stop(run, standing, where)


def write_epoch(run: Run, tracker: Tracker, records: list[reports.Record], ended: Checkpoint) -> None:
    """An epoch's metrics and, every so many epochs and after the last one, its checkpoint."""
    check_claim(run)
    record = records[-1]
    reports.write_records(run.workdir, records)
    tracker.log(reports.numbers(record))
    if record["epoch"] % run.config.checkpoint_every_epochs == 0 or record["epoch"] == run.config.num_epochs:
        checkpoints.save(run.workdir, ended)


def write_summary(
    config: ConfigDict,
    workdir: epath.Path,
    records: list[reports.Record],
    summary: reports.Record,
    begun: reports.Record,
) -> None:
    """summary.json and the figures, which begin with what was measured at the start."""
    from jaxdtp.results import plots  # imports Matplotlib

    storage.write(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plots.plot_run(workdir, records, f"{config.algorithm}, {config.network.name}, {config.dataset.name}", begun)


def learning_rates(config: ConfigDict, trained: list[str], steps: int, number: int) -> reports.Record:
    """The learning rates in the last step of epoch `number` = 1, 2, ...: forward, and of the feedback weights of the
    blocks `trained`."""
    rates = {"learning_rate": float(optimizers.schedule(config.forward, steps)(number * steps - 1))}
    of_feedback = for_each(config.feedback.learning_rate, len(trained))
    return rates | {
        f"feedback_learning_rate/{name}": rate for name, rate in zip(trained, of_feedback, strict=bool(trained))
    }


def best_by_seed(config: ConfigDict, workdir: epath.Path, states: list[TrainState]) -> list[Best]:
    """`standing.restore_best`, on all hosts."""
    restored = together(lambda: restore_best(workdir, config, states), first_alone=True)
    found = restored or fresh(states).best
    scores = hosts.json_of_first([best[:2] for best in found])
    arrays = hosts.of_first([best.learned for best in found])
    return [Best(score, step, learned) for (score, step), learned in zip(scores, arrays, strict=True)]


def summarise(
    config: ConfigDict, groups: tuple[Group, ...], best: list[Best], records: list[reports.Record]
) -> reports.Record:
    """Test metrics of the best epoch, and the cost of the run.

    Args:
        config: as from `config.resolve`.
        groups: of the seeds.
        best: by seed.
        records: of the epochs.

    Returns:
        'test_accuracy' (share, 0 to 1), 'test_loss' (nats), 'test_top5' (above 10 classes), 'best_epoch', 'epochs',
        'seconds' (of training) and 'images_per_second'. Of many seeds the first four as `statistics.over_seeds` gives
        them, and 'diverged', why seeds that aren't among these have been given up.
    """
    diverged = records[-1].get("diverged", {}) if records else {}
    epochs = {record["step"]: record["epoch"] for record in records}
    found, seeds = {}, seeds_of(config)
    for group in groups:
        params, model = place_by_seed(group, [best[member].learned for member in group.members])
        for member, metrics in zip(group.members, evaluate(group, group.test, params, model, "test_"), strict=True):
            metrics["test_accuracy"] = metrics.pop("test_top1")
            found[seeds[member]] = metrics | {"best_epoch": epochs.get(best[member].step, 0)}
    seconds = sum(record["seconds"] for record in records)
    images = sum(record["seconds"] * record["images_per_second"] for record in records)
    cost = {"epochs": len(records), "seconds": seconds, "images_per_second": images / seconds if records else 0.0}
    if not config.seeds:
        return found[config.seed] | cost
    ended = {seed: metrics for seed, metrics in found.items() if str(seed) not in diverged}
    return statistics.over_seeds(ended) | cost | ({"diverged": diverged} if diverged else {})
