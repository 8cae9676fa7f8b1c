"""Plain target propagation, whose targets hold the feedback's errors of reconstruction: the sizes of steps. Our own
ranges."""


def get_space(trial):
    return {
        "beta": trial.suggest_float("beta", 0.01, 100.0, log=True),
        "forward.learning_rate": trial.suggest_float("forward.learning_rate", 3e-5, 3e-3, log=True),
        "feedback.iterations": (trial.suggest_int("feedback.iterations", 1, 5),),
        "feedback.learning_rate": (trial.suggest_float("feedback.learning_rate", 1e-4, 1e-2, log=True),),
        "feedback.noise_scale": (trial.suggest_float("feedback.noise_scale", 0.01, 0.3, log=True),),
    }
