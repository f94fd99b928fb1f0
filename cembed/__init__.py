"""cembed: export visual document embedders to ONNX and run them without torch."""

__version__ = "0.1.0"
