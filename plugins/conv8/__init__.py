"""Convolutions of 8-bit codes: description, reference, our kernel for Hopper, and a library."""
