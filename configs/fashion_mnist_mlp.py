"""MLP 784-5x256-10 of tanh units on Fashion-MNIST: Meulemans et al. 2020, with each rule's published settings.

Rules that are not in that paper have the settings of `mnist_mlp.py`. Pixels are in [0, 1], as published.
"""

from configs import mnist_mlp

PUBLISHED = {
    "bp": (1.0, (2.876e-4, (0.9, 0.99), 4.73e-8), None),
    "dfa": (1.0, (9.403e-4, (0.9, 0.99), 3.66e-8), None),
    "dtp_parallel": (
        0.24134,
        (2.596e-4, (0.9, 0.99), 3.18e-8),
        (0.26749, 3.660e-4, (0.99, 0.999), 1.36e-6, 0.0),
    ),
    "dtpdrl": (
        0.086567,
        (8.204e-4, (0.99, 0.999), 1.64e-8),
        (0.084333, 9.698e-5, (0.99, 0.9), 2.27e-5, 2.14e-5),
    ),
    "ddtp_linear": (
        0.017250,
        (5.045e-4, (0.99, 0.99), 1.73e-8),
        (0.098573, 7.959e-4, (0.99, 0.9), 3.11e-8, 5.78e-6),
    ),
    "ddtp_rhl": (
        0.026152,
        (1.2906e-3, (0.9, 0.99), 3.65e-7),
        (0.043876, 1.157e-5, (0.9, 0.999), 2.08e-4, 8.50e-4),
    ),
    "ddtp_control": (
        0.032346,
        (9.298e-4, (0.9, 0.999), 1.33e-8),
        (0.084869, 3.121e-5, (0.999, 0.99), 3.26e-4, 1.19e-6),
    ),
}
PRETRAINED = (0.038391, (2.392e-4, (0.99, 0.9), 5.06e-8), (0.29949, 2.328e-4, (0.99, 0.99), 2.43e-8, 4.34e-4))


def get_config(variant: str = ""):
    """`--config=configs/fashion_mnist_mlp.py:pretrained` has DTP's settings with feedback epochs."""
    config = mnist_mlp.get_config(variant)
    config.dataset.name = "fashion_mnist"
    config.dataset.mean = (0.0,)
    config.dataset.std = (1.0,)
    mnist_mlp.family(config, variant, PUBLISHED, PRETRAINED)
    return config
