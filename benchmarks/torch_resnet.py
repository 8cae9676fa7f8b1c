"""The residual networks of `jaxdtp.models.resnet` in PyTorch, as anybody writes them: what ours are timed against.

Images are [batch, 3, height, width].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"resnet20": ((3, 3, 3), 16), "resnet18": ((2, 2, 2, 2), 64)}
"""Blocks in each stage, and channels of the first one."""


class ResidualBlock(nn.Module):
    """relu(x + F(x)): two 3x3 convolutions, each normalised; x is projected where its shape changes."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.projection = nn.Sequential()
        if (channels, stride) != (features, 1):
            convolution = nn.Conv2d(channels, features, 1, stride, bias=False)
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(features))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, features, height / stride, width / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.projection(x) + self.norm2(self.conv2(y)))


def resnet(name: str, num_classes: int = 10) -> nn.Sequential:
    """A 3x3 convolution, stages of residual blocks, of which all but the first halve the image, mean, dense."""
    blocks, width = SIZES[name]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            layers.append(ResidualBlock(channels, width * 2**stage, 2 if stage and not index else 1))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def bp_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One training step by backpropagation; returns the mean cross-entropy before it."""
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
