"""VGG 128-128-256-256-512 on ImageNet 32x32 by fast L-DRL, with the settings of `cifar10_vgg_fast.py`."""

from configs import cifar10_vgg_fast


def get_config():
    config = cifar10_vgg_fast.get_config()
    config.dataset.name = "imagenet_resized/32x32"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (3 * 0.229, 3 * 0.224, 3 * 0.225)
    return config
