"""Feedback learning layer by layer: the rules that train the feedback weights of `jaxdtp.learning.derived`.

A layer is a linear operation y = op(x, W) with a feedback weight O. A layer rule is one function

    rule(layers, weights_of, params, feedback_params, probes, rate) -> feedback_params, loss of each layer

where `layers, weights_of = layers_of(f, params, x)`, and `probes` holds random signals e for each layer's own input.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdtp.learning.derived import Function, layers_of
from jaxdtp.learning.walk import Layer
from jaxdtp.models.blocks import Number

Layers = list[Layer]
LayerRule = Callable[
    [Layers, Callable[[Any], list[jax.Array]], Any, Any, list[jax.Array], Number], tuple[Any, list[jax.Array]]
]

EQUATIONS = 2.0
"""For each unknown, in a probe of a layer that isn't cut by the share of the batch."""

REMOVED = 1e-10
"""Of a mismatch, its square, that may be left when probes become rare."""

RARELY = 32
"""Steps from probe to probe from then on."""


def init_feedback(f: Function, params: Any, x: Any, key: jax.Array, *, symmetric: bool = False) -> Any:
    """Feedback parameters for `with_feedback(f)`.

    Args:
        f: `f(params, x)`.
        params: forward parameters.
        x: an input of f, or its shape and type.
        key: of the random weights.
        symmetric: whether feedback starts as the forward parameters.

    Returns:
        A tree like params. Parameters that meet the input in a linear operation are random, normal with the standard
        deviation of the forward ones (where these are all equal, of 1 / fan-in as variance), or equal to them. The
        others are copies, which are never used.
    """
    leaves, structure = jax.tree.flatten(params)
    copies = [jnp.copy(leaf) for leaf in leaves]
    if symmetric:
        return jax.tree.unflatten(structure, copies)
    layers, _ = layers_of(f, params, x)
    for index in sorted(frozenset().union(*(layer.leaves for layer in layers))):
        leaf = leaves[index]
        fan_in = max(layer.fan_in for layer in layers if index in layer.leaves)
        scale = jnp.std(leaf)
        # That of equal numbers is their rounding errors.
        scale = jnp.where(scale > 1e-5 * jnp.max(jnp.abs(leaf)), scale, fan_in**-0.5).astype(leaf.dtype)
        copies[index] = scale * jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, copies)


def match_feedback(
    f: Function, params: Any, feedback_params: Any, x: Any, key: jax.Array, *, share: float = 1.0
) -> Any:
    """Feedback parameters after one step towards the forward ones, by probes of every layer (`match_layers`).

    Args:
        f: `f(params, x)`.
        params, feedback_params: its parameters.
        x: an input of f, or its shape and type: probes are no longer than the signals that it makes.
        key: of the probes.
        share: of the batch that a probe is at most as long as, above 0, up to 1.

    Raises:
        ValueError: as `with_feedback`.
    """
    layers, weights_of = layers_of(f, params, x)
    probes = draw_probes(layers, key, share)
    return match_layers(layers, weights_of, params, feedback_params, probes, 1.0)[0]


