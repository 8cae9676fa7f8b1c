"""Feedback learning: the losses that train a block's feedback weights, and the iterations that minimise them.

A feedback rule is one function

    loss(block, feedback_params, forward_params, clean, noise) -> scalar

where `clean` is the block's pass on the batch without noise and `noise` holds what is added to its input and output.
Losses are summed over features and averaged over the batch. Only `feedback_params` is trained.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdtp.blocks import Block, Parameters, Pass, feedback, feedback_difference


class Noise(NamedTuple):
    """Noise arrays as they are added (already scaled), shaped as the block's input and output."""

    input: jax.Array
    output: jax.Array


FeedbackLoss = Callable[[Block, Parameters, Parameters, Pass, Noise], jax.Array]


class FeedbackTraining(NamedTuple):
    """How one block's feedback weights are trained on each batch.

    Attributes:
        iterations: updates for each batch, each with fresh noise.
        noise_scale: sigma, the standard deviation of the noise, in units of the activations.
        noise_samples: noise draws averaged in each update.
        optimizer: its state lives on from batch to batch.
    """

    iterations: int
    noise_scale: float
    noise_samples: int
    optimizer: optax.GradientTransformation


def ldrl_loss(
    block: Block, feedback_params: Parameters, forward_params: Parameters, clean: Pass, noise: Noise
) -> jax.Array:
    """Local difference reconstruction loss (L-DRL) of Ernoult et al. 2022, without its factor 1/sigma^2.

        -2 e . (G(F(s + e)) - G(F(s))) + |G(F(s) + n) - G(F(s))|^2,    e = noise.input, n = noise.output,

    which for sigma -> 0 is sigma^2 |J_G - J_F^T|^2 up to a constant, in expectation. F(s + e) is fed back through the
    switches of its own pass, F(s) + n through the clean ones.
    """
    x, y, switches = clean
    h_clean = block.gate(y, switches)
    h_input = block.gate(*block.forward(forward_params, x + noise.input))
    h_output = block.gate(y + noise.output, switches)

    # The first term is linear in the weights: its value is their product with its gradient, which is needed anyway,
    # and costs no projection of its own.
    _, transpose = jax.vjp(lambda params: feedback_difference(block, params, h_input, h_clean), feedback_params)
    (correlation,) = transpose(noise.input)
    reconstruction = optax.tree.vdot(feedback_params, correlation)
    size = jnp.sum(feedback_difference(block, feedback_params, h_output, h_clean) ** 2)
    return (size - 2 * reconstruction) / len(x)


def reconstruction_loss(
    block: Block, feedback_params: Parameters, forward_params: Parameters, clean: Pass, noise: Noise
) -> jax.Array:
    """Denoising reconstruction of the noisy input, |s + e - G(F(s + e))|^2 with e = noise.input (Lee et al. 2015)."""
    noisy = clean.input + noise.input
    reconstructed = feedback(block, feedback_params, *block.forward(forward_params, noisy))
    return jnp.sum((noisy - reconstructed) ** 2) / len(noisy)


def draw_noise(key: jax.Array, scale: float, clean: Pass) -> Noise:
    """Gaussian noise for a block's input and output: the one place where feedback learning draws random numbers."""
    input_key, output_key = jax.random.split(key)
    return Noise(
        scale * jax.random.normal(input_key, clean.input.shape, clean.input.dtype),
        scale * jax.random.normal(output_key, clean.output.shape, clean.output.dtype),
    )


def feedback_update(
    loss: FeedbackLoss,
    optimizer: optax.GradientTransformation,
    block: Block,
    feedback_params: Parameters,
    optimizer_state: optax.OptState,
    forward_params: Parameters,
    clean: Pass,
    noise: Noise,
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """One update of a block's feedback weights; returns them, the optimizer's state and the loss before the update."""
    value, gradient = jax.value_and_grad(loss, argnums=1)(block, feedback_params, forward_params, clean, noise)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, feedback_params)
    return optax.apply_updates(feedback_params, updates), optimizer_state, value


def train_feedback(
    loss: FeedbackLoss,
    training: FeedbackTraining,
    block: Block,
    feedback_params: Parameters,
    optimizer_state: optax.OptState,
    forward_params: Parameters,
    clean: Pass,
    key: jax.Array,
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """All updates of a block's feedback weights on one batch.

    Returns the weights, the optimizer's state and the loss averaged over the iterations.
    """
    # Averaging over noise samples is averaging over a batch in which every example stands that many times.
    clean = jax.tree.map(lambda values: jnp.repeat(values, training.noise_samples, axis=0), clean)

    def iterate(index, carry):
        params, state, total = carry
        noise = draw_noise(jax.random.fold_in(key, index), training.noise_scale, clean)
        params, state, value = feedback_update(
            loss, training.optimizer, block, params, state, forward_params, clean, noise
        )
        return params, state, total + value

    start = (feedback_params, optimizer_state, jnp.zeros((), clean.input.dtype))
    params, state, total = jax.lax.fori_loop(0, training.iterations, iterate, start)
    return params, state, total / training.iterations
