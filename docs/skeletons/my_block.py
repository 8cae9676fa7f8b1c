"""Two blocks of your own: one of pure functions, one a Flax module. Copy this file, and replace either or both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxdtp
from jaxdtp.testing import assert_jacobian_matches_transpose


def softplus_block(name: str, inputs: int, features: int) -> jaxdtp.Block:
    """F(x) = softplus(x W + b), [batch, inputs] to [batch, features]; G(y) = (slope y) O^T + c. REPLACE: softplus."""

    def init(key):
        forward, feedback = jax.random.normal(key, (2, inputs, features)) * inputs**-0.5
        # Kernels of one shape, so that a symmetric start, and J_G = J_F^T, are equality of the two.
        return {"kernel": forward, "bias": jnp.zeros(features)}, {"kernel": feedback, "bias": jnp.zeros(inputs)}, {}

    def forward(params, x, context=None):
        del context  # it holds the state and the key of a block that has batch statistics or dropout
        a = x @ params["kernel"] + params["bias"]
        return *jax.jvp(jax.nn.softplus, (a,), (jnp.ones_like(a),)), {}  # its value, and its slopes as switches

    def project(params, h):
        return h @ params["kernel"].T + params.get("bias", 0.0)  # none where differences are taken, see `affine`

    shapes, gate = ((inputs,), (features,)), lambda y, slope: slope * y
    # Slopes differ between noisy and clean passes, which biases L-DRL's loss: all are fed back with the clean ones.
    return jaxdtp.Block(name, *shapes, init, forward, gate, project, affine=True, refreshes=False)


class Gated(nn.Module):
    """F(x) = a sigmoid(b), a and b dense in x: [batch, inputs] to [batch, features]. REPLACE: any module."""

    features: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        a, gate = nn.Dense(self.features, name="a")(x), nn.sigmoid(nn.Dense(self.features, name="b")(x))
        self.sow("switches", "slopes", (gate, a * gate * (1 - gate)))
        return a * gate


class GatedFeedback(nn.Module):
    """G(y) = (dF/da y) O_a + (dF/db y) O_b: [batch, features] to [batch, inputs]."""

    inputs: int

    @nn.compact
    def __call__(self, y, switches):  # noqa: D102
        ((by_a, by_b),) = switches["slopes"]  # Flax makes a tuple of what is sown, an entry for each call
        of_a, of_b = (nn.Dense(self.inputs, use_bias=False, name=name) for name in "ab")
        return of_a(by_a * y) + of_b(by_b * y)


def my_network() -> list[jaxdtp.Block]:
    """Four blocks, from 8x8 pixels to 10 classes: two of our own between two that come with the library."""
    lower, output = (
        jaxdtp.dense_block("lower", (8, 8, 1), 64),
        jaxdtp.dense_block("output", (32,), 10, activation=False),
    )
    (gated,) = jaxdtp.network_of(jaxdtp.OwnFeedback(Gated(32), GatedFeedback(48)), jnp.zeros((1, 48)))
    return [lower, softplus_block("softplus", 64, 48), gated._replace(refreshes=False), output]


def test_feedback_matches_where_weights_are_symmetric():
    """J_G = J_F^T, which is what the slopes are for."""
    for block in my_network()[1:3]:
        x = jax.random.normal(jax.random.key(0), (16, *block.input_shape))
        forward, _, _ = block.init(jax.random.key(1))
        own = block.name == "softplus"
        feedback = {"kernel": forward["kernel"]} if own else {n: {"kernel": forward[n]["kernel"].T} for n in "ab"}
        assert_jacobian_matches_transpose(block, (forward, feedback), x, max_degrees=0.1, max_relative_error=1e-3)


def main(steps: int = 100) -> tuple[jaxdtp.Learner, jaxdtp.TrainState, jax.Array, float]:
    """L-DRL on scikit-learn's digits: the learner, its last state, the inputs, and the share that it classifies."""
    digits = load_digits()
    x, labels = jnp.asarray(digits.images[..., None] / 16 - 0.3, jnp.float32) / 0.3, digits.target
    learner = jaxdtp.learner(my_network(), optax.sgd(0.02, 0.9), "ldrl", noise_scale=0.1, feedback_rate=0.1)
    state = learner.init(jax.random.key(0), x[:32])
    for key in jax.random.split(jax.random.key(1), steps):
        batch = jax.random.choice(key, len(x), (32,))
        state, _ = learner.step(state, x[batch], labels[batch], key)
    return learner, state, x, float(jnp.mean(learner.predict(state, x).argmax(-1) == labels))


if __name__ == "__main__":
    print(f"accuracy on what it was trained with: {main()[-1]:.1%}")
