"""Text encoders: the small word encoder, umT5, and their tokenizers."""
