"""The nvfp4_dequantize op: description, reference, kernel."""
