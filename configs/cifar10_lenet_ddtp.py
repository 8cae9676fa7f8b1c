"""LeNet 32-64-512 of tanh units on CIFAR-10, by direct feedback: the convolutional network of Meulemans et al. 2020.

Settings are the published ones, converted as in mnist_mlp.py; a convolutional layer's local loss is a mean over its
features there. Their convolutional layers' feedback has no bias, which cancels anyway.
"""

from jaxdtp import default_config


def get_config():
    config = default_config()
    config.algorithm = "ddtp_linear"
    config.num_epochs = 100
    config.batch_size = 128
    config.float64 = True
    config.beta = 0.015962 / 128
    config.network.name = "lenet"
    config.network.channels = (32, 64)
    config.network.hidden = (512,)
    config.network.activation = "tanh"
    config.network.init = "xavier_normal"
    config.dataset.name = "cifar10"
    config.dataset.validation_fraction = 0.1
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (0.2023, 0.1994, 0.2010)
    # Gradients there, in units of ours.
    factors = tuple(2 / features for features in (16 * 16 * 32, 8 * 8 * 64, 1, 1))
    epsilons = (2.79e-8, 1.99e-8, 4.52e-6, 4.05e-5)
    config.forward.optimizer = "adam"
    config.forward.learning_rate = 2.594e-4
    config.forward.rate_factors = tuple(rate / 2.594e-4 for rate in (2.594e-4, 8.855e-4, 1.423e-4, 3.387e-6))
    config.forward.adam_betas = (0.9, 0.999)
    config.forward.adam_epsilon = tuple(epsilon / factor for epsilon, factor in zip(epsilons, factors, strict=True))
    config.forward.schedule = "constant"
    config.forward.weight_decay = 0.0
    sigma = 0.00921
    factors = tuple(sigma**-2 / features for features in (16 * 16 * 32, 8 * 8 * 64, 512))
    config.feedback.iterations = (1,)
    config.feedback.noise_scale = (sigma,)
    config.feedback.optimizer = "adam"
    config.feedback.learning_rate = (4.516e-3,)
    config.feedback.adam_epsilon = tuple(7.53e-7 / factor for factor in factors)
    config.feedback.weight_decay = tuple(6.17e-5 / factor for factor in factors)
    config.feedback.activation = "linear"
    config.feedback.pretraining_epochs = 10
    config.feedback.extra_epochs = 1
    return config
