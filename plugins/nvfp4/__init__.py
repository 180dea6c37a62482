"""The NVFP4 codec."""
