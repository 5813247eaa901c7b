"""Training the final network, from scratch or from the super-net's weights."""
