"""LeNet 32-64-512 on MNIST. Published accuracy (Ernoult et al. 2022): 98.9 % by L-DRL, 98.9 % by BP."""

from jaxdtp.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 2
    config.batch_size = 64
    config.beta = 0.4655
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "mnist"
    config.dataset.mean = (0.1307,)
    config.dataset.std = (3 * 0.3081,)
    config.forward.learning_rate = 0.02
    config.forward.warmup_steps = 100
    config.forward.schedule_epochs = 2
    config.feedback.iterations = (2, 5, 20)
    config.feedback.noise_scale = (0.4164, 0.3826, 0.1395)
    config.feedback.learning_rate = (5e-4, 4e-4, 0.01)
    config.feedback.init = "symmetric"
    config.when = {"bp": {"forward": {"learning_rate": 0.02, "warmup_steps": 0}}}
    return config
