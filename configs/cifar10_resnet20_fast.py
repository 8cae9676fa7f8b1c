"""ResNet-20 (He et al. 2016, section 4.2) on CIFAR-10 by fast L-DRL, with their settings."""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 164
    config.batch_size = 128
    config.network.name = "resnet20"
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (0.2470, 0.2435, 0.2616)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.1
    config.forward.warmup_steps = 200  # feedback weights start at random: they must get there first
    config.forward.schedule = "step"
    config.forward.schedule_milestones = (81, 122)
    config.feedback.batch_share = (0.25,)  # of each batch, that a layer is probed with at most
    return config
