"""Where networks run: TensorRT fused, TensorRT segmented, ONNX Runtime on the CPU."""
