"""ONNX layouts: which inputs and outputs a graph has, and how each boundary operator is lowered."""

from exporter.layouts import dynamic, genai, portable
from exporter.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "portable": portable.LAYOUT,
    "dynamic": dynamic.LAYOUT,
    "genai": genai.LAYOUT,
}
