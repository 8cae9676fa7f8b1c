"""MLP 64-256-128-10 on scikit-learn's digits, no download. Settings are our own, tuned on validation data."""

from jaxdtp import default_config


def searched(beta, forward_rate, optimizer, rate, iterations, noise_scale):
    """One rule's settings from a search."""
    return {
        "beta": beta,
        "forward": {"learning_rate": forward_rate},
        "feedback": {
            "optimizer": optimizer,
            "learning_rate": (rate,),
            "iterations": (iterations,),
            "noise_scale": (noise_scale,),
        },
    }


# The best of 50 trials each (benchmarks/results/search_digits_mlp_RULE.json) on 30 % of the training data, by
# python -m jaxdtp.search --config=configs/digits_mlp.py --space=configs/search/feedback.py --trials=50
SEARCHED = {
    "ldrl": searched(0.1396, 0.06196, "adam", 0.02515, 5, 0.07102),
    "ldrl_fast": searched(0.9007, 0.04308, "sgd", 0.442, 2, 0.01),
    "dtp": searched(0.0832, 0.01842, "adam", 0.01273, 20, 0.01634),
    "dtpdrl": searched(0.2867, 0.03993, "adam", 0.003823, 26, 0.01183),
    "dfa": searched(0.06193, 0.1886, "adam", 0.0004992, 6, 0.2001),
    "bp": {"forward": {"learning_rate": 0.05898, "warmup_steps": 0}},
}


def get_config(variant: str = ""):
    """`--config=configs/digits_mlp.py:searched` has settings of six rules that as many trials each have been made for;
    the others are tuned by hand."""
    if variant not in ("", "searched"):
        raise ValueError(f"configs/digits_mlp.py:{variant}: unknown variant; allowed: searched")
    config = default_config()
    config.beside = ("ldrl_fast", "bp")
    config.num_epochs = 40
    config.batch_size = 32
    config.beta = 0.5
    config.network.name = "mlp"
    config.network.hidden = (256, 128)
    config.dataset.name = "digits"
    config.dataset.mean = (0.3,)
    config.dataset.std = (0.1,)
    config.forward.learning_rate = 0.04
    config.forward.warmup_steps = 100
    config.forward.weight_decay = 3e-3
    config.forward.schedule_epochs = 40
    config.feedback.iterations = (20, 20)
    config.feedback.noise_scale = (0.1, 0.1)
    config.feedback.learning_rate = (0.2, 0.2)
    config.when.bp = {"forward": {"learning_rate": 0.05, "warmup_steps": 0}}
    config.when.ldrl_fast.forward = {"learning_rate": 0.05}
    # One update for each batch: at twice the forward rate feedback lags, and training breaks down after 20 epochs.
    config.when.ldrl_parallel = {
        "forward": {"learning_rate": 0.02},
        "feedback": {"iterations": (1,), "noise_samples": (20,), "learning_rate": (0.5,)},
    }
    # Losses that ask for an inverse are ill-conditioned: Adam.
    adam = {"iterations": (5,), "optimizer": "adam", "learning_rate": (1e-3,)}
    for rule in ("dtp", "dtp_parallel"):
        config.when[rule] = {"forward": {"learning_rate": 0.01}, "feedback": adam}
    # Its targets hold the feedback's error of reconstruction, which steps must outweigh.
    config.when.tp = {"beta": 3.0, "forward": {"learning_rate": 0.001}, "feedback": adam | {"iterations": (10,)}}
    for rule in ("dtpdrl", "ddtp_linear", "ddtp_rhl", "ddtp_control"):
        config.when[rule] = {"forward": {"learning_rate": 0.01}, "feedback": adam | {"learning_rate": (3e-3,)}}
    for rule, damping in (("inverse", 1.0), ("inverse_output", 3.0)):
        config.when[rule] = {
            "beta": 0.1,
            "forward": {"learning_rate": 0.1},
            "feedback": adam,
            "target": {"scale_by_influence": True, "damping": damping},
        }
    for rule in ("dtp_fixed", "dfa", "fa"):
        config.when.update({rule: {"beta": 0.1, "forward": {"learning_rate": 0.08}}})
    # Beside layers; without shared updates feedback lags behind faster forward weights, and runs diverge.
    for rule, rate in (("ldrl_layers", 0.02), ("weight_mirror", 0.01), ("sign_symmetry", 0.08)):
        config.when[rule].forward = {"learning_rate": rate}
    if variant == "searched":
        config.beside = ()
        config.when.update(SEARCHED)
    return config
