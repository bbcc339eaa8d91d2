"""Passes over the ONNX graph, one a file; each says what it changes."""
