"""Optimizers, and schedules of the forward learning rate: constant within an epoch as in the published runs, after a
warm-up."""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def sgd(group: ConfigDict, learning_rate: optax.ScalarOrSchedule, epsilon: float) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum."""
    del epsilon
    return optax.sgd(learning_rate, momentum=group.momentum)


def adam(group: ConfigDict, learning_rate: optax.ScalarOrSchedule, epsilon: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015)."""
    return optax.adam(learning_rate, *group.adam_betas, eps=epsilon)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


def optimizer(
    group: ConfigDict, learning_rate: optax.ScalarOrSchedule, epsilon: float, weight_decay: float
) -> optax.GradientTransformation:
    """The optimizer of `forward` or `feedback`; weight decay is added to the gradient, before all else.

    Args:
        group: of a configuration.
        learning_rate, epsilon, weight_decay: of one block.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay), OPTIMIZERS[group.optimizer](group, learning_rate, epsilon)
    )


def cosine(forward: ConfigDict) -> optax.Schedule:
    """final + (lr - final) (1 + cos(pi e / schedule_epochs)) / 2 in epoch e = 0, 1, ...

    The published runs go on along the cosine after schedule_epochs = 85, up to epoch 90, where Optax's own cosine
    schedule would stay at its end.
    """
    initial, final = forward.learning_rate, forward.final_learning_rate
    angle = lambda epoch: jnp.pi * jnp.asarray(epoch, float) / forward.schedule_epochs  # noqa: E731
    return lambda epoch: final + (initial - final) * (1 + jnp.cos(angle(epoch))) / 2


def step(forward: ConfigDict) -> optax.Schedule:
    """The learning rate, multiplied by schedule_factor after each epoch of schedule_milestones."""
    milestones = forward.schedule_milestones

    # Not Optax's, for which milestones are no arguments of a program.
    def rate(epoch):
        passed = [jnp.where(epoch >= milestone, forward.schedule_factor, 1.0) for milestone in milestones]
        return forward.learning_rate * jnp.prod(jnp.array(passed))

    return rate


def constant(forward: ConfigDict) -> optax.Schedule:
    """The learning rate, in all epochs."""
    return optax.constant_schedule(forward.learning_rate)


SCHEDULES = {"cosine": cosine, "step": step, "constant": constant}


def schedule(forward: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by training step: the epoch's, and in the first `warmup_steps` a linearly growing part of it.

    Feedback weights start at random, and the targets that they propagate mean nothing until they are aligned. The
    published runs have no warm-up, but more feedback iterations for each batch.

    Args:
        forward: the group `forward` of a configuration.
        steps_per_epoch: training steps in one epoch.
    """
    by_epoch = SCHEDULES[forward.schedule](forward)
    # A quotient of two int32 would be a float32, in float64 too.
    warmup = jnp.maximum(1.0, jnp.asarray(forward.warmup_steps, float))
    return lambda count: by_epoch(count // steps_per_epoch) * jnp.minimum(1.0, jnp.asarray(count + 1, float) / warmup)
