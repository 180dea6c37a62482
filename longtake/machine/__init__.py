"""What this machine is: compute capability, TensorRT flavour, GPU memory, and what runs here."""
