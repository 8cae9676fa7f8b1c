"""Feedback learning: the rules that train a block's feedback weights, and their iterations on a batch.

A feedback rule is one function

    rule(block, feedback_params, forward, clean, noise) -> loss, gradient

where `forward` is the map that feedback answers, from the block's input x to (y, switches); `clean` is the block's
pass on the batch without noise; `noise` holds what is added to its input and output; and `gradient` is what the
optimizer gets for `feedback_params`: the loss's gradient. Losses are summed over features and averaged over the batch.
The rules that learn layer by layer are in `jaxdtp.learning.layers`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Scalar

from jaxdtp.learning.paths import Paths
from jaxdtp.learning.targets import difference_target
from jaxdtp.models.blocks import Block, Forward, Number, Pass, feedback_difference
from jaxdtp.models.networks import NetworkParameters
from jaxdtp.models.plain_convolutions import fast_in_loops


class Noise(NamedTuple):
    """Noise arrays as they are added (already scaled), shaped as the block's input and output."""

    input: Float[Array, "batch *inputs"]
    output: Float[Array, "batch *outputs"]


FeedbackRule = Callable[[Block, Any, Forward, Pass, Noise], tuple[jax.Array, Any]]


class FeedbackTraining(NamedTuple):
    """How one block's feedback weights are trained on each batch.

    Attributes:
        iterations: updates for each batch, each with fresh noise.
        noise_scale: sigma, the standard deviation of the noise, in units of the activations.
        noise_samples: noise draws averaged in each update.
        optimizer: its state lives on from batch to batch.
        examples: how many of the batch take part, evenly spread over it; None for all.
    """

    iterations: int
    noise_scale: Number
    noise_samples: int
    optimizer: optax.GradientTransformation
    examples: int | None = None


def ldrl_loss(block: Block, feedback_params: Any, forward: Forward, clean: Pass, noise: Noise) -> Scalar:
    """Local difference reconstruction loss (L-DRL) of Ernoult et al. 2022, without its factor 1/sigma^2.

        -2 e . (G(F(s + e)) - G(F(s))) + |G(F(s) + n) - G(F(s))|^2,    e = noise.input, n = noise.output,

    which for sigma -> 0 is sigma^2 |J_G - J_F^T|^2 up to a constant, in expectation. F(s + e) is fed back through the
    switches of its own pass, F(s) + n through the clean ones.
    """
    x, y, switches = clean
    h_clean = block.gate(y, switches)
    h_input = _gate_of_noisy(block, forward, clean, x + noise.input)
    h_output = block.gate(y + noise.output, switches)

    difference, transpose = jax.vjp(
        lambda params: feedback_difference(block, params, h_input, h_clean), feedback_params
    )
    if block.affine:
        # Linear in the weights: its value is their product with its gradient, which is needed anyway, and costs no
        # projection of its own.
        (correlation,) = transpose(noise.input)
        reconstruction = optax.tree.vdot(feedback_params, correlation)
    else:
        reconstruction = jnp.vdot(noise.input, difference)
    size = jnp.sum(feedback_difference(block, feedback_params, h_output, h_clean) ** 2)
    return (size - 2 * reconstruction) / len(x)


def reconstruction_loss(block: Block, feedback_params: Any, forward: Forward, clean: Pass, noise: Noise) -> Scalar:
    """Denoising reconstruction of the noisy input, |s + e - G(F(s + e))|^2 with e = noise.input (Lee et al. 2015)."""
    noisy = clean.input + noise.input
    reconstructed = block.project(feedback_params, _gate_of_noisy(block, forward, clean, noisy))
    return jnp.sum((noisy - reconstructed) ** 2) / len(noisy)


def drl_loss(block: Block, feedback_params: Any, forward: Forward, clean: Pass, noise: Noise) -> Scalar:
    """Difference reconstruction loss (DRL) of Meulemans et al. 2020, without its factor 1/sigma^2.

        |G(F(s + e)) - G(F(s)) - e|^2,    e = noise.input

    is how far the difference target that G makes of F(s + e) is from s + e. For sigma -> 0 G becomes the pseudo-inverse
    of F's Jacobian, so that targets are those of Gauss-Newton for a loss whose Hessian is the identity. F is all from s
    to the network's output: by way of direct feedback, or there and back (`there_and_back`).
    """
    h_input = _gate_of_noisy(block, forward, clean, clean.input + noise.input)
    difference = feedback_difference(block, feedback_params, h_input, block.gate(clean.output, clean.switches))
    return jnp.sum((difference - noise.input) ** 2) / len(noise.input)


