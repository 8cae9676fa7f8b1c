"""How far arrays, seen as vectors, are from each other."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Match(NamedTuple):
    """How far one vector is from another.

    Attributes:
        angle: degrees, 0 to 180.
        cosine: of that angle.
        ratio: |vector| / |reference|.
        distance: |vector - reference| / |reference|.
    """

    angle: Float[Array, "..."]
    cosine: Float[Array, "..."]
    ratio: Float[Array, "..."]
    distance: Float[Array, "..."]


def angle_degrees(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Angle between two arrays seen as vectors, in degrees from 0 to 180.

    By the half-angle tangent, which keeps its precision near 0 and 180 where the arc cosine loses it.
    """
    a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))


def relative_distance(a: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Float[Array, ""]:
    """|a - reference| / |reference|."""
    return jnp.linalg.norm(a - reference) / jnp.linalg.norm(reference)


def match(vector: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Match:
    """How far one array, seen as a vector, is from another."""
    # In float16 the sums of squares would overflow.
    vector, reference = (
        array.ravel().astype(jnp.promote_types(array.dtype, jnp.float32)) for array in (vector, reference)
    )
    angle = angle_degrees(vector, reference)
    ratio = jnp.linalg.norm(vector) / jnp.linalg.norm(reference)
    return Match(angle, jnp.cos(jnp.radians(angle)), ratio, relative_distance(vector, reference))
