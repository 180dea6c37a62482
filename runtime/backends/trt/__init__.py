"""What every backend with TensorRT engines is made of: engines, streams, the VAE's two networks."""
