"""Sample inputs, the PyTorch oracle, and how outputs are compared with it."""
