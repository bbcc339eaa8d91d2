"""A session's inputs and outputs, bound once: from step to step only what changed is bound again."""

from typing import Any

import numpy as np

from runtimes.onnxruntime_session import OnnxRuntime


class StepBinding:
    """ONNX Runtime's IOBinding, with memory of its own for inputs that come from the host."""

    def __init__(self, runtime: OnnxRuntime, session: Any) -> None:
        self._make = runtime.ort.OrtValue.ortvalue_from_numpy
        # A binding copies to a GPU what is bound to it, when it is bound: what the host wrote later goes unnoticed.
        self._copies = runtime.device != "cpu"
        self._session = session
        self._binding = session.io_binding()
        self._shapes = {value.name: value.shape for value in session.get_outputs()}
        self._fed: dict[str, tuple[np.ndarray, Any]] = {}  # {input: (the memory it was bound with, its OrtValue)}
        self.bind_input = self._binding.bind_ortvalue_input
        self.bind_output = self._binding.bind_ortvalue_output

    def feed(self, name: str, array: np.ndarray) -> None:
        """Copy a host array into an input; it may be changed afterwards."""
        held, bind = self._fed.get(name), self._copies
        if held is None or held[0].shape != array.shape:
            memory = np.empty(array.shape, array.dtype)
            held = self._fed[name] = memory, self._make(memory)
            bind = True
        held[0][...] = array
        if bind:
            self.bind_input(name, held[1])

    def run(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Run the session; return its float32 output of that name and shape, in memory that is the caller's."""
        promised = self._shapes[name]
        if any(isinstance(size, int) and size != wanted for size, wanted in zip(promised, shape, strict=True)):
            self._binding.bind_output(name, "cpu")  # memory of another size than the graph promises is refused
            self._session.run_with_iobinding(self._binding)
            return np.array(self._binding.get_outputs()[-1].numpy())
        result = np.empty(shape, np.float32)
        self.bind_output(name, self._make(result))
        self._session.run_with_iobinding(self._binding)
        return result
