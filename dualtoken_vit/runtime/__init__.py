"""Exported files as predictors; needs NumPy, Pillow and ONNX Runtime or OpenVINO only."""
