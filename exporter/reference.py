"""Eager PyTorch as the reference of parity, with weights streamed from the checkpoint.

Each module's weights are cast when it is called and dropped when it returns, so that even float64 arithmetic holds
one matrix at a time. Every row is computed alone, unpadded, in one pass over all its tokens: none of the cache,
mask and padding logic that is being checked takes part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.loading import load_decoder
from graphs.transformer import TransformerDecoder
from runtimes.parity import Case, TargetTrace, Trace


def reference_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Reference:
    """The decoder of a checkpoint, computing in `dtype`."""

    def __init__(
        self,
        family: Family,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        *,
        weights_rounded_to: torch.dtype | None = None,
    ) -> None:
        """`weights_rounded_to` rounds the weights first, to tell arithmetic's error from that of the weights."""
        self.dtype = dtype
        self.config = config
        self.device = reference_device()
        self.decoder = load_decoder(family, config, checkpoint)
        _move_buffers(self.decoder, self.device)
        _stream_weights(self.decoder, self.device, dtype, weights_rounded_to)

    @torch.no_grad()
    def trace(self, case: Case) -> Trace:
        """Logits and cache of the case."""
        logits, cache = [], []
        for row in range(len(case.prompts)):
            row_logits, row_cache = self._full_pass(case.row(row))
            logits.append(row_logits[len(case.prompts[row]) - 1 :])
            cache.append(row_cache)
        first = case.far_position
        far = self._logits(case.far_prompt, range(first, first + len(case.far_prompt)))
        chunks = case.chunks
        return Trace(
            logits=logits,
            cache=cache,
            far_logits=far[-1],
            chunk_logits=[self._logits(*row) for row in zip(chunks.tokens, chunks.positions, strict=True)],
        )

    @torch.no_grad()
    def greedy_logits(self, case: Case, target: TargetTrace) -> list[np.ndarray]:
        """Per row [steps, V]: the logits before each token that the target chose."""
        result = []
        for prompt, chosen in zip(case.prompts, target.greedy, strict=True):
            logits, _ = self._full_pass([*prompt, *chosen[:-1]])
            result.append(logits[len(prompt) - 1 :])
        return result

    def _full_pass(self, tokens: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        length = len(tokens)
        positions = torch.arange(length, device=self.device)[None]
        shape = (1, self.config.num_key_value_heads, length, self.config.head_dim)
        empty = torch.zeros(shape, dtype=self.dtype, device=self.device)
        logits, present = self.decoder.step(
            torch.tensor([tokens], device=self.device),
            positions,
            torch.zeros(1, dtype=torch.int64, device=self.device),
            torch.ones_like(positions),
            positions,
            [(empty, empty)] * self.config.num_hidden_layers,
        )
        return _numpy(logits[0]), [_numpy(tensor[0]) for layer in present for tensor in layer]

    def _logits(self, tokens: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """[L, V]: causal logits of tokens at any positions."""
        input_pos = torch.tensor(list(positions), device=self.device)
        return _numpy(self.decoder(torch.tensor([list(tokens)], device=self.device), input_pos)[0])


def _move_buffers(decoder: TransformerDecoder, device: torch.device) -> None:
    for name, buffer in decoder.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, buffer.to(device))


def _stream_weights(
    decoder: TransformerDecoder, device: torch.device, dtype: torch.dtype, rounded_to: torch.dtype | None
) -> None:
    """Make every module that owns parameters cast them for the time of its call only."""

    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        return (tensor if rounded_to is None else tensor.to(rounded_to)).to(dtype)

    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            # look up first: casting the whole table for a few rows would cost more than the model
            module.to(device).register_forward_hook(lambda _module, _args, output: cast(output))
        elif list(module.parameters(recurse=False)):
            _cast_while_called(module, cast)


def _cast_while_called(module: nn.Module, cast: Callable[[Tensor], Tensor]) -> None:
    stored = dict(module.named_parameters(recurse=False))

    def enter(module: nn.Module, args: Any) -> None:
        module._parameters.update(
            {name: nn.Parameter(cast(parameter.data), requires_grad=False) for name, parameter in stored.items()}
        )

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(stored)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).cpu().numpy()