def match_layers(
    layers: Layers,
    weights_of: Callable[[Any], list[jax.Array]],
    params: Any,
    feedback_params: Any,
    probes: list[jax.Array],
    rate: Number,
) -> tuple[Any, list[jax.Array]]:
    """A normalised step of each feedback weight O towards what its forward weight W does to a probe e,

        r = op(e, W) - op(e, O),    d = op^T(e, r),    O <- O + rate d <d, d> / <op(e, d), op(e, d)>,

    steepest descent on |r|^2 with exact line search: it needs no learning rate (1 is exact), and has no noise left
    where the weights match. |r|^2 has the expectation of the limit of L-DRL (Ernoult et al. 2022) for sigma -> 0 in one
    layer, up to a constant; L-DRL itself sends no probe forward through O. The step is in the manner of normalised
    least mean squares (Nagumo & Noda 1967), and for what it needs (both weights' responses to the same noise) the rule
    is a relative of the weight mirror (Akrout et al. 2019).

    Parameters that meet in one layer, such as the two of a normalised kernel, share a step. A weight that several
    layers share is probed in all of them. Mismatches are taken in float32 at least, whatever the layer computes in.

    Returns:
        The feedback parameters, and each layer's mean r^2 / mean e^2.
    """
    forward = weights_of(params)
    feedback, to_params = jax.vjp(weights_of, feedback_params)
    losses, directions = [], []
    for layer, probe, of_forward, of_feedback in zip(layers, probes, forward, feedback, strict=True):
        mismatch = _wide(of_forward) - _wide(of_feedback)
        residual, transpose = _response(layer, probe, mismatch)
        # JAX's transposes don't conjugate: adjoints of complex weights do, before and after.
        (direction,) = transpose(jnp.conj(residual))
        directions.append(direction.astype(of_feedback.dtype))
        losses.append(jnp.mean(_square(residual)))
    descent = jax.tree.map(jnp.conj, to_params(directions)[0])
    _, along = jax.jvp(weights_of, (feedback_params,), (descent,))

    descents, structure = jax.tree.flatten(descent)
    leaves = jax.tree.leaves(feedback_params)
    for group in _groups(layers):
        curvatures = [
            jnp.sum(_square(_product(layer, probe, _wide(change))))
            for layer, probe, change in zip(layers, probes, along, strict=True)
            if layer.leaves <= group
        ]
        curvature = functools.reduce(jnp.add, curvatures)
        square = sum(jnp.sum(_square(_wide(descents[index]))) for index in group)
        step = rate * square / (curvature + jnp.finfo(curvature.dtype).tiny)
        for index in group:
            leaves[index] = leaves[index] + (step * descents[index]).astype(leaves[index].dtype)
    return jax.tree.unflatten(structure, leaves), losses


def mirror_layers(
    layers: Layers,
    weights_of: Callable[[Any], list[jax.Array]],
    params: Any,
    feedback_params: Any,
    probes: list[jax.Array],
    rate: Number,
) -> tuple[Any, list[jax.Array]]:
    """The weight mirror (Akrout et al. 2019): Hebbian learning of a forward weight's response to noise, with decay,

        O <- (1 - rate) O + rate op^T(e, op(e, W)) / n,

    whose expectation is (1 - rate) O + rate W: n is how often each weight meets a probe e of random signs.

    Returns:
        The feedback parameters, and each layer's mean (op(e, W) - op(e, O))^2.
    """
    forward = weights_of(params)
    feedback, to_params = jax.vjp(weights_of, feedback_params)
    losses, changes = [], []
    for layer, probe, of_forward, of_feedback in zip(layers, probes, forward, feedback, strict=True):
        response, transpose = _response(layer, probe, _wide(of_forward))
        (correlation,) = transpose(jnp.conj(response))
        # Signs have the square 1, which is not folded into a constant as ones would be.
        _, transpose = _response(layer, probe**2, _wide(of_forward))
        (count,) = transpose(jnp.ones_like(response))
        mirrored = correlation / jnp.maximum(jnp.real(count), 1)
        changes.append((rate * (mirrored - jnp.conj(_wide(of_feedback)))).astype(of_feedback.dtype))
        losses.append(jnp.mean(_square(response - _product(layer, probe, _wide(of_feedback)))))
    change = jax.tree.map(jnp.conj, to_params(changes)[0])
    leaves, structure = jax.tree.flatten(feedback_params)
    uses = [_uses(layers, index, leaf.size) for index, leaf in enumerate(leaves)]
    leaves = [leaf + step / count for leaf, step, count in zip(leaves, jax.tree.leaves(change), uses, strict=True)]
    return jax.tree.unflatten(structure, leaves), losses


def _uses(layers: Layers, index: int, size: int) -> float:
    """In how many layers each number of a parameter with so many of them is: in one of those that share it if each has
    a part of its own."""
    sizes = [math.prod((*layer.loops, *layer.weight.shape)) for layer in layers if index in layer.leaves]
    return max(1.0, min(len(sizes), sum(sizes) / max(1, size)))


def copy_signs(
    layers: Layers,
    weights_of: Callable[[Any], list[jax.Array]],
    params: Any,
    feedback_params: Any,
    probes: list[jax.Array],
    rate: Number,
) -> tuple[Any, list[jax.Array]]:
    """O <- sign(W) |O|: feedback weights keep their own random sizes and take the forward weights' signs.

    Sign-symmetry as 'frSF' of Liao, Leibo & Poggio 2016 (Moskovitz et al. 2018): each weight's sign is transported.
    """
    del weights_of, probes, rate
    return _with_weights(layers, params, feedback_params, lambda weight, feedback: jnp.copysign(feedback, weight))


