"""Training neural networks without backpropagation, by difference target propagation."""
