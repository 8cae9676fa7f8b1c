"""Feedback learning: the rules that train a block's feedback weights, and their iterations on a batch.

A feedback rule is one function

    rule(block, feedback_params, forward, clean, noise) -> loss, gradient

where `forward` is the map that feedback is to invert, from the block's input x to (y, switches); `clean` is the block's
pass on the batch without noise; `noise` holds what is added to its input and output; and `gradient` is what the
optimizer gets for `feedback_params`: the loss's gradient, or that gradient normalised. Losses are summed over features
and averaged over the batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdtp.learning.paths import Paths
from jaxdtp.learning.targets import difference_target
from jaxdtp.models.blocks import Block, Forward, Parameters, Pass, feedback, feedback_difference
from jaxdtp.models.networks import NetworkParameters


class Noise(NamedTuple):
    """Noise arrays as they are added (already scaled), shaped as the block's input and output."""

    input: jax.Array
    output: jax.Array


FeedbackRule = Callable[[Block, Parameters, Forward, Pass, Noise], tuple[jax.Array, Parameters]]


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
    noise_scale: float
    noise_samples: int
    optimizer: optax.GradientTransformation
    examples: int | None = None


def ldrl_loss(block: Block, feedback_params: Parameters, forward: Forward, clean: Pass, noise: Noise) -> jax.Array:
    """Local difference reconstruction loss (L-DRL) of Ernoult et al. 2022, without its factor 1/sigma^2.

        -2 e . (G(F(s + e)) - G(F(s))) + |G(F(s) + n) - G(F(s))|^2,    e = noise.input, n = noise.output,

    which for sigma -> 0 is sigma^2 |J_G - J_F^T|^2 up to a constant, in expectation. F(s + e) is fed back through the
    switches of its own pass, F(s) + n through the clean ones.
    """
    x, y, switches = clean
    h_clean = block.gate(y, switches)
    h_input = block.gate(*forward(x + noise.input))
    h_output = block.gate(y + noise.output, switches)

    difference, transpose = jax.vjp(
        lambda params: feedback_difference(block, params, h_input, h_clean), feedback_params
    )
    if block.squash:
        reconstruction = jnp.vdot(noise.input, difference)
    else:
        # Linear in the weights: its value is their product with its gradient, which is needed anyway, and costs no
        # projection of its own.
        (correlation,) = transpose(noise.input)
        reconstruction = optax.tree.vdot(feedback_params, correlation)
    size = jnp.sum(feedback_difference(block, feedback_params, h_output, h_clean) ** 2)
    return (size - 2 * reconstruction) / len(x)


def reconstruction_loss(
    block: Block, feedback_params: Parameters, forward: Forward, clean: Pass, noise: Noise
) -> jax.Array:
    """Denoising reconstruction of the noisy input, |s + e - G(F(s + e))|^2 with e = noise.input (Lee et al. 2015)."""
    noisy = clean.input + noise.input
    reconstructed = feedback(block, feedback_params, *forward(noisy))
    return jnp.sum((noisy - reconstructed) ** 2) / len(noisy)


def drl_loss(block: Block, feedback_params: Parameters, forward: Forward, clean: Pass, noise: Noise) -> jax.Array:
    """Difference reconstruction loss (DRL) of Meulemans et al. 2020, without its factor 1/sigma^2.

        |G(F(s + e)) - G(F(s)) - e|^2,    e = noise.input

    is how far the difference target that G makes of F(s + e) is from s + e. For sigma -> 0 G becomes the pseudo-inverse
    of F's Jacobian, so that targets are those of Gauss-Newton. F is all from s to the network's output: by way of
    direct feedback, or there and back (`there_and_back`).
    """
    h_input = block.gate(*forward(clean.input + noise.input))
    difference = feedback_difference(block, feedback_params, h_input, block.gate(clean.output, clean.switches))
    return jnp.sum((difference - noise.input) ** 2) / len(noise.input)


