"""Benchmarks of the kernels, one file a family of ops."""
