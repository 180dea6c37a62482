"""The ops quantize_fp8 and gelu_quantize_fp8: description, reference, kernel."""
