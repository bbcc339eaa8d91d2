"""An ONNX graph whose inner values are outputs as well: what each operator computed, on ONNX Runtime."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.onnxruntime_session import ERRORS_ONLY, NUMPY, OnnxRuntime
from runtimes.signature import GraphSignature

Values = Mapping[str, np.ndarray]


_FAILED = re.compile(r"Name:'(?P<node>[^']*)' Status Message: (?P<reason>[^\n]*)")


class NodeFailedError(Exception):
    """A node does not run on what it is given."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node, self.reason = node, reason


class ExposedGraph:
    """Runs a graph of any layout, and shows the values that were asked for, as float32, int64 or bool."""

    def __init__(
        self, graph: Path, signature: GraphSignature, dtype: str, wanted: Iterable[str], **options: Any
    ) -> None:
        """Load `graph` with `wanted` values as outputs, as far as it has them.

        The weights stay where they are. ONNX Runtime does not fuse operators over a value that is shown.

        Args:
            options: of runtimes.onnxruntime_session.OnnxRuntime: device, in_float32.
        """
        self._runtime = OnnxRuntime(dtype, log_severity=ERRORS_ONLY, **options)
        self.description, self.computes_in = self._runtime.description, self._runtime.computes_in
        self.rounds_activations = self._runtime.device == "cpu" and not self._runtime.in_float32
        self._signature = signature
        asked = set(wanted)
        self._session = self._runtime.load(graph, lambda model: expose(model, asked))
        self.names = tuple(value.name for value in self._session.get_outputs())

    def run(self, feeds: Values) -> dict[str, np.ndarray]:
        """Every value, and the graph's own outputs; floats of `feeds` are float32.

        Raises:
            NodeFailedError: the graph cannot be run to its end.
        """
        binding = self._session.io_binding()
        for spec in self._signature.inputs:
            array = feeds[spec.name]
            if spec.dtype in (*NUMPY, "bfloat16"):
                binding.bind_ortvalue_input(spec.name, self._runtime.upload(array, spec.dtype))
            else:
                whole = self._runtime.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                binding.bind_ortvalue_input(spec.name, whole)
        for name in self.names:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:  # of ONNX Runtime's own kinds, all but a few are this
            if (failed := _FAILED.search(str(error))) is None:
                raise
            raise NodeFailedError(failed["node"], failed["reason"]) from None
        return {name: self._array(value) for name, value in zip(self.names, binding.get_outputs(), strict=True)}

    def _array(self, value: Any) -> np.ndarray:
        return self._runtime.download(value) if "float" in value.data_type() else np.array(value.numpy())


def expose(model: Any, wanted: set[str]) -> None:
    """Make the wanted values outputs of an onnx.ModelProto, as far as its nodes make them."""
    import onnx

    there = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name in wanted and name not in there:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
