"""LeNet 32-64-512 on Fashion-MNIST by fast L-DRL, with the settings of `mnist_lenet_fast.py` and mirrored images."""

from configs import mnist_lenet_fast


def get_config():
    config = mnist_lenet_fast.get_config()
    config.num_epochs = 10
    config.forward.schedule_epochs = 10
    config.dataset.name = "fashion_mnist"
    config.dataset.mean = (0.2860,)
    config.dataset.std = (3 * 0.3530,)
    config.dataset.flip = True
    return config
