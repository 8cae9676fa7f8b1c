"""How close difference target propagation comes to backpropagation and to Gauss-Newton, measured by autodiff.

L-DRL (Ernoult et al. 2022) rests on two claims, and both are measured here:

- the Jacobian matching condition (JMC): the feedback Jacobian is the transposed forward Jacobian, J_G = J_F^T;
- the gradient matching property (GMP): then the forward update, divided by beta, is the backpropagation gradient.

Everything is pure and jitted, for any network of blocks and in either precision. Jacobians are never built but in
`dense_jacobians`: `jax.vjp` gives J_F^T v, `jax.jvp` gives J_G v.
"""

from jaxdtp.alignment.jacobians import Estimate, dense_jacobians, jacobian_matching, match_jacobian
from jaxdtp.alignment.targets import backprop_targets, gauss_newton_targets, target_matching
from jaxdtp.alignment.updates import (
    gradient_matching,
    named_parameters,
    updates_and_gradients,
    updates_matching,
    weight_alignment,
)
from jaxdtp.alignment.vectors import Match, angle_degrees, match, relative_distance

__all__ = [
    "Estimate",
    "Match",
    "angle_degrees",
    "backprop_targets",
    "dense_jacobians",
    "gauss_newton_targets",
    "gradient_matching",
    "jacobian_matching",
    "match",
    "match_jacobian",
    "named_parameters",
    "relative_distance",
    "target_matching",
    "updates_and_gradients",
    "updates_matching",
    "weight_alignment",
]
