"""Feedback settings of any rule with learned or fixed feedback, the same for all blocks: our own ranges, for fair
comparisons with the same number of trials each."""


def get_space(trial):
    optimizer = trial.suggest_categorical("feedback.optimizer", ("sgd", "adam"))
    # Adam's steps have the size of the rate, whatever the gradients'.
    low, high = (1e-3, 1.0) if optimizer == "sgd" else (1e-5, 3e-2)
    return {
        "beta": trial.suggest_float("beta", 0.03, 1.0, log=True),
        "forward.learning_rate": trial.suggest_float("forward.learning_rate", 1e-3, 0.3, log=True),
        "feedback.optimizer": optimizer,
        "feedback.learning_rate": (trial.suggest_float(f"feedback.learning_rate/{optimizer}", low, high, log=True),),
        "feedback.iterations": (trial.suggest_int("feedback.iterations", 1, 30, log=True),),
        "feedback.noise_scale": (trial.suggest_float("feedback.noise_scale", 0.01, 0.5, log=True),),
    }
