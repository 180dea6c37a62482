"""PyTorch to ONNX: custom ops, NVFP4 lowering, function bodies, structure check."""
