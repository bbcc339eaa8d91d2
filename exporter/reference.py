"""Eager PyTorch as the reference of parity, with weights streamed from the checkpoint.

Each module's weights are cast when it is called and dropped when it returns, so that even float64 arithmetic holds
one matrix at a time. Every row is computed alone, unpadded, in one pass over all its tokens: none of the cache,
mask and padding logic that is being checked takes part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from graphs.attention.cross import CrossAttention
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.loading import load_model
from graphs.near_ties import Chooser
from graphs.positions import RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder
from runtimes.images import ImageBatch
from runtimes.parity import Case, TargetTrace, Trace

ENCODER_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class RowSight(NamedTuple):
    """What one row is shown."""

    images: ImageBatch
    row: int
    mask_SIT: np.ndarray  # of each of its tokens

    def mask(self, device: torch.device) -> Tensor:
        """int64 [1, S, I, T], without padding pictures."""
        count = int((self.images.aspect_ratio_ids[self.row] > 0).sum())
        return torch.from_numpy(self.mask_SIT[None, :, :count]).to(device)


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
        self._encoded: dict[tuple[int, int], Tensor] = {}  # vision tokens, by (id of the ImageBatch, row)
        self.decoder, self.encoder = load_model(family, config, checkpoint)
        for module in self.decoder.modules():
            if isinstance(module, Chooser):
                module.swap_margin = swap_margin
        _move_buffers(self.decoder, self.device)
        _stream_weights(self.decoder, self.device, dtype, weights_rounded_to)
        if self.encoder is not None:
            _stream_weights(self.encoder, self.device, dtype, weights_rounded_to)

    @torch.no_grad()
    def trace(self, case: Case) -> Trace:
        """Logits and state of the case."""
        logits, cache = [], []
        for row, prompt in enumerate(case.prompts):
            tokens = case.row(row)
            sight = _row_sight(case.images, row, len(prompt), len(tokens))
            row_logits, row_cache = self._run(tokens, range(len(tokens)), _prompt_and_steps(prompt, tokens), sight)
            logits.append(row_logits[len(prompt) - 1 :])
            cache.append(row_cache)
        first, chunks = case.far_position, case.chunks
        length = len(case.far_prompt)
        far = self._logits(case.far_prompt, range(first, first + length), (length,))
        return Trace(
            logits=logits,
            cache=cache,
            far_logits=far[-1],
            chunk_logits=[
                self._logits(tokens, positions, chunks.sizes, _row_sight(chunks.images, row, len(tokens), len(tokens)))
                for row, (tokens, positions) in enumerate(zip(chunks.tokens, chunks.positions, strict=True))
            ],
            images=[] if case.images is None else [self._images(case.images, row) for row in range(len(case.prompts))],
        )

    @torch.no_grad()
    def greedy_logits(self, case: Case, target: TargetTrace) -> list[np.ndarray]:
        """Per row [steps, V]: the logits before each token that the target chose."""
        result = []
        for row, (prompt, chosen) in enumerate(zip(case.prompts, target.greedy, strict=True)):
            tokens = [*prompt, *chosen[:-1]]
            sight = _row_sight(case.images, row, len(prompt), len(tokens))
            logits, _ = self._run(tokens, range(len(tokens)), _prompt_and_steps(prompt, tokens), sight)
            result.append(logits[len(prompt) - 1 :])
        return result

    def _images(self, images: ImageBatch, row: int) -> list[np.ndarray]:
        """The row's pictures as keys and values, all tiles."""
        tokens = self._vision_tokens(images, row)
        if tokens is None:
            return [np.zeros((attn.num_kv_heads, 0, attn.head_dim)) for attn in self._cross_attention() for _ in "kv"]
        return [_numpy(tensor[0]) for attn in self._cross_attention() for tensor in attn.keys_values(tokens)]

    def _cross_attention(self) -> list[CrossAttention]:
        return [layer.attn for layer in self.decoder.cross_layers]

    def _vision_tokens(self, images: ImageBatch, row: int) -> Tensor | None:
        """One row's pictures alone, without padding pictures, encoded once; None if it has no picture."""
        count = int((images.aspect_ratio_ids[row] > 0).sum())
        if not count:
            return None
        assert self.encoder is not None
        key = (id(images), row)
        if key not in self._encoded:
            feeds = images.encoder_feeds()
            alone = (torch.from_numpy(feeds[name][row : row + 1, :count]).to(self.device) for name in ENCODER_INPUTS)
            self._encoded[key] = self.encoder.vision_tokens(*alone)
        return self._encoded[key]

    def _run(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        calls: Sequence[int],
        sight: RowSight | None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """([L, V], state) of one row that begins at slot 0; `calls` and `sight` as in _logits."""
        self._set_lengths(positions, calls)
        length = len(tokens)
        position_ids = torch.tensor([list(positions)], device=self.device)
        past = [
            tuple(tensor.zeros(1, self.dtype, self.device) for tensor in layer)
            for layer in self.decoder.state(length)
            if layer
        ]
        logits, present = self.decoder.step(
            torch.tensor([list(tokens)], device=self.device),
            position_ids,
            torch.zeros(1, dtype=torch.int64, device=self.device),
            torch.ones_like(position_ids),
            torch.arange(length, device=self.device)[None],
            past,
            *self._cross(length, sight),
        )
        return _numpy(logits[0]), [_numpy(tensor[0]) for layer in present for tensor in layer]

    def _cross(self, length: int, sight: RowSight | None) -> tuple[Any, ...]:
        """What `step` takes beside the cache, of a decoder that sees."""
        if self.encoder is None:
            return ()
        tokens = None if sight is None else self._vision_tokens(sight.images, sight.row)
        if sight is None or tokens is None:
            hidden = torch.full((1, length, 1, 1), -1, device=self.device)
            shapes = [(1, a.num_kv_heads, self.decoder.num_patches, a.head_dim) for a in self._cross_attention()]
            make = functools.partial(torch.zeros, dtype=self.dtype, device=self.device)
            return hidden, [(make(shape), make(shape)) for shape in shapes]
        return sight.mask(self.device), [attn.keys_values(tokens) for attn in self._cross_attention()]

    def _logits(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        calls: Sequence[int],
        sight: RowSight | None = None,
    ) -> np.ndarray:
        """[L, V]: causal logits of tokens at any positions, in one pass.

        Args:
            calls: in how many tokens at a time the target was fed them; it matters to some rotary embeddings.
            sight: the row's pictures, and what each token sees of them.
        """
        self._set_lengths(positions, calls)
        input_pos = torch.tensor(list(positions), device=self.device)
        seen = {}
        vision_tokens = None if sight is None else self._vision_tokens(sight.images, sight.row)
        if sight is not None and vision_tokens is not None:
            mask = sight.mask(self.device).flatten(2).repeat_interleave(self.decoder.num_patches, dim=2)
            seen = {"encoder_input": vision_tokens, "encoder_mask": mask}
        return _numpy(self.decoder(torch.tensor([list(tokens)], device=self.device), input_pos, **seen)[0])

    def _set_lengths(self, positions: Sequence[int] | np.ndarray, calls: Sequence[int]) -> None:
        """Tell the rotary embeddings that depend on it how long the row was when each token was fed."""
        lengths = [int(positions[end - 1]) + 1 for end in np.cumsum(calls)]
        fed = torch.tensor([np.repeat(lengths, calls).tolist()], dtype=torch.float32, device=self.device)
        for module in self.decoder.modules():
            if isinstance(module, RotaryPositionalEmbeddings) and module.rope.depends_on_length:
                module.fed_lengths = fed


def _row_sight(images: ImageBatch | None, row: int, prompt: int, length: int) -> RowSight | None:
    """One row's pictures; tokens behind its prompt see what its last one sees."""
    if images is None:
        return None
    tokens = np.minimum(np.arange(length), prompt - 1)
    return RowSight(images, row, images.cross_attention_mask[row, tokens])


def _prompt_and_steps(prompt: Sequence[int], tokens: Sequence[int]) -> tuple[int, ...]:
    """The prompt in one call, then a token at a time."""
    return (len(prompt), *(1 for _ in tokens[len(prompt) :]))


def _move_buffers(decoder: TransformerDecoder, device: torch.device) -> None:
    for name, buffer in decoder.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, buffer.to(device))


def _stream_weights(root: nn.Module, device: torch.device, dtype: torch.dtype, rounded_to: torch.dtype | None) -> None:
    """Make every module that owns parameters cast them for the time of its call only."""

    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        return (tensor if rounded_to is None else tensor.to(rounded_to)).to(dtype)

    for module in root.modules():
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
