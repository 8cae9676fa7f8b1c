"""VGG 128-128-256-256-512 on CIFAR-10 by fast L-DRL: docs/results.md, "Speed".

With first-order targets beta only scales the learning rate: at beta = 1 the learning rate means what it means for BP.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 90
    config.batch_size = 128
    config.network.name = "vgg"
    config.network.channels = (128, 128, 256, 256, 512)
    config.network.hidden = ()
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (3 * 0.2023, 3 * 0.1994, 3 * 0.2010)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.05
    config.forward.warmup_steps = 200  # feedback weights start at random: they must get there first
    config.forward.schedule_epochs = 85
    config.feedback.batch_share = (0.25,)  # of each batch, that a layer is probed with at most
    config.when.bp = {"forward": {"warmup_steps": 0}}
    return config
