"""The family of Meulemans et al. 2020 on an MLP: Adam on both sides, whose rates, epsilon and decay their settings
have per network. The ranges are our own, around their chosen settings; those that they searched aren't at hand."""


def get_space(trial):
    return {
        "beta": trial.suggest_float("beta", 1e-3, 1.0, log=True),
        "forward.learning_rate": trial.suggest_float("forward.learning_rate", 1e-5, 1e-2, log=True),
        "forward.adam_epsilon": (trial.suggest_float("forward.adam_epsilon", 1e-9, 1e-2, log=True),),
        "feedback.learning_rate": (trial.suggest_float("feedback.learning_rate", 1e-5, 1e-2, log=True),),
        "feedback.adam_epsilon": (trial.suggest_float("feedback.adam_epsilon", 1e-9, 1e-2, log=True),),
        "feedback.weight_decay": (trial.suggest_float("feedback.weight_decay", 1e-7, 1e-1, log=True),),
        "feedback.noise_scale": (trial.suggest_float("feedback.noise_scale", 1e-3, 0.5, log=True),),
        "feedback.pretraining_epochs": trial.suggest_categorical("feedback.pretraining_epochs", (0, 6)),
    }
