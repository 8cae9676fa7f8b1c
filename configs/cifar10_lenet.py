"""LeNet 32-64-512 on CIFAR-10 as published (Ernoult et al. 2022): 85.3 % by L-DRL, 86.3 % by BP."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 90
    config.batch_size = 256
    config.beta = 0.4655
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (3 * 0.2023, 3 * 0.1994, 3 * 0.2010)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.03618
    config.feedback.iterations = (41, 51, 24)
    config.feedback.noise_scale = (0.4164, 0.3826, 0.1395)
    config.feedback.learning_rate = (7.188e-4, 1.251e-4, 0.03541)
    config.when.bp = {"forward": {"learning_rate": 0.05}}
    return config
