"""The maps: blocks, networks of them, and the convolutions and poolings that they are made of."""
