"""A run, from a configuration to trained parameters on disk; read from `train.py` downwards."""
