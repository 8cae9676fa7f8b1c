"""A backpropagation step as anybody writes it with Flax and Optax: what ours is timed against."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from benchmarks.steps import CLASSES, Step, configure, random_batch
from jaxdtp.models.own import MODULES


class Convolutional(nn.Module):
    """The published VGG and LeNet."""

    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    kernel_size: int
    window: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """[batch, height, width, channels] to [batch, classes]."""
        margin = (self.window // 2 if self.window == 3 else 0,) * 2
        for channels in self.channels:
            x = nn.elu(nn.Conv(channels, (self.kernel_size, self.kernel_size))(x))
            x = nn.max_pool(x, (self.window, self.window), (2, 2), (margin, margin))
        x = x.reshape(len(x), -1)
        for features in self.hidden:
            x = nn.elu(nn.Dense(features)(x))
        return nn.Dense(CLASSES)(x)


def flax_step(config: ConfigDict) -> Step:
    """The step of a configuration's network: one jitted call each."""
    config = configure(config, "bp")
    name, forward = config.network.name, config.forward
    if name in MODULES:
        module = MODULES[name](num_classes=CLASSES, **config.network.options)
    else:
        geometry = {"vgg": (3, 2), "lenet": (5, 3)}[name]
        module = Convolutional(tuple(config.network.channels), tuple(config.network.hidden), *geometry)
    optimizer = optax.chain(
        optax.add_decayed_weights(forward.weight_decay), optax.sgd(forward.learning_rate, momentum=forward.momentum)
    )
    images, labels = map(jnp.asarray, random_batch(config.batch_size))
    variables = jax.jit(lambda key: module.init(key, images[:2], train=False))(jax.random.key(0))
    kept = list(set(variables) - {"params"})

    def step(params, rest, optimizer_state, images, labels):
        def loss(params):
            logits, rest_after = module.apply({"params": params, **rest}, images, train=True, mutable=kept)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), rest_after

        (_, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), rest, optimizer_state

    params = variables["params"]
    state = (params, {name: variables[name] for name in kept}, optimizer.init(params))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, images, labels).compile()
    seconds = time.perf_counter() - start
    kept_bytes = sum(values.nbytes for values in jax.tree.leaves((state, images, labels)))

    def run(count):
        nonlocal state
        for _ in range(count):
            state = compiled(*state, images, labels)
        jax.block_until_ready(state)

    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Step(run, None, kept_bytes, seconds, needed + memory.temp_size_in_bytes)
