"""LeNet 32-64-512 on MNIST. Published accuracy (Ernoult et al. 2022): 98.9 % by L-DRL, 98.9 % by BP.

Settings are our own, for 2 epochs on a CPU: 2, 15, 15 feedback iterations per batch where the published CIFAR-10 run
has 41, 51, 24. With so few, feedback weights lag behind; forward learning rates of 0.015 and more have diverged.
"""

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
    config.forward.learning_rate = 0.01
    config.forward.warmup_steps = 200
    config.forward.schedule_epochs = 4
    config.feedback.iterations = (2, 15, 15)
    config.feedback.noise_scale = (0.4164, 0.3826, 0.1395)
    config.feedback.learning_rate = (2e-3, 8e-4, 0.0128)
    config.when = {"bp": {"forward": {"learning_rate": 0.02, "warmup_steps": 0}}}
    return config
