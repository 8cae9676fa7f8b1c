"""The parity vectors: one training step of the published PyTorch implementation, in our layout.

Arrays there are NCHW and OIHW, dense weights [out, in], and a dense layer after a convolution flattens (C, H, W).
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxdtp.learning.feedback import Noise
from jaxdtp.models import networks
from jaxdtp.models.blocks import Block

DIRECTORY = Path(os.environ.get("JAXDTP_PARITY_DIR") or Path(__file__).parent / "data")
FILES = sorted(path for path in DIRECTORY.glob("*.npz") if path.stem.rpartition("_")[2] in ("ldrl", "dtp", "tp"))


class Vectors:
    """One npz with the network that it describes."""

    def __init__(self, path: Path):
        self.arrays = np.load(path)
        self.rule = path.stem.rpartition("_")[2]
        self.images = channels_last(self.arrays["x"])
        self.labels = self.arrays["labels"]
        self.network = self._network()

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def _network(self) -> networks.Network:
        sizes = {}
        for key in self.arrays.files:
            if key.startswith("activation/"):
                sizes[key.removeprefix("activation/")] = self[key].shape[1:]
        channels = tuple(size[0] for size in sizes.values() if len(size) == 3)
        features = tuple(size[0] for size in sizes.values() if len(size) == 1)
        kernel = next((self[key] for key in self.arrays.files if key.startswith("forward_before/conv_0")), None)
        geometry = {"hidden": features[:-1]}
        if kernel is None:
            make = networks.mlp
        else:
            make = networks.lenet if kernel.shape[-1] == 5 else networks.vgg
            geometry["channels"] = channels
        network = make(self.images.shape[1:], features[-1], **geometry)
        assert [block.name for block in network] == list(sizes)
        return network

    def batch(self, key: str) -> jnp.ndarray:
        """An array of a batch of activations."""
        return jnp.asarray(channels_last(self[key]))

    def parameters(self, group: str, block: Block) -> dict[str, jnp.ndarray]:
        """Parameters (or gradients) of one block."""
        (name,) = [k for k in self.arrays.files if k.startswith(f"{group}/{block.name}.") and k.endswith("weight")]
        weight, bias = self[name], self[name.removesuffix("weight") + "bias"]
        if weight.ndim == 4:
            return {"kernel": jnp.asarray(weight.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}
        feedback = group.startswith("feedback")
        kernel = weight if feedback else weight.T
        if len(block.input_shape) == 3:
            kernel = rows_channels_last(kernel, block.input_shape)
            bias = rows_channels_last(bias, block.input_shape) if feedback else bias
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    def network_parameters(self, group: str) -> networks.NetworkParameters:
        """Parameters (or gradients) of all blocks, without the first one where they are of the feedback."""
        blocks = self.network[1:] if group.startswith("feedback") else self.network
        return {block.name: self.parameters(group, block) for block in blocks}

    def noise(self, block: Block, iteration: int) -> Noise:
        """Noise of one feedback iteration; DTP and TP draw none for the output."""
        arrays = {}
        for end in ("input", "output"):
            key = f"noise/{block.name}/{iteration}/{end}"
            arrays[end] = self.batch(key) if key in self.arrays.files else None
        return Noise(**arrays)


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def rows_channels_last(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Reorder axis 0 from (C, H, W) to (H, W, C)."""
    height, width, channels = shape
    return np.moveaxis(array.reshape(channels, height, width, -1), 0, 2).reshape(array.shape)
