"""One layer with its weights in memory, and the calibration text that goes through it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from exporter.errors import ExportError
from exporter.progress import Progress
from graphs.quantization import QuantizedTensor, WeightFormat

InputGroup = tuple[str, ...]  # linears that read the same input, by name within the layer

# Names of the linears of any attention and feed-forward network: those of a line read the same input, and the lines
# stand in the order in which they are computed.
LINEARS = (("q_proj", "k_proj", "v_proj"), ("output_proj",), ("router",), ("w1", "w3"), ("w2",), ("output",))
BATCH_TOKENS = 2048  # that go through a layer at a time
NOT_FINITE = "calibration: the model computes numbers that are not finite: are the checkpoint's weights damaged?"


class Observer(Protocol):
    """Sums up the inputs of a linear."""

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Take in float32 [tokens, inputs], and what they would be had nothing been quantized, where that is known."""


O = TypeVar("O", bound=Observer)  # noqa: E741


class _AllSeenError(Exception):
    """All linears that are watched were called: what the rest of the layer computes is not needed."""


class StreamedLayer:
    """A layer whose weights are being quantized.

    Args:
        module: has float32 weights; called as module(h, None, positions).
        formats: of the weights that are to be quantized, by name within the module.
        hidden: float32 [1 or 2, samples, length, width] on the CPU: what enters the layer; second, what would enter it
            had nothing been quantized.
        device: where the module is.
    """

    def __init__(
        self,
        module: nn.Module,
        formats: Mapping[str, WeightFormat],
        scale_dtype: torch.dtype,
        hidden: Tensor,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.module = module
        self.formats = formats
        self.scale_dtype = scale_dtype
        self.quantized: dict[str, QuantizedTensor] = {}
        self.changed: dict[str, Tensor] = {}  # other parameters that have new values
        self._modules = [module]
        if len(hidden) > 1:  # with the same parameters, which `module` will lose one by one
            self._modules.append(copy.deepcopy(module, {id(each): each for each in module.parameters()}))
        self._hidden = hidden
        self._device = device
        self._progress = progress

    def stages(self) -> list[list[InputGroup]]:
        """Linears by the input they read; a stage's inputs depend on the weights of the stages before it."""
        names = {name for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}
        parents = sorted({name.rpartition(".")[0] for name in names})
        stages = []
        for leaves in LINEARS:
            siblings = [[f"{parent}.{leaf}".removeprefix(".") for leaf in leaves] for parent in parents]
            groups = [tuple(name for name in group if name in names) for group in siblings]
            stages.append([group for group in groups if group])
        return [stage for stage in stages if stage]

    def linear(self, name: str) -> nn.Linear:
        """The linear of that name."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def format(self, linear: str) -> WeightFormat | None:
        """How the weight of a linear is to be quantized; None: not at all."""
        return self.formats.get(f"{linear}.weight")

    def observe(self, groups: Sequence[InputGroup], make: Callable[[int], O]) -> dict[InputGroup, O]:
        """Send all text through the layer; each group's inputs go to an observer, made with their number.

        The originals of experts' inputs are not known: quantization may send tokens to other experts.
        """
        observers = {group: make(self.linear(group[0]).in_features) for group in groups}
        paired = [group for group in groups if ".experts." not in group[0]]
        for rows in self._batches():
            originals = self._inputs(1, rows, paired) if len(self._modules) > 1 and paired else {}
            for group, x in self._inputs(0, rows, groups).items():
                observers[group].add(x, originals.get(group))
        return observers

    def put(self, name: str, quantized: QuantizedTensor) -> None:
        """The parameter is quantized: from now on the layer computes with what the codes stand for."""
        self.quantized[name] = quantized
        self.changed.pop(name, None)
        self._replace(name, quantized.dequantize())
        self._progress.advance(1)

    def change(self, name: str, value: Tensor) -> None:
        """The parameter has a new value."""
        self.changed[name] = value
        self._replace(name, value)

    def advance(self) -> None:
        """Replace what enters the layer by what leaves it.

        Raises:
            ExportError: that has an infinity or a NaN in it.
        """
        for stream in range(len(self._modules)):
            for rows in self._batches():
                self._hidden[stream, rows] = self._call(stream, rows).cpu()
        if not torch.isfinite(self._hidden).all():
            raise ExportError(NOT_FINITE)

    def _replace(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))

    def _inputs(self, stream: int, rows: slice, groups: Sequence[InputGroup]) -> dict[InputGroup, Tensor]:
        """What the groups read for those rows, each [tokens, inputs]; experts that get no token are left out."""
        seen: dict[InputGroup, Tensor] = {}

        def watch(group: InputGroup) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[group] = args[0].flatten(0, -2)
                if len(seen) == len(groups):
                    raise _AllSeenError

            return see

        module = self._modules[stream]
        handles = [module.get_submodule(group[0]).register_forward_pre_hook(watch(group)) for group in groups]
        try:
            self._call(stream, rows)
        except _AllSeenError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _batches(self) -> Iterator[slice]:
        samples, length = self._hidden.shape[1:3]
        step = max(1, BATCH_TOKENS // length)
        for first in range(0, samples, step):
            yield slice(first, min(first + step, samples))

    def _call(self, stream: int, rows: slice) -> Tensor:
        h = self._hidden[stream, rows].to(self._device)
        positions = torch.arange(h.shape[1], device=self._device)
        result: Tensor = self._modules[stream](h, None, positions)
        return result
