"""LeNet 32-64-512 on MNIST. Published accuracy (Ernoult et al. 2022): 98.9 % by L-DRL, 98.9 % by BP.

Settings are our own, for 2 epochs on a CPU: 2, 20, 20 feedback iterations per batch where the published CIFAR-10 run
has 41, 51, 24, and higher feedback learning rates. Feedback weights may be noisy, but they must not lag: with
3, 100, 100 iterations at rates of 1e-3, 3e-4, 6e-3 they came up to 18 degrees closer to the forward weights, and yet
after 380 steps the loss was 0.24 rather than 0.15, and conv_1's activations had grown to twice the size.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.num_epochs = 2
    config.batch_size = 64
    config.beta = 0.4655
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.dataset.name = "mnist"
    config.dataset.mean = (0.1307,)
    config.dataset.std = (3 * 0.3081,)
    config.forward.learning_rate = 0.025
    config.forward.warmup_steps = 200
    config.forward.schedule_epochs = 2
    config.feedback.iterations = (2, 20, 20)
    config.feedback.noise_scale = (0.4164, 0.3826, 0.1395)
    config.feedback.learning_rate = (2e-3, 4e-3, 0.07)
    config.when.bp = {"forward": {"learning_rate": 0.02, "warmup_steps": 0}}
    return config
