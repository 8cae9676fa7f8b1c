"""Searches for hyperparameters, on Optuna: `python -m jaxdtp.search`. A space is a function

    get_space(trial) -> {dotted key: value, ...}

of an Optuna trial, which it asks for values: on a logarithmic scale, whole numbers, one of several, per block, or
depending on each other. What counts is the validation accuracy; test data are never evaluated.
"""
