"""Passes over the ONNX graph, one a file; each says what it changes."""

CONTRIB_DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators
