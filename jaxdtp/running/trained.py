"""What a run has trained, to be used: by itself on raw images, or elsewhere as plain Flax parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
from etils import epath

from jaxdtp.configuration.config import resolve, seeds_of
from jaxdtp.data.images import as_array
from jaxdtp.learning.state import init_state
from jaxdtp.models import networks
from jaxdtp.models.networks import Network, NetworkParameters, NetworkState
from jaxdtp.running.build import build_network, build_preprocessing, build_settings
from jaxdtp.running.claim import described, stored_config
from jaxdtp.running.epoch import Preprocessing, normalise
from jaxdtp.running.standing import restore_best
from jaxdtp.system import storage
from jaxdtp.system.errors import ConfigError
from jaxdtp.system.places import place


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        step: of the checkpoint.
        network: its blocks.
        params: forward parameters by block name, in Flax's layout.
        model: what blocks keep without learning it, such as batch statistics, by block name.
        preprocessing: how uint8 images become the network's input.
        classes: their names, by label.
        predict: `predict(images)` to logits, [batch, classes]; images [batch, height, width, channels] as they were
            given for training, mostly uint8. Jitted.
    """

    step: int
    network: Network
    params: NetworkParameters
    model: NetworkState
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    predict: Callable[[Any], jax.Array]


def load(workdir: str | Path, step: int | None = None, seed: int | None = None) -> Trained:
    """What the run in a directory has trained.

    Args:
        workdir: of the run.
        step: of a checkpoint that it has kept; None: of the best one.
        seed: which one of a run with many, of which there is the best epoch alone.

    Raises:
        ConfigError: there is no run in `workdir`, no such checkpoint, or no such seed.
    """
    workdir = place(str(workdir), "workdir")
    config = resolve(stored_config(workdir))
    seeds = seeds_of(config)
    if seed not in seeds and (config.seeds or seed is not None):
        raise ConfigError(f"seed: got {seed}; allowed: one of {', '.join(map(str, seeds))}, of the run in {workdir}")
    if config.seeds and step is not None:
        raise ConfigError(f"step: got {step}; allowed: None, a run with many seeds keeps the best epoch of each")
    image_shape, dtype, classes, *_ = described(workdir)
    with jax.enable_x64(config.float64):
        network = build_network(config, image_shape, len(classes))
        settings = build_settings(config, network, steps_per_epoch=1)  # which only the learning rates depend on
        shapes = jax.eval_shape(lambda key: init_state(network, settings, key), jax.random.key(0))
        like = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)
        found = restore_best(workdir, config, [like] * len(seeds), step)
    _, step, (params, model) = found[seeds.index(seed) if config.seeds else 0]
    preprocessing = build_preprocessing(config)
    bound = networks.bind(network, model)

    @jax.jit
    def logits(images: jax.Array) -> jax.Array:
        return networks.logits(bound, params, normalise(preprocessing, images))

    def predict(images: Any) -> jax.Array:
        images = np.asarray(images)
        if images.shape[1:] == image_shape[:-1]:
            images = images[..., None]
        if images.dtype == bool or np.issubdtype(images.dtype, np.floating):
            images = as_array(images)
        if images.dtype != dtype or images.shape[1:] != image_shape:
            raise ConfigError(
                f"images: got {images.dtype} of shape {images.shape}; allowed: {dtype} of shape [batch, "
                f"{', '.join(map(str, image_shape))}], as the data set has them"
            )
        with jax.enable_x64(config.float64), jax.default_matmul_precision(config.matmul_precision):
            return logits(images)

    return Trained(step, network, params, model, preprocessing, classes, predict)


def export(trained: Trained, path: str | Path) -> epath.Path:
    """Write the forward parameters, and batch statistics and the like where there are any, as plain Flax variables.

    Args:
        trained: as from `load`.
        path: of the file to write. `.msgpack`: as `flax.serialization.msgpack_restore` reads them, {'params': ...,
            'batch_stats': ...} by block name; `.safetensors`: under names with points between.

    Raises:
        ConfigError: another suffix.
    """
    file, variables = place(str(path), "path"), {"params": trained.params}
    for block, collections in trained.model.items():
        for collection, values in collections.items():
            variables.setdefault(collection, {})[block] = values
    variables = jax.tree.map(np.asarray, variables)
    if file.suffix == ".msgpack":
        storage.write(file, flax.serialization.msgpack_serialize(variables))
    elif file.suffix == ".safetensors":
        from safetensors.numpy import save

        named = flax.traverse_util.flatten_dict(variables)
        storage.write(file, save({".".join(map(str, path)): array for path, array in named.items()}))
    else:
        raise ConfigError(f"path: got {file}; allowed: a name that ends in .msgpack or .safetensors")
    return file
