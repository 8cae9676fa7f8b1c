"""MLP 64-256-128-10 on scikit-learn's digits, no download. Settings are our own, tuned on validation data."""

from jaxdtp.config import default_config


def get_config():
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
    for rule in ("dtp", "dtp_parallel", "tp"):
        config.when[rule] = {"forward": {"learning_rate": 0.01}, "feedback": adam}
    for rule in ("dtpdrl", "ddtp_linear", "ddtp_rhl", "ddtp_control"):
        config.when[rule] = {"forward": {"learning_rate": 0.01}, "feedback": adam | {"learning_rate": (3e-3,)}}
    for rule, rate in (("inverse", 0.1), ("inverse_output", 0.02)):
        config.when[rule] = {
            "beta": 0.1,
            "forward": {"learning_rate": rate},
            "feedback": adam,
            "target": {"scale_by_influence": True},
        }
    for rule in ("dtp_fixed", "dfa", "fa"):
        config.when.update({rule: {"beta": 0.1, "forward": {"learning_rate": 0.08}}})
    return config
