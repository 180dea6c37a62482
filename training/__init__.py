"""The PyTorch side: model, VAE, text encoder, data, teacher forcing, quantization, checkpoints."""
