"""What keeps feedback weights aligned, shared updates or matching by probes, on scikit-learn's digits:

    python -m benchmarks.ablation
    python -m benchmarks.ablation --costs

trains an MLP, a LeNet and a small ResNet by both (`ldrl_fast`), by either alone (`kp`, `ldrl_layers`), by neither
(`fa`) and by BP, with the same forward settings and seeds, and writes benchmarks/results/ablation.json and ablation.md.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from benchmarks.record import RESULTS, mean_and_std, origin
from benchmarks.steps import jaxdtp_step, timed
from configs import digits_lenet, digits_mlp
from jaxdtp.configuration.config import resolve
from jaxdtp.results.reports import of_blocks, read_records
from jaxdtp.running.rounds import DivergedError
from jaxdtp.running.train import train_and_evaluate

ANGLES = ("update_angle", "weight_angle")
SEEDS = 3
EPOCHS = 20
RULES = {
    "ldrl_fast": "shared updates and matching",
    "kp": "shared updates alone",
    "ldrl_layers": "matching alone",
    "fa": "neither",
    "bp": "BP",
}


def resnet() -> ConfigDict:
    """A residual network of three blocks with BatchNorm."""
    config = digits_lenet.get_config()
    config.network.name = "resnet20"
    config.network.options = {"blocks": (1, 1, 1), "width": 8}
    config.network.channels = ()
    return config


CONFIGS = {"MLP": digits_mlp.get_config, "LeNet": digits_lenet.get_config, "ResNet": resnet}


def configure(network: str, rule: str, seed: int) -> ConfigDict:
    """A run's configuration; what differs between rules is the rule."""
    config = CONFIGS[network]()
    config.algorithm, config.seed, config.num_epochs, config.beta = rule, seed, EPOCHS, 1.0
    config.forward.learning_rate, config.forward.warmup_steps, config.forward.schedule_epochs = 0.02, 100, EPOCHS
    config.alignment.every_epochs = EPOCHS
    one = {"iterations": (1,), "learning_rate": (1.0,), "noise_scale": (0.1,)}
    config.when = ConfigDict({rule: {"feedback": one}})
    return resolve(config)


def run(network: str, rule: str, seed: int) -> dict:
    """A run's test accuracy, and median angles over hidden layers at its end (degrees); nothing of these where it
    diverged."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        try:
            summary = train_and_evaluate(configure(network, rule, seed), Path(workdir))
        except DivergedError as error:
            return {"network": network, "rule": rule, "seed": seed, "diverged": str(error).partition(";")[0]}
        records = read_records(Path(workdir))
    # Without the output layer, whose update is the gradient whatever the feedback.
    angles = {name: list(of_blocks(records[-1], name).values())[:-1] for name in ANGLES}
    return {
        "network": network,
        "rule": rule,
        "seed": seed,
        "test_accuracy": summary["test_accuracy"],
    } | {name: float(np.median(values)) for name, values in angles.items() if values}


def times_bp(network: str) -> dict[str, float]:
    """Seconds of a step by rule in those of BP, medians over repeats in turn."""
    with contextlib.redirect_stdout(io.StringIO()):
        steps = {rule: jaxdtp_step(configure(network, rule, 0), rule, (8, 8, 1)) for rule in RULES}
        times, _ = timed(steps, repeats=9, seconds=0.2)
    return {rule: float(np.median(of_rule) / np.median(times["bp"])) for rule, of_rule in times.items()}


def table(runs: list[dict], costs: dict[str, dict[str, float]]) -> str:
    """The runs in Markdown."""
    lines = [
        "| network | feedback weights learn by | rule | test accuracy, mean ± std (%) | update angle by seed (°) "
        "| weight angle by seed (°) | step, times BP |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in CONFIGS:
        for rule, words in RULES.items():
            of_rule = [one for one in runs if (one["network"], one["rule"]) == (network, rule)]
            accuracies = [100 * one["test_accuracy"] for one in of_rule if "diverged" not in one]
            accuracy = mean_and_std(accuracies)
            if len(accuracies) < len(of_rule):
                accuracy += f" ({len(of_rule) - len(accuracies)} of {len(of_rule)} diverged)"
            angles = [", ".join(f"{one[name]:.1f}" for one in of_rule if name in one) for name in ANGLES]
            lines.append(
                f"| {network} | {words} | `{rule}` | {accuracy} | {' | '.join(angles)} | {costs[network][rule]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run everything, seeds and rules interleaved, and write the results; `--costs` measures the costs alone again."""
    path = RESULTS / "ablation.json"
    if sys.argv[1:] == ["--costs"]:
        runs = json.loads(path.read_text())["runs"]
    else:
        runs = [run(network, rule, seed) for network in CONFIGS for seed in range(SEEDS) for rule in RULES]
    costs = {network: times_bp(network) for network in CONFIGS}
    result = origin("python -m benchmarks.ablation") | {"seeds": SEEDS, "epochs": EPOCHS, "runs": runs, "costs": costs}
    path.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "ablation.md").write_text(table(runs, costs) + "\n")
    print(table(runs, costs))


if __name__ == "__main__":
    main()
