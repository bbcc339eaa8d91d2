"""Which runner runs an ONNX graph on ONNX Runtime: one for each layout."""

from typing import Any

from runtimes.artifact import Artifact
from runtimes.onnxruntime_fused import FusedOnnxRuntimeRunner
from runtimes.onnxruntime_growing import GrowingOnnxRuntimeRunner
from runtimes.onnxruntime_runner import OnnxRuntimeRunner

AnyOnnxRuntimeRunner = OnnxRuntimeRunner | GrowingOnnxRuntimeRunner  # FusedOnnxRuntimeRunner is one of the former
LAYOUT_RUNNERS: dict[str, Any] = {
    "portable": OnnxRuntimeRunner,
    "dynamic": GrowingOnnxRuntimeRunner,
    "genai": FusedOnnxRuntimeRunner,
}


class OnnxRuntimeByLayout:
    """Opens the runner that an artifact's layout needs."""

    @staticmethod
    def open(artifact: Artifact, **options: Any) -> Any:
        """Run the artifact's graphs."""
        return LAYOUT_RUNNERS[artifact.manifest.layout].open(artifact, **options)
