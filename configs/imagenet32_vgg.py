"""VGG 128-128-256-256-512 on ImageNet 32x32 as published (Ernoult et al. 2022): top-5 60.6 % by L-DRL, 61.3 % by BP.

Our own choice: ImageNet's mean, and three times its standard deviation, as the published CIFAR-10 runs scale theirs.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 90
    config.batch_size = 256
    config.beta = 0.7
    config.network.name = "vgg"
    config.network.channels = (128, 128, 256, 256, 512)
    config.network.hidden = ()
    config.dataset.name = "imagenet_resized/32x32"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (3 * 0.229, 3 * 0.224, 3 * 0.225)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.01
    config.feedback.iterations = (25, 35, 40, 60, 25)
    config.feedback.noise_scale = (0.4, 0.4, 0.2, 0.2, 0.08)
    config.feedback.learning_rate = (1e-4, 3.5e-4, 8e-3, 8e-3, 0.18)
    return config
