"""Putting a mutant into a copy of an artifact, and reaching its weights."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from graphs.checkpoint import StoredTensor, read_header
from runtimes.artifact import Artifact
from runtimes.runner import Runner
from runtimes.verification import Targets
from tests.mutants.mutant import Mutant

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


class Stored:
    """The tensors of an artifact's safetensors files, to be changed in place."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._tensors |= read_header(path)

    def __getitem__(self, name: str) -> np.ndarray:
        """The numbers of a tensor; what is written to them is in the file."""
        tensor = self._tensors[name]
        mapped = np.memmap(tensor.path, np.uint8, "r+", tensor.offset, (tensor.nbytes,))
        return mapped.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def swap(self, first: str, second: str) -> None:
        """Two tensors of one shape change places."""
        kept = self[first].copy()
        self[first][...] = self[second]
        self[second][...] = kept


def inject(mutant: Mutant, artifact: Artifact, folder: Path) -> Artifact:
    """The artifact with the fault in it, in `folder`, as nobody looks at hashes; a runner's fault is in no file."""
    if mutant.kind == "runner":
        return artifact
    changed = artifact.manifest.graphs[mutant.graph].file
    shutil.copytree(artifact.folder, folder)
    if mutant.kind == "weights":
        mutant.apply(Stored(folder))
    else:
        model = onnx.load(folder / changed, load_external_data=False)
        mutant.apply(model)
        onnx.save(model, folder / changed)
    return dataclasses.replace(artifact, folder=folder)


def mutate_targets(mutant: Mutant, targets: Targets) -> Targets:
    """The targets, opened with the fault where it is a runner's."""
    if mutant.kind != "runner":
        return targets

    def faulty(opened: Callable[[], Runner]) -> Callable[[], Runner]:
        def open_faulty() -> Runner:
            runner = opened()
            mutant.apply(runner)
            return runner

        return open_faulty

    return {name: faulty(opened) for name, opened in targets.items()}
