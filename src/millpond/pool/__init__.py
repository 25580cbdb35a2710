"""A shared pool of GPUs, and the PyTorch device that reaches them over the network."""
