"""Eager PyTorch as the reference of parity, with weights streamed from the checkpoint.

Each module's weights are read and cast when it is called and dropped when it returns, so that even float64 arithmetic
holds one matrix at a time. Every row is computed alone, unpadded, in one pass over all its tokens: none of the cache,
mask and padding logic that is being checked takes part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from graphs.attention.cross import CrossAttention
from graphs.checkpoint import Checkpoint, TensorRef
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.families.family import TensorNames
from graphs.loading import build_on_meta, check_weights, materialise, named_models
from graphs.near_ties import Chooser
from graphs.positions import RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder
from runtimes.images import ImageBatch
from runtimes.parity import Case, Trace

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
        int8_activations: bool = False,
    ) -> None:
        """Make the reference.

        Args:
            weights_rounded_to: rounds plain weights first, to tell arithmetic's error from that of the weights;
                quantized ones are what they are.
            swap_margin: choices that are closer than this go the other way (graphs/near_ties.py).
            int8_activations: what quantized weights of whole numbers multiply is rounded to 8 bits, block by block.
        """
        self.dtype = dtype
        self.config = config
        self.device = reference_device()
        self._encoded: dict[tuple[int, int], Tensor] = {}  # vision tokens, by (id of the ImageBatch, row)
        check_weights(family, config, checkpoint)
        self.decoder, self.encoder = build_on_meta(config)
        self.weights = StreamedWeights(checkpoint, self.device, dtype, weights_rounded_to, int8_activations)
        for root, names in named_models(family, config, self.decoder, self.encoder):
            materialise(root, {})
            self.weights.stream_into(root, names)
        for module in self.decoder.modules():
            if isinstance(module, Chooser):
                module.swap_margin = swap_margin
        _move_buffers(self.decoder, self.device)

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
        positions = range(first, first + length)
        if first == 0:  # it may be longer than the texts that forward takes
            far, _ = self._run(case.far_prompt, positions, (length,), None)
        else:
            far = self.logits(case.far_prompt, positions, (length,))
        return Trace(
            logits=logits,
            cache=cache,
            far_logits=far[-1],
            chunk_logits=[
                self.logits(tokens, positions, chunks.sizes, _row_sight(chunks.images, row, len(tokens), len(tokens)))
                for row, (tokens, positions) in enumerate(zip(chunks.tokens, chunks.positions, strict=True))
            ],
            images=[] if case.images is None else [self._images(case.images, row) for row in range(len(case.prompts))],
        )

    @torch.no_grad()
    def greedy_logits(self, case: Case, chosen: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Per row [steps, V]: the logits before each token that a target chose."""
        result = []
        for row, (prompt, following) in enumerate(zip(case.prompts, chosen, strict=True)):
            tokens = [*prompt, *following[:-1]]
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
        """([L, V], state) of one row that begins at slot 0; `calls` and `sight` as in `logits`."""
        self._set_lengths(positions, calls)
        length = len(tokens)
        position_ids = torch.tensor([list(positions)], device=self.device)
        past = self._empty_state(1, length)
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
            return self._no_images(1, length)
        return sight.mask(self.device), [attn.keys_values(tokens) for attn in self._cross_attention()]

    def _empty_state(self, rows: int, length: int) -> list[tuple[Tensor, ...]]:
        """What `step` takes as the past of `rows` rows that nothing was fed yet."""
        return [
            tuple(tensor.zeros(rows, self.dtype, self.device) for tensor in layer)
            for layer in self.decoder.state(length)
            if layer
        ]

    def _no_images(self, rows: int, length: int) -> tuple[Any, ...]:
        """What `step` takes beside the cache, for rows that see nothing."""
        if self.encoder is None:
            return ()
        hidden = torch.full((rows, length, 1, 1), -1, device=self.device)
        shapes = [(rows, a.num_kv_heads, self.decoder.num_patches, a.head_dim) for a in self._cross_attention()]
        make = functools.partial(torch.zeros, dtype=self.dtype, device=self.device)
        return hidden, [(make(shape), make(shape)) for shape in shapes]

    @torch.no_grad()
    def sample(
        self, first: Tensor, length: int, rng: torch.Generator, on_token: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Text that the model makes up behind first tokens [B]: int64 [B, length], each token drawn by its probability.

        Weights are read anew for every token.
        """
        rows, ones = len(first), torch.ones((len(first), length), dtype=torch.int64, device=self.device)
        tokens = torch.zeros((rows, length), dtype=torch.int64)
        tokens[:, 0] = first
        state = self._empty_state(rows, length)
        self._set_lengths(None, ())
        for position in range(length - 1):
            logits, state = self.decoder.step(
                tokens[:, position : position + 1].to(self.device),
                ones[:, :1] * position,
                ones[:, 0] * position,
                ones[:, : position + 1],
                ones[:, :1] * 0,
                state,
                *self._no_images(rows, 1),
            )
            probabilities = logits[:, 0].float().softmax(dim=-1).cpu()
            tokens[:, position + 1] = torch.multinomial(probabilities, 1, generator=rng)[:, 0]
            on_token()
        return tokens

    def fed_at_once(self, length: int) -> None:
        """Prepare for texts of that length in one call each, through the decoder's own layers."""
        self._set_lengths(range(length), (length,))

    def logits(
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

    def _set_lengths(self, positions: Sequence[int] | np.ndarray | None, calls: Sequence[int]) -> None:
        """Tell the rotary embeddings that depend on it how long the row was when each token was fed; without positions,
        that they see it themselves."""
        fed = None
        if positions is not None:
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


class StreamedWeights:
    """Gives every module that owns parameters their numbers for the time of its call only."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        rounded_to: torch.dtype | None,
        int8_activations: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._rounded_to = rounded_to
        self._int8_activations = int8_activations

    def stream_into(self, root: nn.Module, names: TensorNames) -> None:
        """Prepare a module that was built on the meta device."""
        for path, module in root.named_modules():
            prefix = f"{path}." if path else ""
            refs = {leaf: names[prefix + leaf] for leaf in module._parameters if prefix + leaf in names}
            if not refs:
                continue
            if isinstance(module, nn.Embedding):
                # look up first: casting the whole table for a few rows would cost more than the model
                self._fill_while_called(module, refs, lambda ref: self._checkpoint.load(ref).to(self._device))
                module.register_forward_hook(lambda _module, _args, output: self._cast(output))
                continue
            self._fill_while_called(module, refs, self.load)
            block = rounded_block(self._checkpoint, refs["weight"]) if "weight" in refs else None
            if self._int8_activations and block is not None:
                module.register_forward_pre_hook(functools.partial(_round_input, block))

    def load(self, ref: TensorRef) -> Tensor:
        """What `ref` refers to, in the reference's dtype."""
        if self._checkpoint.find_packed(ref) is not None:
            wide = torch.promote_types(self._dtype, torch.float32)
            return self._checkpoint.load(ref, wide).to(self._device, self._dtype)
        return self._cast(self._checkpoint.load(ref))

    def _cast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._device)
        return (tensor if self._rounded_to is None else tensor.to(self._rounded_to)).to(self._dtype)

    def _fill_while_called(self, module: nn.Module, refs: TensorNames, load: Callable[[TensorRef], Tensor]) -> None:
        empty = dict(module._parameters)

        def enter(module: nn.Module, args: Any) -> None:
            filled = {leaf: nn.Parameter(load(ref), requires_grad=False) for leaf, ref in refs.items()}
            module._parameters.update(filled)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            module._parameters.update(empty)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def rounded_block(checkpoint: Checkpoint, ref: TensorRef) -> int | None:
    """In blocks of how many numbers ONNX Runtime's CPU kernels round what that weight multiplies; None: they do not."""
    packed = checkpoint.find_packed(ref)
    if packed is None or packed.format is None or packed.format.name == "fp8":
        return None
    return packed.format.block or INT8_BLOCK


# ONNX Runtime's MatMulNBits gives weights without blocks blocks of this many inputs.
INT8_BLOCK = 32


def _round_input(block: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = args
    return (round_activations(x, block), *rest)


def round_activations(x: Tensor, block: int) -> Tensor:
    """Activations rounded to 255 steps, by the largest of each block: what MatMulNBits multiplies at its accuracy level
    4, its default on the CPU."""
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % block)).unflatten(-1, (-1, block))
    scale = (padded.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return ((padded / scale).round() * scale).flatten(-2)[..., :size]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).cpu().numpy()
