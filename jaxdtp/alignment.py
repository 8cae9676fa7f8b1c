"""How far two directions are apart, and how far feedback weights are from the transposed forward weights."""

import jax
import jax.numpy as jnp

from jaxdtp.networks import NetworkParameters


def angle_degrees(a: jax.Array, b: jax.Array) -> jax.Array:
    """Angle between two arrays seen as vectors, in degrees from 0 to 180.

    By the half-angle tangent, which keeps its precision near 0 and 180 where the arc cosine loses it.
    """
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))


def relative_distance(a: jax.Array, reference: jax.Array) -> jax.Array:
    """|a - reference| / |reference|."""
    return jnp.linalg.norm(a - reference) / jnp.linalg.norm(reference)


@jax.jit
def weight_alignment(forward: NetworkParameters, feedback: NetworkParameters) -> dict[str, dict[str, jax.Array]]:
    """'weight_angle' (degrees) and 'weight_distance' (relative) of each block's feedback kernel to its transposed
    forward kernel, by block name."""
    kernels = {name: (feedback[name]["kernel"].ravel(), forward[name]["kernel"].ravel()) for name in feedback}
    return {
        "weight_angle": {name: angle_degrees(*pair) for name, pair in kernels.items()},
        "weight_distance": {name: relative_distance(*pair) for name, pair in kernels.items()},
    }
