"""The folder in which calibration keeps what it has finished, so that it can be stopped and go on."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphs.quantization import QuantizedTensor, WeightFormat

KEY = "key.json"
_PART, _HIDDEN, _PARTIAL = ".part.safetensors", ".hidden.npy", ".partial"
_CODES, _SCALES, _ZERO_POINTS, _TENSOR_SCALE, _CHANGED = "codes", "scales", "zero_points", "tensor_scale", "changed"


class Calibrated:
    """What calibration made of the weights; each is read from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read which weights there are."""
        self._files: dict[str, Path] = {}
        self._formats: dict[str, WeightFormat] = {}
        for path in sorted(folder.glob(f"*{_PART}")):
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["formats"])
                self._files |= {name.rpartition(":")[0]: path for name in file.keys()}  # noqa: SIM118 (no mapping)
            self._formats |= {name: WeightFormat(name=kind, block=block) for name, (kind, block) in metadata.items()}

    def quantized(self, parameter: str) -> QuantizedTensor | None:
        """The parameter's codes and scales; None if it was not to be quantized."""
        if parameter not in self._formats:
            return None
        with safe_open(self._files[parameter], framework="pt") as file:
            names = set(file.keys())
            zero_points = f"{parameter}:{_ZERO_POINTS}"
            return QuantizedTensor(
                format=self._formats[parameter],
                codes=file.get_tensor(f"{parameter}:{_CODES}"),
                scales=file.get_tensor(f"{parameter}:{_SCALES}"),
                zero_points=file.get_tensor(zero_points) if zero_points in names else None,
                tensor_scale=float(file.get_tensor(f"{parameter}:{_TENSOR_SCALE}")),
            )

    def changed(self, parameter: str) -> Tensor | None:
        """float32: the new value of a parameter that is not quantized; None if it stays as it was."""
        if parameter not in self._files or parameter in self._formats:
            return None
        with safe_open(self._files[parameter], framework="pt") as file:
            value: Tensor = file.get_tensor(f"{parameter}:{_CHANGED}")
            return value

    @property
    def changes(self) -> frozenset[str]:
        """The parameters that `changed` has a value for."""
        return frozenset(self._files.keys() - self._formats.keys())


class WorkFolder:
    """The folder's files. A part holds the results of a layer, or of some other weight."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Make the folder, or go on with it; what another fingerprint left there is removed first."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{_PARTIAL}"):
            path.unlink()
        key = folder / KEY
        if not key.exists() or key.read_text() != json.dumps(fingerprint):
            for path in (*folder.glob(f"*{_PART}"), *folder.glob(f"*{_HIDDEN}")):
                path.unlink()
            with _appear(key) as partial:
                partial.write_text(json.dumps(fingerprint))

    def has(self, part: str) -> bool:
        """Whether the part is finished."""
        return (self.folder / f"{part}{_PART}").exists()

    def save(self, part: str, quantized: Mapping[str, QuantizedTensor], changed: Mapping[str, Tensor]) -> None:
        """Write a part whole, or not at all."""
        tensors: dict[str, Tensor] = {f"{name}:{_CHANGED}": value for name, value in changed.items()}
        for name, each in quantized.items():
            tensors |= {f"{name}:{_CODES}": each.codes, f"{name}:{_SCALES}": each.scales}
            tensors[f"{name}:{_TENSOR_SCALE}"] = torch.tensor(each.tensor_scale, dtype=torch.float64)
            if each.zero_points is not None:
                tensors[f"{name}:{_ZERO_POINTS}"] = each.zero_points
        formats = {name: (each.format.name, each.format.block) for name, each in quantized.items()}
        with _appear(self.folder / f"{part}{_PART}") as partial:
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(stored, partial, {"formats": json.dumps(formats)})

    def load_hidden(self) -> tuple[int, Tensor] | None:
        """(the number of the layer that comes next, what enters it); None where nothing is finished."""
        found = sorted(self.folder.glob(f"*{_HIDDEN}"))
        return (int(found[-1].name.partition(".")[0]), torch.from_numpy(np.load(found[-1]))) if found else None

    def save_hidden(self, layer: int, hidden: Tensor) -> None:
        """Keep what enters a layer, in place of what entered the one before."""
        path = self.folder / f"{layer:05}{_HIDDEN}"
        with _appear(path) as partial, partial.open("wb") as file:
            np.save(file, hidden.numpy())
        self.drop_hidden(path)

    def drop_hidden(self, but: Path | None = None) -> None:
        """Remove what was kept by save_hidden."""
        for old in self.folder.glob(f"*{_HIDDEN}"):
            if old != but:
                old.unlink()


@contextmanager
def _appear(path: Path) -> Iterator[Path]:
    """A place to write to; what was written appears at `path` on leaving without an error."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)  # noqa: PTH105
    finally:
        partial.unlink(missing_ok=True)
