"""Decoding state: what a layer carries from call to call, as named tensors.

Softmax attention keeps a key and a value for each slot (a cache); other kinds keep sums that do not grow. An exported
graph takes each tensor as an input and returns it updated.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from graphs import ops

T = TypeVar("T")
LayerState = tuple[Tensor, ...]  # one layer's tensors [B, *shape], in the order of its StateTensors


class StateTensor(NamedTuple):
    """One tensor of a layer's state."""

    name: str  # key, value, ..
    shape: tuple[int, ...]  # of one row
    slot_axis: int | None  # which axis of `shape` counts cache slots; None: the tensor sums over all tokens so far
    float32: bool = False  # float32 whatever the model's dtype: sums over a whole text

    def zeros(self, batch: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """What it is before the first token, for a model that computes in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32) if self.float32 else dtype
        return torch.zeros((batch, *self.shape), dtype=wide, device=device)


class CrossInputs(NamedTuple):
    """What cross-attention layers read: images, as keys and values.

    V = I * T * num_patches vision tokens, of I images with T tiles each.
    """

    attention_mask_BSIT: Tensor  # int64, what each new token sees of each tile; see graphs.attention.cross.cross_mask
    key_values: Sequence[LayerState]  # per cross-attention layer (key, value), each [B, K, V, D]
    num_patches: int  # vision tokens of a tile


class StepContext:
    """What the layers of one call with explicit state share; each part is made once, when it is first asked for.

    Slots count a row's tokens from the start of its cache; a call's tokens go to neighbouring slots.

    Args:
        position_ids: int64 [B, S].
        write_indices: int64 [B], the slot of each row's first new token.
        attention_mask: int64 [B, T], 1 for slots that may be seen.
        cross: of decoders with cross-attention layers.
    """

    def __init__(
        self, position_ids: Tensor, write_indices: Tensor, attention_mask: Tensor, cross: CrossInputs | None = None
    ) -> None:
        self.position_ids = position_ids
        self.write_indices = write_indices
        self.attention_mask = attention_mask
        self.cross = cross
        self._made: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """make(), called once for each key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]  # type: ignore[assignment]
        return made

    def updated(self, cache_BKMD: Tensor, new_BKSD: Tensor) -> Tensor:
        """The cache with this call's keys (or values) in their slots."""
        return ops.update_kv_cache(cache_BKMD, new_BKSD, self.write_indices)

    @property
    def key_slots_T(self) -> Tensor:
        """int64 [T]: 0 .. T - 1."""
        return self.once(
            "key slots", lambda: torch.arange(self.attention_mask.shape[1], device=self.attention_mask.device)
        )

    @property
    def slots_BS(self) -> Tensor:
        """int64 [B, S]: the slot of each new token."""
        length = self.position_ids.shape[1]
        return self.once(
            "slots", lambda: self.write_indices[:, None] + torch.arange(length, device=self.write_indices.device)
        )

    @property
    def distances_BST(self) -> Tensor:
        """int64 [B, S, T]: how many slots each key lies before each new token."""
        return self.once("distances", lambda: self.slots_BS.unsqueeze(-1) - self.key_slots_T)

    @property
    def mask_B1ST(self) -> Tensor:
        """bool: a slot is seen when its index is at most the token's position and its attention_mask is 1."""

        def make() -> Tensor:
            causal = self.key_slots_T <= self.position_ids.unsqueeze(-1)
            return (causal & (self.attention_mask != 0).unsqueeze(1)).unsqueeze(1)

        return self.once("mask", make)

    def window_mask_B1ST(self, window: int) -> Tensor:
        """bool: of the seen slots, a token's own and the window - 1 before it.

        Its own slot is seen even where attention_mask is 0: padding far behind a row's end would see nothing else,
        and a softmax over nothing is not a number, which would spread through the cache.
        """

        def make() -> Tensor:
            near = (self.distances_BST < window).unsqueeze(1)
            own = (self.distances_BST == 0).unsqueeze(1)
            return (self.mask_B1ST & near) | own

        return self.once(("window", window), make)

    @property
    def valid_BS(self) -> Tensor:
        """bool [B, S]: the new tokens that are no padding: attention_mask is 1 at their own slot."""

        def make() -> Tensor:
            total = self.attention_mask.shape[1]
            own = self.attention_mask.gather(1, self.slots_BS.clamp(max=total - 1))
            return (own != 0) & (self.slots_BS < total)

        return self.once("valid", make)

    @property
    def lengths_B(self) -> Tensor:
        """float32 [B]: one more than the last position that is no padding."""
        return self.once(
            "lengths", lambda: (self.position_ids.to(torch.float32) + 1).where(self.valid_BS, 0.0).amax(dim=1)
        )


class GrowingContext(StepContext):
    """The same where a cache holds the tokens so far and no more, and a call's keys and values are appended to it.

    A slot is seen when it is no later than the token's own and its attention_mask is 1: positions do not tell, because
    rows may be padded on the left. A token's own slot is always seen, or padding would see nothing.

    Args:
        past_length: slots of every row before this call.
    """

    def __init__(self, position_ids: Tensor, attention_mask: Tensor, past_length: int) -> None:
        super().__init__(position_ids, position_ids.new_full(position_ids.shape[:1], past_length), attention_mask)

    def updated(self, cache_BKMD: Tensor, new_BKSD: Tensor) -> Tensor:
        """The cache with this call's keys (or values) behind it."""
        return torch.cat((cache_BKMD, new_BKSD), dim=2)

    @property
    def mask_B1ST(self) -> Tensor:
        """bool."""

        def make() -> Tensor:
            distances = self.distances_BST
            seen = (distances >= 0) & (self.attention_mask != 0).unsqueeze(1)
            return (seen | (distances == 0)).unsqueeze(1)

        return self.once("mask", make)


class FusedContext(StepContext):
    """The same where one operator turns queries and keys, updates the cache and attends (ops.group_query_attention).

    Each row's tokens lie in its cache from slot 0 on without gaps, and their positions are their slots.

    Args:
        attention_mask: int64 [B, T], 1 for each of a row's tokens, those of this call included.
        max_len: most slots of a row.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, max_len: int) -> None:
        self.lengths = attention_mask.sum(dim=1)
        write_indices = (self.lengths - input_ids.shape[1]).clamp(min=0)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        super().__init__(write_indices[:, None] + steps, write_indices, attention_mask)
        self.max_len = max_len
        self.seqlens_k = self.lengths.to(torch.int32) - 1
        self.total_sequence_length = torch.full((), attention_mask.shape[1], dtype=torch.int32, device=input_ids.device)

    @property
    def every_position(self) -> Tensor:
        """int64 [1, max_len]."""
        return self.once("positions", lambda: torch.arange(self.max_len, device=self.position_ids.device)[None])
