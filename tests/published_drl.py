"""The parity vectors of Meulemans et al. 2020: three training steps of the published PyTorch code on a tanh MLP.

Feedback weights are [n_l, n_in] there and are named by the hidden layer l = 1..L-1 that they deliver to; in ours they
belong to the block above it. Losses are means over features there, and sums here.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from published import DIRECTORY

from jaxdtp.learning import paths
from jaxdtp.learning.algorithms import ALGORITHMS
from jaxdtp.learning.feedback import FeedbackTraining, Noise
from jaxdtp.learning.state import Settings, TrainState
from jaxdtp.models import networks
from jaxdtp.models.blocks import Units

FILES = sorted((DIRECTORY / "drl").glob("*.npz"))
ALGORITHM = {
    "BP": "bp",
    "DTP": "dtp_parallel",
    "DTPDRL": "dtpdrl",
    "DDTPlinear": "ddtp_linear",
    "DDTPRHL": "ddtp_rhl",
    "DDTPControl": "ddtp_control",
    "DFA": "dfa",
}


class Vectors:
    """One npz with the network that it describes."""

    def __init__(self, path: Path):
        self.arrays = np.load(path)
        self.method = str(self["method"])
        self.algorithm = ALGORITHMS[ALGORITHM[self.method]]
        sizes = self["sizes"].tolist()
        self.widths = sizes[1:-1]
        squash = jnp.tanh if str(self.arrays.get("feedback_activation", "linear")) == "tanh" else None
        units = Units(activation=jnp.tanh, feedback_activation=lambda y: y, squash=squash)
        self.network = networks.mlp((sizes[0],), sizes[-1], hidden=tuple(self.widths), units=units)
        self.paths = {
            "BP": lambda: (),
            "DTP": lambda: paths.consecutive(self.network),
            "DTPDRL": lambda: paths.consecutive(self.network),
            "DDTPRHL": lambda: paths.direct_through_hidden(
                self.network, {"kernel": jnp.asarray(self["R"].T), "bias": jnp.asarray(self["r"])}, units
            ),
        }.get(self.method, lambda: paths.direct(self.network, units))()
        self.batch_size = int(self["batch_size"])
        # Every example's target there is a step along the gradient of the batch's mean loss.
        self.beta = float(self["target_lr"]) / self.batch_size
        # The gradients there are those of |h - target|^2 without 1/2.
        self.forward_factor = float(self.arrays.get("forward_grad_factor", 1.0))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def forward(self, group: str, step: int | None = None) -> networks.NetworkParameters:
        """Forward parameters, or their gradients (group 'g'), by block name."""
        return {
            block.name: self._parameters(f"{group}W_{layer}", f"{group}b_{layer}", step, transposed=True)
            for layer, block in enumerate(self.network, start=1)
        }

    def feedback(self, group: str, step: int | None = None, *, end: str = "") -> networks.NetworkParameters:
        """Feedback parameters, or their gradients, by block name."""
        return {
            path.block.name: self._parameters(f"{group}Q{end}_{layer}", f"{group}c{end}_{layer}", step)
            for layer, path in enumerate(self.paths, start=1)
        }

    def _parameters(self, kernel: str, bias: str, step: int | None, *, transposed: bool = False):
        def read(name):
            return self[name] if step is None else self[name][step]

        params = {"kernel": jnp.asarray(read(kernel).T if transposed else read(kernel))}
        # One layer of the direct networks has no biases there.
        return params | {"bias": jnp.asarray(read(bias))} if bias in self.arrays else params

    def noise(self, step: int | None = None) -> list[Noise]:
        """What is added to the inputs of the blocks 2..N, in this order."""
        names = [f"noise_{layer}" if step is None else f"traj_noise_{layer}" for layer in range(1, len(self.network))]
        arrays = [self[name] if step is None else self[name][step] for name in names]
        return [Noise(jnp.asarray(self["sigma"] * array), None) for array in arrays]

    def rec_factor(self, index: int) -> float:
        """What a feedback loss there is, in units of ours."""
        return float(self["rec_scale"]) / self.widths[index]

    def settings(self) -> Settings:
        """Adam's step is the same for gradients and epsilon in other units."""

        def adam(end: str, factor: float, weight_decay: float) -> optax.GradientTransformation:
            betas = float(self["beta1" + end]), float(self["beta2" + end])
            return optax.chain(
                optax.add_decayed_weights(weight_decay / factor),
                optax.adam(float(self["lr" + end]), *betas, eps=float(self["adam_eps" + end]) / factor),
            )

        training = ()
        if self.algorithm.feedback_rule:
            decay = float(self["feedback_wd"])
            training = tuple(
                FeedbackTraining(1, float(self["sigma"]), 1, adam("_fb", self.rec_factor(index), decay))
                for index in range(len(self.paths))
            )
        forward_optimizer = adam("", self.forward_factor, float(self["forward_wd"]))
        return Settings(self.algorithm, self.paths, self.beta, forward_optimizer, training)

    def state(self) -> TrainState:
        """Before the first step."""
        settings = self.settings()
        forward, feedback = self.forward(""), self.feedback("")
        return TrainState(
            jnp.zeros((), jnp.int32),
            forward,
            feedback,
            {block.name: {} for block in self.network},
            settings.forward_optimizer.init(forward),
            {
                path.block.name: training.optimizer.init(feedback[path.block.name])
                for path, training in zip(settings.paths, settings.feedback, strict=False)
            },
        )
