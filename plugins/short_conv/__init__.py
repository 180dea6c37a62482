"""The short convolution of keys."""
