"""ONNX to TensorRT: recipes, segmentation, build."""
