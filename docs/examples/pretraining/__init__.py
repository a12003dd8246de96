"""What docs/examples/pretrain.py needs around the algorithm."""
