"""The convolution ops of the VAE decoder: reference, and the libraries that run them."""
