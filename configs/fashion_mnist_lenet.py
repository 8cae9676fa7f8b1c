"""LeNet 32-64-512 on Fashion-MNIST. Published accuracy (Ernoult et al. 2022): 90.3 % by L-DRL, 91.4 % by BP.

The published feedback settings are those of CIFAR-10; normalisation is our own, scaled as published for CIFAR-10.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 90
    config.batch_size = 256
    config.beta = 0.4655
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "fashion_mnist"
    config.dataset.mean = (0.2860,)
    config.dataset.std = (3 * 0.3530,)
    config.dataset.flip = True
    config.forward.learning_rate = 0.03618
    config.feedback.iterations = (41, 51, 24)
    config.feedback.noise_scale = (0.4164, 0.3826, 0.1395)
    config.feedback.learning_rate = (7.188e-4, 1.251e-4, 0.03541)
    config.when.bp = {"forward": {"learning_rate": 0.05}}
    return config
