"""Networks, presets, checkpoints and quantization: the PyTorch side that every stage may read."""
