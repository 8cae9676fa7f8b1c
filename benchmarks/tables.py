"""The rows of the papers' tables, as runs of ours: what `benchmarks.published` and `benchmarks.gpu_runs` train."""

from typing import NamedTuple


class Row(NamedTuple):
    """A rule on a network and a data set.

    Attributes:
        paper: that the published figure is from.
        what: network and data, for the reader.
        name: of the result, together with the rule's.
        rule: what learns.
        config: the configuration file, and its variant.
        options: what the run changes of it.
        published: accuracy between 0 and 1; None where there is no figure.
        seeds: how many.
        metric: of the run's summary, that `published` is about.
        gpu: whether it takes too long without one.
    """

    paper: str
    what: str
    name: str
    rule: str
    config: str
    options: tuple[str, ...]
    published: float | None
    seeds: int
    metric: str
    gpu: bool

    @property
    def command(self) -> list[str]:
        """Arguments of `python -m jaxdtp.main`, without the places of data and results."""
        name, _, variant = self.config.partition(":")
        config = f"--config=configs/{name}.py" + (f":{variant}" if variant else "")
        return [config, f"--config.algorithm={self.rule}", *self.options, f"--config.seeds={self.seeds}"]


def _rows(paper, what, name, config, published, *options, seeds=1, metric="test_accuracy", gpu=False) -> list[Row]:
    return [
        Row(paper, what, name, rule, config, options, figure, seeds, metric, gpu) for rule, figure in published.items()
    ]


def _cosine(epochs: int, angles_every: int = 1) -> tuple[str, ...]:
    """Options: a cosine schedule that ends with the run, and how often angles are measured."""
    return (
        f"--config.num_epochs={epochs}",
        "--config.forward.schedule=cosine",
        f"--config.forward.schedule_epochs={epochs}",
        f"--config.alignment.every_epochs={angles_every}",
    )


def _drl(data: str, name: str, errors: tuple[float, ...]) -> list[Row]:
    """The family of Meulemans et al.: published errors of ddtp_linear, ddtp_rhl, dtpdrl, ddtp_control, dtp, dtp with
    feedback epochs, bp."""
    rules = ("ddtp_linear", "ddtp_rhl", "dtpdrl", "ddtp_control", "dtp_parallel", "pretrained", "bp")
    figures = {rule: round(1 - error, 4) for rule, error in zip(rules, errors, strict=True)}
    pretrained = {"dtp_parallel": figures.pop("pretrained")}
    return [
        *_rows(DRL, f"MLP, {data}", f"mlp_{name}", f"{name}_mlp", figures, ANGLES, seeds=3),
        *_rows(
            DRL,
            f"MLP, {data}, with feedback epochs",
            f"mlp_{name}_pretrained",
            f"{name}_mlp:pretrained",
            pretrained,
            ANGLES,
            seeds=3,
        ),
    ]


LDRL = "Ernoult et al. 2022"
DRL = "Meulemans et al. 2020, table 1"
BIOTORCH = "BioTorch, Benchmarks.md"
NONE = "-"
ANGLES = "--config.alignment.every_epochs=10"

ROWS = [
    *_rows(
        LDRL,
        "LeNet, MNIST",
        "lenet_mnist",
        "mnist_lenet_fast",
        {"ldrl_fast": 0.989, "bp": 0.989},
        *_cosine(10),
        seeds=3,
    ),
    *_rows(
        LDRL,
        "LeNet, Fashion-MNIST",
        "lenet_fashion_mnist",
        "fashion_mnist_lenet_fast",
        {"ldrl_fast": 0.903, "bp": 0.914},
        *_cosine(10),
        seeds=3,
    ),
    *_rows(
        LDRL,
        "LeNet, CIFAR-10 (JPEG copy)",
        "lenet_cifar10",
        "cifar10_lenet_fast",
        {"ldrl_fast": 0.853, "bp": 0.863},
        ANGLES,
    ),
    *_rows(
        LDRL,
        "LeNet, Fashion-MNIST, published settings but for the epochs",
        "lenet_fashion_mnist_published",
        "fashion_mnist_lenet",
        {"ldrl": 0.903},
        *_cosine(5),
    ),
    *_rows(
        LDRL,
        "VGG, CIFAR-10 (JPEG copy), 90 epochs",
        "vgg_cifar10_full",
        "cifar10_vgg_fast",
        {"ldrl_fast": 0.894, "bp": 0.890},
        ANGLES,
        seeds=3,
        gpu=True,
    ),
    *_rows(
        LDRL,
        "VGG, CIFAR-10 (JPEG copy), published settings",
        "vgg_cifar10_published",
        "cifar10_vgg",
        {"ldrl": 0.894, "bp": 0.890},
        ANGLES,
        gpu=True,
    ),
    *_rows(
        BIOTORCH,
        "ResNet-20, CIFAR-10 (JPEG copy)",
        "resnet20_cifar10",
        "cifar10_resnet20_fast",
        {"ldrl_fast": None, "kp": None, "sign_symmetry": 0.8995, "fa": None, "bp": 0.9137},
        *_cosine(16),
    ),
    *_rows(
        BIOTORCH,
        "ResNet-20, CIFAR-10 (JPEG copy), 60 epochs",
        "resnet20_cifar10_full",
        "cifar10_resnet20_fast",
        {"ldrl_fast": None, "kp": None, "sign_symmetry": 0.8995, "fa": None, "bp": 0.9137},
        *_cosine(60, 10),
        gpu=True,
    ),
    *_rows(
        NONE,
        "ResNet-18, CIFAR-10 (JPEG copy)",
        "resnet18_cifar10",
        "cifar10_resnet18_fast",
        {"ldrl_fast": None, "bp": None},
        *_cosine(30, 10),
        gpu=True,
    ),
    *_rows(
        LDRL,
        "VGG, ImageNet 32x32 (200-class part), top-5",
        "vgg_imagenet32",
        "imagenet32_vgg_fast",
        {"ldrl_fast": 0.606, "bp": 0.613},
        *_cosine(30, 5),
        metric="test_top5",
    ),
    *_rows(
        NONE,
        "ResNet-20, ImageNet 32x32 (200-class part), top-5",
        "resnet20_imagenet32",
        "imagenet32_resnet18_fast",
        {"ldrl_fast": None, "bp": None},
        "--config.network.name=resnet20",
        *_cosine(16),
        metric="test_top5",
    ),
    *_drl("MNIST", "mnist", (0.0204, 0.0210, 0.0221, 0.0251, 0.0239, 0.0226, 0.0198)),
    *_drl("Fashion-MNIST", "fashion_mnist", (0.1111, 0.1153, 0.1122, 0.1171, 0.1149, 0.1152, 0.1074)),
    *_rows(
        NONE, "ViT, digits", "vit_digits", "digits_vit_fast", {"ldrl_fast": None, "bp": None}, *_cosine(40), seeds=3
    ),
    *_rows(NONE, "ViT, MNIST", "vit_mnist", "mnist_vit_fast", {"ldrl_fast": None, "bp": None}, *_cosine(5)),
]
