"""The device side: numpy, ONNX Runtime, and nothing of torch."""
