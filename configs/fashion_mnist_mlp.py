"""MLP 784-5x256-10 of tanh units on Fashion-MNIST: Meulemans et al. 2020, with each rule's published settings.

The conventions are those of `mnist_mlp.py`. Pixels are in [0, 1], as published.
"""

from configs import mnist_mlp
from configs.mnist_mlp import BATCH, PRETRAINED, feedback, forward


def get_config(variant: str = ""):
    """`--config=configs/fashion_mnist_mlp.py:pretrained` has DTP's settings with feedback epochs."""
    config = mnist_mlp.get_config(variant)
    config.dataset.name = "fashion_mnist"
    config.dataset.mean = (0.0,)
    config.dataset.std = (1.0,)
    config.when.bp = {"forward": {"learning_rate": 2.876e-4, "adam_betas": (0.9, 0.99), "adam_epsilon": (4.73e-8,)}}
    config.when.dtp_parallel = {
        "beta": 0.24134 / BATCH,
        "forward": forward(2.596e-4, (0.9, 0.99), 3.18e-8),
        "feedback": feedback(0.26749, 3.660e-4, (0.99, 0.999), 1.36e-6, 0.0, scale=0.26749**-2, squash="tanh"),
    }
    if variant == "pretrained":
        config.when.dtp_parallel = {
            "beta": 0.038391 / BATCH,
            "forward": forward(2.392e-4, (0.99, 0.9), 5.06e-8),
            "feedback": feedback(
                0.29949, 2.328e-4, (0.99, 0.99), 2.43e-8, 4.34e-4, scale=0.29949**-2, squash="tanh", **PRETRAINED
            ),
        }
    config.when.dtpdrl = {
        "beta": 0.086567 / BATCH,
        "forward": forward(8.204e-4, (0.99, 0.999), 1.64e-8),
        "feedback": feedback(
            0.084333, 9.698e-5, (0.99, 0.9), 2.27e-5, 2.14e-5, scale=0.084333**-2, squash="tanh", **PRETRAINED
        ),
    }
    config.when.ddtp_linear = {
        "beta": 0.017250 / BATCH,
        "forward": forward(5.045e-4, (0.99, 0.99), 1.73e-8),
        "feedback": feedback(0.098573, 7.959e-4, (0.99, 0.9), 3.11e-8, 5.78e-6, scale=0.098573**-2, **PRETRAINED),
    }
    config.when.ddtp_rhl = {
        "beta": 0.026152 / BATCH,
        "forward": forward(1.2906e-3, (0.9, 0.99), 3.65e-7),
        "feedback": feedback(
            0.043876, 1.157e-5, (0.9, 0.999), 2.08e-4, 8.50e-4, scale=0.043876**-2, squash="tanh", **PRETRAINED
        ),
    }
    config.when.ddtp_control = {
        "beta": 0.032346 / BATCH,
        "forward": forward(9.298e-4, (0.9, 0.999), 1.33e-8),
        "feedback": feedback(0.084869, 3.121e-5, (0.999, 0.99), 3.26e-4, 1.19e-6, scale=1.0, **PRETRAINED),
    }
    config.when.dfa = {"beta": 1 / BATCH, "forward": forward(9.403e-4, (0.9, 0.99), 3.66e-8)}
    config.when.dtp = config.when.tp = config.when.dtp_parallel
    return config
