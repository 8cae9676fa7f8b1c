"""A vision transformer on MNIST by fast L-DRL. Settings are our own."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 10
    config.batch_size = 128
    config.network.name = "vit"
    config.network.options = {"patch": 4, "features": 64, "depth": 3, "heads": 4}
    config.dataset.name = "mnist"
    config.dataset.mean = (0.1307,)
    config.dataset.std = (0.3081,)
    config.forward.optimizer = "adam"
    config.forward.learning_rate = 1e-3
    config.forward.warmup_steps = 200
    config.forward.weight_decay = 0.0
    config.forward.schedule_epochs = 10
    config.feedback.batch_share = (0.25,)  # of each batch, that a layer is probed with at most
    return config
