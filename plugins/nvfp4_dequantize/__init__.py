"""The nvfp4_dequantize ops: description, reference, kernel."""
