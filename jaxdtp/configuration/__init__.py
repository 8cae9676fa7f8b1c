"""Configuration: every key, what is allowed, and the optimizers that keys describe."""
