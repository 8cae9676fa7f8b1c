"""Feedback paths: what is fed back from where to where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdtp.learning import paths
from jaxdtp.models import networks
from jaxdtp.models.blocks import Units, feedback, matched_elu, xavier_normal
from jaxdtp.testing import assert_updates_match_backprop


def network_and_passes():
    network = networks.lenet((8, 8, 1), 5, channels=(3,), hidden=(7, 6))
    forward, _ = networks.init(network, jax.random.key(0))
    return (
        network,
        forward,
        networks.forward_passes(network, forward, jax.random.normal(jax.random.key(1), (4, 8, 8, 1))),
    )


@pytest.mark.parametrize("kind", ["consecutive", "direct"])
def test_a_path_is_the_network_between_its_ends(kind):
    network, forward, passes = network_and_passes()
    ways = getattr(paths, kind)(network)
    params = paths.init(ways, jax.random.key(0))
    assert list(params) == ["fc1", "fc2", "fc3"]
    bound = paths.bind(ways, network, forward)
    for index, (way, clean) in enumerate(zip(bound, paths.along_paths(ways, passes), strict=True)):
        assert way.source == (index + 1 if kind == "consecutive" else 3)
        np.testing.assert_array_equal(clean.input, passes[index].output)
        y, _, _ = way.block.forward(forward, clean.input)
        np.testing.assert_allclose(y, clean.output, rtol=1e-5)
        np.testing.assert_allclose(y, passes[way.source].output, rtol=1e-5)
        back = feedback(way.block, params[way.block.name], y, clean.switches)
        assert back.shape == clean.input.shape


def test_the_random_layer_is_on_the_way_to_all_but_the_last_block():
    network, _, passes = network_and_passes()
    hidden = paths.random_hidden_layer(jax.random.key(3), 5, 9)
    assert float(jnp.abs(hidden["kernel"]).max()) <= 5**-0.5
    ways = paths.direct_through_hidden(network, hidden, Units(squash=jnp.tanh))
    params = paths.init(ways, jax.random.key(0))
    assert [of_block["kernel"].shape for of_block in params.values()] == [(48, 9), (7, 9), (6, 5)]
    logits = passes[-1].output
    q = jnp.tanh(logits @ hidden["kernel"] + hidden["bias"])
    for way, u, shape in zip(ways, (q, q, logits), ((4, 4, 4, 3), (4, 7), (4, 6)), strict=True):
        of_block = params[way.block.name]
        expected = jnp.tanh(u @ of_block["kernel"].T + of_block["bias"]).reshape(shape)
        np.testing.assert_allclose(feedback(way.block, of_block, logits, ()), expected, rtol=1e-5, atol=1e-6)


def test_the_random_layer_is_uniform():
    """In +-1/sqrt(classes). Of 2,000 biases the mean is off by 1.3 % of the bound, the standard deviation by 1 %: both
    limits are beyond seven standard errors."""
    hidden, bound = paths.random_hidden_layer(jax.random.key(0), 5, 2000), 5**-0.5
    for values in hidden.values():
        assert float(jnp.abs(values).max()) <= bound
        assert float(jnp.mean(values)) == pytest.approx(0, abs=0.1 * bound)
        assert float(jnp.std(values)) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_direct_feedback_by_the_transposed_jacobian_is_backprop():
    """In a linear network one matrix does for all examples."""
    linear = Units(activation=lambda x: x, feedback_activation=lambda y: y)
    network = networks.mlp((6,), 4, hidden=(5, 7), units=linear)
    forward, _ = networks.init(network, jax.random.key(0))
    ways = paths.direct(network)
    upper = {"fc2": forward["fc2"]["kernel"] @ forward["fc3"]["kernel"], "fc3": forward["fc3"]["kernel"]}
    params = {name: {"kernel": kernel} for name, kernel in upper.items()}
    x, labels = jax.random.normal(jax.random.key(1), (8, 6)), jnp.arange(8) % 4
    assert_updates_match_backprop(network, (forward, params), (x, labels), max_degrees=0.1, paths=ways)
    wrong = params | {"fc2": {"kernel": -upper["fc2"]}}
    with pytest.raises(AssertionError, match="block fc1, kernel: angle"):
        assert_updates_match_backprop(network, (forward, wrong), (x, labels), max_degrees=0.1, paths=ways)


def test_feedback_that_starts_as_the_transpose():
    network = networks.mlp((6,), 4, hidden=(5,), units=Units(feedback_activation=matched_elu))
    forward, _ = networks.init(network, jax.random.key(0))
    params = paths.init(paths.consecutive(network), jax.random.key(0), like=forward)
    np.testing.assert_array_equal(params["fc2"]["kernel"], forward["fc2"]["kernel"])


def test_xavier_normal():
    """Of 120,000 weights the estimated standard deviation is off by 0.2 %: 2 % is 10 standard errors."""
    network = networks.mlp((400,), 10, hidden=(300,), units=Units(initializer=xavier_normal))
    forward, _ = networks.init(network, jax.random.key(0))
    assert float(jnp.std(forward["fc1"]["kernel"])) == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert not forward["fc1"]["bias"].any()
