"""What a training step computes: teacher forcing, noise, attention over chunks, error recycling, 4-bit gradients."""
