"""The nvfp4_dequantize op: reference, kernel, plugin."""
