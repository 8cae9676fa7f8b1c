"""LeNet by L-DRL: the ranges of Ernoult et al. 2022, as their code has them: of each block feedback iterations, noise
and learning rates, of beta, and of the forward learning rate."""

BLOCKS = (2, 3, 4)


def get_space(trial):
    return {
        "beta": trial.suggest_float("beta", 0.01, 1.0),
        "forward.learning_rate": trial.suggest_float("forward.learning_rate", 1e-4, 1e-1, log=True),
        "feedback.iterations": tuple(trial.suggest_int(f"feedback.iterations/{block}", 1, 60) for block in BLOCKS),
        "feedback.noise_scale": tuple(
            trial.suggest_float(f"feedback.noise_scale/{block}", 0.001, 0.5) for block in BLOCKS
        ),
        "feedback.learning_rate": tuple(
            trial.suggest_float(f"feedback.learning_rate/{block}", 1e-4, 1e-1, log=True) for block in BLOCKS
        ),
    }
