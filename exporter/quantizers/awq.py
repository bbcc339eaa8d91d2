"""AWQ, arXiv:2306.00978: inputs with large activations get finer weights, by being scaled before weights are rounded.

The scale of an input is the mean of its magnitude to a power that is searched for; the operation that computes the
input is divided by it (exporter/quantizers/folding.py). Then, in place of the paper's search for clipping, the scales
of blocks are chosen to minimise squared errors, each times the mean square of its input.

Shapes: N outputs, K inputs, C channels that a fold scales.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from exporter.quantizers import mse
from exporter.quantizers.folding import Fold, apply, folds
from exporter.quantizers.streaming import StreamedLayer
from graphs.quantization import WeightFormat

POWERS = tuple(i / 20 for i in range(1, 21))
SEARCH_TOKENS = 512  # that the search looks at (up to twice as many), and ..
SEARCH_OUTPUTS = 1024  # .. outputs, of all weights that a fold changes; but of none fewer than ..
FEWEST_OUTPUTS = 16
FLOOR = 1e-3  # smallest magnitude of an input, in means of all: one that is always 0 must not become infinite
TOKENS_PER_INPUT = 1 / 8  # an expert that saw fewer has no mean squares worth the name


class Activations:
    """How large a linear's inputs are: means of |x| and x^2 [K], and some of them."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.tokens = 0
        self._magnitudes = self._squares = torch.zeros(0)
        self._rows: list[Tensor] = []
        self._stride = 1  # every so manieth token is kept

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Take in float32 [tokens, inputs]."""
        if not self.tokens:
            self._magnitudes = self._squares = x.new_zeros(self.inputs)
        self._magnitudes = self._magnitudes + x.abs().sum(dim=0)
        self._squares = self._squares + x.square().sum(dim=0)
        self._rows.append(x[-self.tokens % self._stride :: self._stride].clone())
        self.tokens += len(x)
        while sum(map(len, self._rows)) >= 2 * SEARCH_TOKENS:
            self._rows, self._stride = [torch.cat(self._rows)[::2]], 2 * self._stride

    @property
    def enough(self) -> bool:
        """Whether there were tokens enough to learn from."""
        return self.tokens >= self.inputs * TOKENS_PER_INPUT

    @property
    def magnitude(self) -> Tensor:
        """[K]: the mean of |x|."""
        return self._magnitudes / self.tokens

    @property
    def square(self) -> Tensor:
        """[K]: the mean of x^2."""
        return self._squares / self.tokens

    @property
    def sample(self) -> Tensor:
        """[up to 2 SEARCH_TOKENS, K]: tokens from all over the text."""
        return torch.cat(self._rows)


def quantize_layer(layer: StreamedLayer) -> None:
    """Scale what can be scaled, then quantize the layer's linears."""
    observed = layer.observe([group for stage in layer.stages() for group in stage], Activations)
    activations = {name: seen for group, seen in observed.items() for name in group}
    columns: dict[str, Tensor] = {}  # by which a linear's inputs were divided
    for fold in folds(layer.module):
        scale = search_scale(layer, fold, activations)
        if scale is not None:
            apply(layer, fold, scale)
            columns |= dict.fromkeys(fold.readers, fold.spread(scale))
    for name, seen in activations.items():
        format = layer.format(name)
        if format is None:
            continue
        importance = None
        if seen.enough:
            importance = _importance(seen.square / columns[name].square() if name in columns else seen.square)
        weight = layer.linear(name).weight
        layer.put(f"{name}.weight", mse.quantize_weighted(weight, format, layer.scale_dtype, importance))


def search_scale(layer: StreamedLayer, fold: Fold, activations: Mapping[str, Activations]) -> Tensor | None:
    """[C]: the scale of the fold's channels that leaves the least error; None if that is none at all."""
    readers = {name: format for name in fold.readers if (format := layer.format(name)) and activations[name].enough}
    if not readers:
        return None
    magnitude = fold.gather(activations[fold.readers[0]].magnitude)
    magnitude = magnitude.clamp(min=FLOOR * float(magnitude.mean()))
    outputs = max(FEWEST_OUTPUTS, SEARCH_OUTPUTS // len(readers))
    weights = {name: _some_rows(layer.linear(name).weight, outputs) for name in readers}

    def error(columns: Tensor) -> float:
        return sum(
            activations[name].tokens * _error(weights[name], columns, activations[name], format, layer.scale_dtype)
            for name, format in readers.items()
        )

    best, least = None, error(fold.spread(torch.ones_like(magnitude)))
    for power in POWERS:
        scale = magnitude**power
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = error(fold.spread(scale))
        if found < least:
            best, least = scale, found
    return best


def _error(
    weight: Tensor, columns_K: Tensor, seen: Activations, format: WeightFormat, scale_dtype: torch.dtype
) -> float:
    """The squared error of a linear's results, relative to them, if its columns are scaled."""
    importance = _importance(seen.square / columns_K.square())
    rounded = mse.quantize_weighted(weight * columns_K, format, scale_dtype, importance).dequantize() / columns_K
    squares = (seen.sample @ weight.T).square().sum()
    return float((seen.sample @ (rounded - weight).T).square().sum() / squares.clamp(min=torch.finfo().tiny))


def _importance(square: Tensor) -> Tensor:
    """What errors of an input count; an input that was 0 throughout may be something else one day."""
    return square + 0.01 * square.mean()


def _some_rows(weight: Tensor, count: int) -> Tensor:
    return weight[:: max(1, len(weight) // count)]