def along_path(
    paths: Paths, index: int, forward: NetworkParameters, feedback: NetworkParameters, clean: list[Pass]
) -> Forward:
    """The map that a path's feedback is to invert: the network's, from the path's end to its source.

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

    def up_and_down(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for path in paths[index:]:
            x, _ = path.block.forward(forward, x)
        for path, of_path in zip(paths[:index:-1], clean[:index:-1], strict=True):
            x = difference_target(path.block, feedback[path.block.name], path.block.forward, of_path, x)[0]
        return x, clean[index].switches

    return up_and_down


def descend(loss: Callable[[Block, Parameters, Forward, Pass, Noise], jax.Array]) -> FeedbackRule:
    """The rule that follows the gradient of `loss(block, feedback_params, forward, clean, noise)`."""
    return jax.value_and_grad(loss, argnums=1)


def match_jacobian(
    block: Block, feedback_params: Parameters, forward: Forward, clean: Pass, noise: Noise
) -> tuple[jax.Array, Parameters]:
    """L-DRL for sigma -> 0, without its noise at the optimum, and with a step that needs no learning rate.

    For a direction e at the block's input (noise.input; its scale cancels), by forward-mode differentiation of F and
    one pass of e through the feedback weights,

        r = J_F e - J_G^T e,    loss |r|^2 / mean(e^2),

    whose expectation is L-DRL's limit |J_G - J_F^T|^2, and whose gradient is zero for every e once the Jacobians match.
    Half of it, divided by its curvature, is what the optimizer gets, for the kernel alone: where g^2 is the squared
    slope of the feedback gate at a unit of output feature k (the kernel's last axis; summed where units share a
    position), n the number of weights that meet in a position, and sums run over batch and positions,

        -sum_k e g r / (mean(e^2) (sum_k g^2 + n max(sum_k g^4 / sum_k g^2, mean(g^2)))).

    With rate 1 that is the normalised least-mean-squares step (Widrow & Hoff 1960; Nagumo & Noda 1967) for many
    equations at once: close to their solution where they outnumber the unknowns, a projection where they are few. The
    mean over all features damps the step of those that are shut. On maps so small that padding keeps much of the kernel
    outside, n counts too many and the step is too small by the same factor.
    """
    x, y, switches = clean
    gate = lambda y: block.gate(y, switches)  # noqa: E731

    def transposed_product(params):
        _, to_y = jax.vjp(lambda y: feedback(block, params, y, switches), y)
        return to_y(noise.input)[0]

    _, forward_product = jax.jvp(lambda x: forward(x)[0], (x,), (noise.input,))
    feedback_product, to_params = jax.vjp(transposed_product, feedback_params)
    residual = forward_product - feedback_product
    (descent,) = to_params(residual)

    h, to_y = jax.vjp(gate, y)
    (slopes,) = to_y(jnp.ones_like(h))
    _, squares = jax.jvp(gate, (y,), (slopes,))
    size = jnp.mean(noise.input**2)
    kernel = descent["kernel"]
    fan_in = kernel.size // kernel.shape[-1]
    positions = tuple(range(squares.ndim - 1))
    total = jnp.sum(squares, axis=positions)
    # Where every unit is shut there is nothing to divide by, and nothing to learn.
    tiny = jnp.finfo(y.dtype).tiny
    typical = jnp.maximum(jnp.sum(squares**2, axis=positions) / (total + tiny), jnp.sum(total) / y.size)
    curvature = size * (total + fan_in * typical) + tiny
    gradient = jax.tree.map(jnp.zeros_like, feedback_params) | {"kernel": -kernel / curvature}
    return jnp.sum(residual**2) / (size * len(x)), gradient


def draw_noise(key: jax.Array, scale: float, clean: Pass) -> Noise:
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
    feedback_params: Parameters,
    optimizer_state: optax.OptState,
    forward: Forward,
    clean: Pass,
    noise: Noise,
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """One update of a block's feedback weights; returns them, the optimizer's state and the loss before the update."""
    value, gradient = rule(block, feedback_params, forward, clean, noise)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, feedback_params)
    return optax.apply_updates(feedback_params, updates), optimizer_state, value


def train_feedback(
    rule: FeedbackRule,
    training: FeedbackTraining,
    block: Block,
    feedback_params: Parameters,
    optimizer_state: optax.OptState,
    forward: Forward,
    clean: Pass,
    key: jax.Array,
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """All updates of a block's feedback weights on one batch, `examples_of` which `clean` has been cut to.

    Returns the weights, the optimizer's state and the loss averaged over the iterations.
    """

    def iterate(index, carry):
        params, state, total = carry
        noise = draw_noise(jax.random.fold_in(key, index), training.noise_scale, clean)
        params, state, value = feedback_update(rule, training.optimizer, block, params, state, forward, clean, noise)
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
        return jnp.repeat(chosen, training.noise_samples, axis=0)

    return jax.tree.map(choose, passes)
