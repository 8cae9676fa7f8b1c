"""How the time of a step grows with the seeds of a run: `python -m benchmarks.seeds [--data_dir=DIR]`.

For each configuration and rule, steps of 1 to 32 seeds that train together, and in turn, on a CPU in as many threads as
there are cores, against steps of one seed; all that is compared is measured in one run, interleaved. MNIST, for which
TFDS has to be somewhere, up to 8 seeds. Writes benchmarks/results/seeds_PLATFORM.json and .png.
"""

import argparse
import functools
import importlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from benchmarks.record import RESULTS, origin
from benchmarks.timing import interleaved
from jaxdtp.configuration.config import resolve, seeds_of
from jaxdtp.data import load_for_seeds
from jaxdtp.devices.parallel import Parallel, make_mesh
from jaxdtp.results.plots import style
from jaxdtp.running.build import build_settings, steps_in_epoch
from jaxdtp.running.groups import at_a_time, division, groups_of
from jaxdtp.running.rounds import Run, advance, begin, round_at
from jaxdtp.running.standing import fresh
from jaxdtp.running.train import start

CONFIGS = {"digits_mlp": ("bp", "ldrl_fast", "ldrl"), "digits_lenet": ("bp", "ldrl_fast"), "mnist_lenet_fast": ("bp",)}
SEEDS = {"digits_mlp": (1, 2, 4, 8, 16, 32), "digits_lenet": (1, 2, 4, 8, 16, 32), "mnist_lenet_fast": (1, 2, 4, 8)}
WAYS = ("together", "in_turn")
LABELS = {"together": "together, a program for each core", "in_turn": "in turn, one seed on each core"}


def steps_of(name: str, rule: str, seeds: int, way: str, data_dir: str) -> Callable[[int], None]:
    """`run(count)`: so many steps of each seed, as a run does them."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.algorithm, config.seeds, config.parallel.seeds = rule, seeds, way
    config.dataset.data_dir = data_dir
    config = resolve(config)
    datasets = load_for_seeds(config.dataset, seeds_of(config))
    steps = steps_in_epoch(config, datasets[0])
    network, states = start(config, datasets[0], steps)
    members = division(config, datasets, network, states[0])
    parallel = Parallel(make_mesh(seeds=len(members[0])))
    settings = build_settings(config, network, steps)._replace(parallel=parallel)
    groups = groups_of(config, datasets, steps, parallel, members)
    run = Run(config, network, settings, steps, groups, epath.Path(), frozenset(), [], None)
    going = [begin(run, round_at(config, 1), group, fresh(states)) for group in groups]
    pool = ThreadPoolExecutor(min(len(groups), at_a_time()))

    def do(count: int) -> None:
        nonlocal going
        # Rounds are short here: each call goes through one from its beginning.
        for first in range(0, count, steps):
            going = [of_group._replace(done=0, broken=False) for of_group in going]
            going = list(pool.map(functools.partial(advance, run, min(steps, count - first)), going))
        jax.block_until_ready([of_group.state for of_group in going])

    return do


def measure(name: str, rule: str, data_dir: str, repeats: int) -> list[dict]:
    """A row for each way and number of seeds."""
    steps = {(way, seeds): steps_of(name, rule, seeds, way, data_dir) for seeds in SEEDS[name] for way in WAYS}
    times = {key: float(np.median(of)) for key, of in interleaved(steps, repeats, seconds=0.2).items()}
    alone = times["in_turn", 1]
    batch = importlib.import_module(f"configs.{name}").get_config().batch_size
    return [
        {
            "config": name,
            "rule": rule,
            "way": way,
            "seeds": seeds,
            "seconds_per_step": seconds,
            "images_per_second": seeds * batch / seconds,
            "times_one_seed": seconds / alone,
        }
        for (way, seeds), seconds in times.items()
    ]


def plot(rows: list[dict], title: str) -> plt.Figure:
    """Time of a step of all seeds, in steps of one seed, a panel for each configuration and rule."""
    panels = list(dict.fromkeys((row["config"], row["rule"]) for row in rows))
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(
        lines, 3, figsize=(9, 2.9 * lines + 0.6), layout="constrained", sharex=True, sharey=True
    )
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for (name, rule), panel in zip(panels, axes.flat, strict=False):
        for colour, way in enumerate(WAYS):
            of_way = [row for row in rows if (row["config"], row["rule"], row["way"]) == (name, rule, way)]
            seeds, times = zip(*((row["seeds"], row["times_one_seed"]) for row in of_way), strict=True)
            panel.plot(seeds, times, "o-", color=f"C{colour}", markersize=4, label=LABELS[way])
        panel.plot(seeds, seeds, ":", color="gray", linewidth=1, label="one after the other")
        panel.set(xscale="log", yscale="log", title=f"{name}, {rule}")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_ticks(sorted({row["seeds"] for row in rows}))
            axis.minorticks_off()
        style(panel)
    for panel in axes[-1]:
        panel.set_xlabel("seeds")
    figure.supylabel("time of a step of all seeds, in those of one seed")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="of TFDS, with MNIST; empty: the digits alone")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name, rules in CONFIGS.items():
        for rule in rules if arguments.data_dir or name.startswith("digits") else ():
            found = measure(name, rule, arguments.data_dir, arguments.repeats)
            print(
                *(f"{name} {rule} {row['way']} {row['seeds']}: {row['times_one_seed']:.2f}" for row in found), sep="\n"
            )
            rows += found
    platform = jax.default_backend()
    result = origin("python -m benchmarks.seeds --data_dir=DIR") | {"platform": platform, "rows": rows}
    (RESULTS / f"seeds_{platform}.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{jax.devices()[0].device_kind}, {result['machine']['cores']} cores"
    plot(rows, title).savefig(RESULTS / f"seeds_{platform}.png", dpi=160)


if __name__ == "__main__":
    main()
