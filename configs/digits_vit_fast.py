"""A vision transformer on scikit-learn's digits by fast L-DRL, no download. Settings are our own."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 40
    config.batch_size = 32
    config.network.name = "vit"
    config.network.options = {"patch": 2, "features": 32, "depth": 2, "heads": 2}
    config.dataset.name = "digits"
    config.dataset.mean = (0.3,)
    config.dataset.std = (0.4,)
    config.forward.optimizer = "adam"
    config.forward.learning_rate = 2e-3
    config.forward.warmup_steps = 100
    config.forward.weight_decay = 0.0
    config.forward.schedule_epochs = 40
    return config
