"""ResNet-18 on CIFAR-10 by L-DRL as published (Ernoult et al. 2022): a stage is a block, its mirror the feedback.

Architecture, rule and symmetric start are the published ones. Feedback settings are those of the published VGG, which
has as many blocks.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 90
    config.batch_size = 128
    config.beta = 0.7
    config.network.name = "residual18"
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (3 * 0.2023, 3 * 0.1994, 3 * 0.2010)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.08
    config.feedback.iterations = (20, 30, 35, 55, 20)
    config.feedback.noise_scale = (0.4, 0.4, 0.2, 0.2, 0.08)
    config.feedback.learning_rate = (1e-4, 3.5e-4, 8e-3, 8e-3, 0.18)
    config.feedback.init = "symmetric"
    config.when.bp = {"forward": {"learning_rate": 0.05}}
    return config
