"""LeNet 16-32-64 on scikit-learn's digits, no download. Settings are our own, tuned on validation data."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 12
    config.batch_size = 32
    config.beta = 0.5
    config.network.name = "lenet"
    config.network.channels = (16, 32)
    config.network.hidden = (64,)
    config.dataset.name = "digits"
    config.dataset.mean = (0.3,)
    config.dataset.std = (0.1,)
    config.forward.learning_rate = 0.01
    config.forward.warmup_steps = 100
    config.forward.schedule_epochs = 12
    config.feedback.iterations = (5, 10, 10)
    config.feedback.noise_scale = (0.1, 0.1, 0.1)
    config.feedback.learning_rate = (0.01, 0.02, 0.05)
    config.when.bp = {"forward": {"learning_rate": 0.02, "warmup_steps": 0}}
    config.when.ldrl_fast.forward = {"learning_rate": 0.02}
    return config
