"""Export of trained networks to ONNX, LiteRT and Core ML."""
