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
from graphs.near_ties import Chooser
from graphs.positions import RotaryPositionalEmbeddings
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
        swap_margin: float = 0.0,
    ) -> None:
        """Make the reference.

        Args:
            weights_rounded_to: rounds the weights first, to tell arithmetic's error from that of the weights.
            swap_margin: choices that are closer than this go the other way (graphs/near_ties.py).
        """
        self.dtype = dtype
        self.config = config
        self.device = reference_device()
        self.decoder = load_decoder(family, config, checkpoint)
        for module in self.decoder.modules():
            if isinstance(module, Chooser):
                module.swap_margin = swap_margin
        _move_buffers(self.decoder, self.device)
        _stream_weights(self.decoder, self.device, dtype, weights_rounded_to)

    @torch.no_grad()
    def trace(self, case: Case) -> Trace:
        """Logits and state of the case."""
        logits, cache = [], []
        for row, prompt in enumerate(case.prompts):
            tokens = case.row(row)
            row_logits, row_cache = self._run(tokens, range(len(tokens)), _prompt_and_steps(prompt, tokens))
            logits.append(row_logits[len(prompt) - 1 :])
            cache.append(row_cache)
        first, chunks = case.far_position, case.chunks
        far = self._logits(case.far_prompt, range(first, first + len(case.far_prompt)), (len(case.far_prompt),))
        return Trace(
            logits=logits,
            cache=cache,
            far_logits=far[-1],
            chunk_logits=[
                self._logits(*row, chunks.sizes) for row in zip(chunks.tokens, chunks.positions, strict=True)
            ],
        )

    @torch.no_grad()
    def greedy_logits(self, case: Case, target: TargetTrace) -> list[np.ndarray]:
        """Per row [steps, V]: the logits before each token that the target chose."""
        result = []
        for prompt, chosen in zip(case.prompts, target.greedy, strict=True):
            tokens = [*prompt, *chosen[:-1]]
            logits, _ = self._run(tokens, range(len(tokens)), _prompt_and_steps(prompt, tokens))
            result.append(logits[len(prompt) - 1 :])
        return result

    def _run(
        self, tokens: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray, calls: Sequence[int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """([L, V], state) of one row that begins at slot 0; `calls` as in _logits."""
        self._set_lengths(positions, calls)
        length = len(tokens)
        position_ids = torch.tensor([list(positions)], device=self.device)
        past = [
            tuple(tensor.zeros(1, self.dtype, self.device) for tensor in layer) for layer in self.decoder.state(length)
        ]
        logits, present = self.decoder.step(
            torch.tensor([list(tokens)], device=self.device),
            position_ids,
            torch.zeros(1, dtype=torch.int64, device=self.device),
            torch.ones_like(position_ids),
            torch.arange(length, device=self.device)[None],
            past,
        )
        return _numpy(logits[0]), [_numpy(tensor[0]) for layer in present for tensor in layer]

    def _logits(
        self, tokens: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray, calls: Sequence[int]
    ) -> np.ndarray:
        """[L, V]: causal logits of tokens at any positions, in one pass.

        Args:
            calls: in how many tokens at a time the target was fed them; it matters to some rotary embeddings.
        """
        self._set_lengths(positions, calls)
        input_pos = torch.tensor(list(positions), device=self.device)
        return _numpy(self.decoder(torch.tensor([list(tokens)], device=self.device), input_pos)[0])

    def _set_lengths(self, positions: Sequence[int] | np.ndarray, calls: Sequence[int]) -> None:
        """Tell the rotary embeddings that depend on it how long the row was when each token was fed."""
        lengths = [int(positions[end - 1]) + 1 for end in np.cumsum(calls)]
        fed = torch.tensor([np.repeat(lengths, calls).tolist()], dtype=torch.float32, device=self.device)
        for module in self.decoder.modules():
            if isinstance(module, RotaryPositionalEmbeddings) and module.rope.depends_on_length:
                module.fed_lengths = fed


def _prompt_and_steps(prompt: Sequence[int], tokens: Sequence[int]) -> tuple[int, ...]:
    """The prompt in one call, then a token at a time."""
    return (len(prompt), *(1 for _ in tokens[len(prompt) :]))


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
