"""ResNet-18 with a 3x3 stem on ImageNet 32x32 by fast L-DRL."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 100
    config.batch_size = 256
    config.network.name = "resnet18"
    config.dataset.name = "imagenet_resized/32x32"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.1
    config.forward.warmup_steps = 400  # feedback weights start at random: they must get there first
    config.forward.weight_decay = 5e-4
    config.forward.schedule_epochs = 100
    config.feedback.batch_share = (0.125,)  # of each batch, that a layer is probed with at most
    return config
