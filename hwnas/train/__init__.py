"""Training an architecture for real, from scratch or from the super-net's weights."""
