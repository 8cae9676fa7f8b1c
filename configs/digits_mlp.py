"""MLP 64-256-128-10 on scikit-learn's digits, no download. Settings are our own, tuned on validation data."""

from jaxdtp.config import default_config


def get_config():
    config = default_config()
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
    config.when = {
        "bp": {"forward": {"learning_rate": 0.05, "warmup_steps": 0}},
        "ldrl_fast": {
            "beta": 1.0,
            "forward": {"learning_rate": 0.05},
            "feedback": {
                "iterations": (1, 1),
                "learning_rate": (1.0, 1.0),
                "momentum": 0.0,
                "activation": "matched",
            },
        },
    }
    return config
