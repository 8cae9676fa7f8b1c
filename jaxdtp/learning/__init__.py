"""The science: rules, targets, feedback and its derivation, paths, and the training step."""
