"""What a mutant is: one fault, and where it is put into an artifact that is otherwise good."""

import dataclasses
from collections.abc import Callable
from typing import Any

KINDS = ("graph", "weights", "runner")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    Attributes:
        kind: what `apply` changes: a "graph" (onnx.ModelProto, weights not loaded), the "weights" (tests.mutants.inject
            .Stored), or an opened "runner".
        artifact: which of tests.mutants.subjects.SUBJECTS it goes into.
        layer: the decoder's layer, or the vision encoder's where `graph` says so; None: before or after all layers, or
            in a runner, which has none.
        where: the module that it is in, or the runner's method.
        graph: the file that a graph fault is in, as the manifest calls it.
    """

    name: str
    kind: str
    artifact: str
    apply: Callable[[Any], None]
    layer: int | None
    where: str
    graph: str = "decoder"