def along_path(
    paths: Paths, index: int, forward: NetworkParameters, feedback: NetworkParameters, clean: list[Pass]
) -> Forward:
    """The map that a path's feedback answers: the network's, from the path's end to its source.

    Args:
        paths: all feedback paths.
        index: of this one.
        forward, feedback: parameters of all blocks and all paths.
        clean: passes along all paths.
    """
    del feedback, clean
    return functools.partial(paths[index].block.forward, forward)


def there_and_back(
    paths: Paths, index: int, forward: NetworkParameters, feedback: NetworkParameters, clean: list[Pass]
) -> Forward:
    """As `along_path`, but up to the network's output and, by difference targets, down again to the path's source.

    What DRL is about where feedback is consecutive (Meulemans et al. 2020: DTPDRL); without noise it is F(s).
    """

    def up_and_down(x: Float[Array, "batch *inputs"]) -> tuple[Float[Array, "batch *outputs"], Any, dict]:
        for path in paths[index:]:
            x, _, _ = path.block.forward(forward, x)
        for path, of_path in zip(paths[:index:-1], clean[:index:-1], strict=True):
            x = difference_target(path.block, feedback[path.block.name], path.block.forward, of_path, x)[0]
        return x, clean[index].switches, {}

    return up_and_down


def descend(loss: Callable[[Block, Any, Forward, Pass, Noise], jax.Array]) -> FeedbackRule:
    """The rule that follows the gradient of `loss(block, feedback_params, forward, clean, noise)`."""
    return jax.value_and_grad(loss, argnums=1)


def _gate_of_noisy(block: Block, forward: Forward, clean: Pass, noisy: Float[Array, "batch *inputs"]) -> Any:
    """What `project` gets of F at a noisy input."""
    y, switches, _ = forward(noisy)
    return block.gate(y, switches if block.refreshes else clean.switches)


def draw_noise(key: jax.Array, scale: Number, clean: Pass) -> Noise:
    """Gaussian noise for a block's input and output: the one place where feedback learning draws random numbers."""
    input_key, output_key = jax.random.split(key)
    return Noise(
        scale * jax.random.normal(input_key, clean.input.shape, clean.input.dtype),
        scale * jax.random.normal(output_key, clean.output.shape, clean.output.dtype),
    )


def feedback_update(
    rule: FeedbackRule,
    optimizer: optax.GradientTransformation,
    block: Block,
    feedback_params: Any,
    optimizer_state: optax.OptState,
    forward: Forward,
    clean: Pass,
    noise: Noise,
) -> tuple[Any, optax.OptState, Scalar]:
    """One update of a block's feedback weights; returns them, the optimizer's state and the loss before the update."""
    value, gradient = rule(block, feedback_params, forward, clean, noise)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, feedback_params)
    return optax.apply_updates(feedback_params, updates), optimizer_state, value


def train_feedback(
    rule: FeedbackRule,
    training: FeedbackTraining,
    block: Block,
    feedback_params: Any,
    optimizer_state: optax.OptState,
    forward: Forward,
    clean: Pass,
    key: jax.Array,
) -> tuple[Any, optax.OptState, Scalar]:
    """All updates of a block's feedback weights on one batch, `examples_of` which `clean` has been cut to.

    Returns the weights, the optimizer's state and the loss averaged over the iterations.
    """

    @fast_in_loops
    def update(params, state, noise):
        return feedback_update(rule, training.optimizer, block, params, state, forward, clean, noise)

    def iterate(index, carry):
        params, state, total = carry
        noise = draw_noise(jax.random.fold_in(key, index), training.noise_scale, clean)
        params, state, value = update(params, state, noise)
        return params, state, total + value

    start = (feedback_params, optimizer_state, jnp.zeros((), clean.input.dtype))
    params, state, total = jax.lax.fori_loop(0, training.iterations, iterate, start)
    return params, state, total / training.iterations


def examples_of(training: FeedbackTraining, passes: list[Pass]) -> list[Pass]:
    """Passes of the examples that take part, each as often as there are noise samples: averaging over samples is
    averaging over a batch in which every example stands that many times."""

    def choose(values):
        count = min(training.examples or len(values), len(values))
        spread = len(values) // count
        # Where a batch is divided among devices, each has as many of its own as the others, and none are sent.
        chosen = values[: count * spread].reshape(count, spread, *values.shape[1:])[:, 0]
        return jnp.repeat(chosen, training.noise_samples, axis=0) if training.noise_samples > 1 else chosen

    return jax.tree.map(choose, passes)
