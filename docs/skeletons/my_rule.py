"""A learning rule of your own. Copy this file, give the rule a name, and replace one of its two halves or both."""

import tempfile

import jax
import jax.numpy as jnp

import jaxdtp


def my_loss(block, feedback_params, forward, clean, noise):
    """REPLACE: what the feedback weights of a block minimise. Here L-DRL with central differences,

        -e . (G(F(s + e)) - G(F(s - e))) + |(G(F(s) + n) - G(F(s) - n)) / 2|^2,    e = noise.input, n = noise.output,

    which for sigma -> 0 is sigma^2 |J_G - J_F^T|^2 up to a constant, in expectation, as L-DRL is (Ernoult et al. 2022).

    Args:
        block: whose feedback map is G(y) = project(feedback_params, gate(y, switches)).
        feedback_params: of G; the gradient is taken with respect to them alone.
        forward: F, from x [batch, *block.input_shape] to (y [batch, *block.output_shape], switches, state).
        clean: the pass without noise: input s, output F(s), switches.
        noise: input e and output n, shaped as the block's and scaled by sigma.
    Returns: a number, summed over features and averaged over the batch.
    """
    x, y, switches = clean

    def there_and_back(x):
        y, own, _ = forward(x)
        # Some blocks, such as those with derived feedback, are fed back at the clean pass.
        return jaxdtp.feedback(block, feedback_params, y, own if block.refreshes else switches)

    by_input = there_and_back(x + noise.input) - there_and_back(x - noise.input)
    above, below = (jaxdtp.feedback(block, feedback_params, y + n, switches) for n in (noise.output, -noise.output))
    return jnp.sum(((above - below) / 2) ** 2 - noise.input * by_input) / len(x)


def my_target(block, feedback_params, forward, clean, target):
    """REPLACE: the target of a block's input. Here the difference target (Lee et al. 2015) to first order,

        t[n-1] = s[n-1] + J_G (t[n] - s[n]),    J_G: the Jacobian of G at s[n].

    Takes the target of the output, [batch, *block.output_shape], the rest as above; returns that of the input,
    [batch, *block.input_shape], and what is to be logged for each block: numbers by name, or {}.
    """
    x, y, switches = clean
    _, change = jax.jvp(lambda y: jaxdtp.feedback(block, feedback_params, y, switches), (y,), (target - y,))
    return x + change, {"target_distance": jnp.sqrt(jnp.mean(change**2))}


jaxdtp.ALGORITHMS["my_rule"] = jaxdtp.Algorithm(jaxdtp.descend(my_loss), my_target)


def main(rule: str = "my_rule", seed: int = 0) -> dict:
    """Train three epochs on scikit-learn's digits; returns the summary, with 'test_accuracy'."""
    config = jaxdtp.default_config()
    config.algorithm, config.seed = rule, seed
    config.num_epochs, config.batch_size, config.beta = 3, 32, 0.5
    config.network.hidden = (128, 64)
    config.dataset.mean, config.dataset.std = (0.3,), (0.1,)
    config.forward.learning_rate = 0.02
    # REPLACE: what suits the loss.
    config.feedback.iterations, config.feedback.noise_scale, config.feedback.learning_rate = (10,), (0.1,), (0.2,)
    # A directory is continued, not repeated, by a configuration that it knows, even if the rule's code has changed.
    with tempfile.TemporaryDirectory() as workdir:
        return jaxdtp.train_and_evaluate(config, workdir)


if __name__ == "__main__":
    print(f"test accuracy: {main()['test_accuracy']:.1%}")
