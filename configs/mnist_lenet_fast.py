"""LeNet 32-64-512 on MNIST by fast L-DRL: docs/results.md, "Speed".

With first-order targets beta only scales the learning rate: at beta = 1 the learning rate means what it means for BP.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ldrl_fast"
    config.num_epochs = 3
    config.batch_size = 64
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "mnist"
    config.dataset.mean = (0.1307,)
    config.dataset.std = (3 * 0.3081,)
    config.forward.learning_rate = 0.02
    config.forward.warmup_steps = 200  # feedback weights start at random: they must get there first
    config.forward.schedule_epochs = 3
    config.when.bp = {"forward": {"warmup_steps": 0}}
    return config
