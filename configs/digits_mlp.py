"""MLP 64-128-64-10 on scikit-learn's digits: the default that needs no download. Settings are our own."""

from jaxdtp.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 30
    config.batch_size = 32
    config.beta = 0.5
    config.network.name = "mlp"
    config.network.hidden = (128, 64)
    config.dataset.name = "digits"
    config.dataset.mean = (0.3,)
    config.dataset.std = (0.4,)
    config.forward.learning_rate = 0.1
    config.forward.schedule_epochs = 30
    config.feedback.iterations = (10, 10)
    config.feedback.noise_scale = (0.1, 0.1)
    config.feedback.learning_rate = (0.1, 0.1)
    config.when = {"bp": {"forward": {"learning_rate": 0.05}}}
    return config
