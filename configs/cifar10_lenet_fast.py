"""LeNet 32-64-512 on CIFAR-10 by fast L-DRL: docs/results.md, "Speed".

With first-order targets beta only scales the learning rate: at beta = 1 the learning rate means what it means for BP.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 90
    config.batch_size = 256
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (3 * 0.2023, 3 * 0.1994, 3 * 0.2010)
    config.dataset.flip = True
    config.dataset.crop_padding = 4
    config.forward.learning_rate = 0.05
    config.forward.warmup_steps = 200  # feedback weights start at random: they must get there first
    config.forward.schedule_epochs = 85
    config.when.bp = {"forward": {"warmup_steps": 0}}
    return config