def minimise_mismatch(
    layers: Layers,
    weights_of: Callable[[Any], list[jax.Array]],
    params: Any,
    feedback_params: Any,
    probes: list[jax.Array],
    rate: Number,
) -> tuple[Any, list[jax.Array]]:
    """O <- (1 - rate) O + rate W: all the way, with a rate of 1, to the minimum of the Jacobian matching loss
    |J_G - J_F^T|^2 (Bao et al. 2024), which is where feedback weights are the forward weights if both ways have the
    same slopes.

    What the paper does to feedback with slopes of its own isn't known here, but for its abstract: feedback loss is
    minimised analytically, layer by layer, instead of by iterations. Weights are transported.
    """
    del weights_of, probes
    return _with_weights(
        layers,
        params,
        feedback_params,
        lambda weight, feedback: (feedback + rate * (weight - feedback)).astype(feedback.dtype),
    )


def _with_weights(
    layers: Layers, params: Any, feedback_params: Any, combine: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[Any, list[jax.Array]]:
    """What `combine(W, O)` gives of each layer's weights, and no losses."""
    paired = frozenset().union(*(layer.leaves for layer in layers))
    forward, (leaves, structure) = jax.tree.leaves(params), jax.tree.flatten(feedback_params)
    leaves = [combine(forward[index], leaf) if index in paired else leaf for index, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves), [jnp.zeros(()) for _ in layers]


def draw_probes(layers: Layers, key: jax.Array, share: float) -> list[jax.Array]:
    """Random signs for the input of each layer: as many examples as give `EQUATIONS` for each unknown, but no more than
    a share of those that there are."""
    return [
        jax.random.rademacher(
            jax.random.fold_in(key, index),
            probe_shape(layer, share),
            jnp.promote_types(layer.signal.dtype, jnp.float32),
        )
        for index, layer in enumerate(layers)
    ]


def probe_shape(layer: Layer, share: float) -> tuple[int, ...]:
    """Shape of a layer's probe."""
    shape = list(layer.signal.shape)
    if layer.examples:
        present = math.prod(shape[axis] for axis in layer.examples)
        equations = _equations(layer) / present
        # None of an operation whose result is empty.
        wanted = math.ceil(EQUATIONS * layer.fan_in / equations) if equations else 1
        for axis in layer.examples:
            shape[axis] = 1
        shape[layer.examples[0]] = max(1, min(wanted, math.ceil(share * present)))
    return (*layer.loops, *shape)


def steps_to_match(layers: Layers, share: float) -> int:
    """How many steps of `match_layers` remove the mismatch of all layers, where nothing else touches it.

    A step leaves about d / (d + n) of the square of a mismatch with d unknowns for each unit, of which a probe has n
    equations: with exact line search the expectation is 1 - (1 + g) (1 + 4 g + g^2) / (1 + 3 g + g^2)^2 for g = d / n,
    by the moments of random matrices (Marchenko & Pastur 1967). They are that many until `REMOVED` is left.
    """
    ratios = [
        layer.fan_in * math.prod(layer.signal.shape) / (_equations(layer) * math.prod(probe_shape(layer, share)))
        for layer in (layer._replace(loops=()) for layer in layers)
        if _equations(layer)
    ]
    return math.ceil(-math.log(REMOVED) * (1 + max(ratios, default=0)))


def _equations(layer: Layer) -> float:
    """For the weights of a unit, by a probe as long as the signal: one from each position that the unit stands at."""
    return math.prod(layer.out) * layer.fan_in / max(1, math.prod(layer.weight.shape))


def _product(layer: Layer, probe: jax.Array, weight: jax.Array) -> jax.Array:
    product = layer.product
    for _ in layer.loops:
        product = jax.vmap(product)
    return product(probe, weight)


def _response(layer: Layer, probe: jax.Array, weight: jax.Array) -> tuple[jax.Array, Callable]:
    """op(e, W), and what takes a residual to op^T(e, residual), in a tuple."""
    return jax.vjp(lambda weight: _product(layer, probe, weight), weight)


def _square(array: jax.Array) -> jax.Array:
    """|array|^2, of each number."""
    return jnp.real(array * jnp.conj(array))


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _groups(layers: Layers) -> list[frozenset[int]]:
    """Parameters that meet in a layer, together with those that these meet in other ones."""
    groups: list[frozenset[int]] = []
    for layer in layers:
        met = [group for group in groups if group & layer.leaves]
        groups = [group for group in groups if group not in met] + [layer.leaves.union(*met)]
    return groups
