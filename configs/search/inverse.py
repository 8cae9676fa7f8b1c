"""Rules with iterated inverses: damping, iterations and the sizes of steps. Our own ranges."""


def get_space(trial):
    return {
        "target.damping": trial.suggest_float("target.damping", 0.1, 30.0, log=True),
        "target.iterations": trial.suggest_int("target.iterations", 2, 10),
        "beta": trial.suggest_float("beta", 1e-3, 10.0, log=True),
        "forward.learning_rate": trial.suggest_float("forward.learning_rate", 3e-5, 3e-3, log=True),
        "feedback.learning_rate": (trial.suggest_float("feedback.learning_rate", 1e-4, 1e-2, log=True),),
        "feedback.noise_scale": (trial.suggest_float("feedback.noise_scale", 0.01, 0.3, log=True),),
    }
