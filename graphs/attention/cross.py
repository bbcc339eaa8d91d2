"""Cross attention: text reads what the vision encoder made of images; Llama 3.2 Vision, arXiv:2407.21783 section 7.

Keys and values are computed once per image and kept; there are no positions, and no token is later than an image.

Letters in shapes: B batch, S new tokens, V vision tokens, I images, T tiles, H query heads, K key/value heads, D head
dimension, E embedding dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.attention.causal import projections
from graphs.config import DecoderConfig
from graphs.kv_cache import KVCache
from graphs.layers import NORMS
from graphs.state import LayerState, StateTensor, StepContext


class CrossMask(NamedTuple):
    """Which vision tokens a token reads, and what of a cross-attention layer it keeps."""

    attend_B1SV: Tensor  # bool; every token attends to one vision token at least, or softmax would be undefined
    attends_BS1: Tensor  # bool: False where the attention's result is dropped
    sees_BS1: Tensor  # bool: False where the feed-forward network's result is dropped


def cross_mask(sight_BSV: Tensor, num_patches: int = 1) -> CrossMask:
    """The mask from what each token sees: 1 (or True) sees, 0 does not, -1 (or False) is hidden.

    Args:
        sight_BSV: int64 or bool, for each vision token; with num_patches, for each tile of so many.

    A token that sees something attends to that. One that sees nothing attends to everything that is not hidden, and
    keeps only the attention's result: this is what transformers' Mllama computes for it. One to which all is hidden
    keeps nothing, as if the layer were not there: this is torchtune's and Meta's rule for all tokens that see nothing.
    """
    if sight_BSV.dtype == torch.bool:
        sight_BSV = sight_BSV.to(torch.int64) * 2 - 1
    sees = (sight_BSV > 0).any(dim=-1, keepdim=True)
    attend = (sight_BSV > 0) | (~sees & (sight_BSV == 0))  # ONNX Runtime has no Where of booleans on the CPU
    attends = attend.any(dim=-1, keepdim=True)
    attend = attend | ~attends
    if num_patches != 1:
        attend = attend.unsqueeze(-1).expand(-1, -1, -1, num_patches).flatten(2)
    return CrossMask(attend.unsqueeze(1), attends, sees)


class CrossAttention(nn.Module):
    """Grouped-query attention to an encoder's output, with torchtune's parameter names.

    Args:
        embed_dim: width of x and of the encoder's output.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, width of each.
        q_proj, k_proj, v_proj, output_proj: the projections.
        q_norm, k_norm: applied to each query and key head.
        scale: multiplies q.k.
        max_seq_len: most vision tokens of a row; None: any number.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        *,
        q_norm: nn.Module,
        k_norm: nn.Module,
        scale: float,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.scale = scale
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.kv_cache: KVCache | None = None
        self.cached = 0  # vision tokens in kv_cache

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """Nothing: keys and values of images do not change from call to call."""
        return ()

    def keys_values(self, y_BVE: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output as keys and values, each [B, K, V, D]; the norm of keys applied."""
        key = self.k_norm(ops.split_heads(self.k_proj(y_BVE), self.head_dim))
        return key, ops.split_heads(self.v_proj(y_BVE), self.head_dim)

    def forward(self, x: Tensor, key_BKVD: Tensor, value_BKVD: Tensor, attend_B1SV: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        q_BHSD = self.q_norm(ops.split_heads(self.q_proj(x), self.head_dim))
        out = ops.attention(q_BHSD, key_BKVD, value_BKVD, attend_B1SV, self.scale)
        return self.output_proj(ops.merge_heads(out))

    def remember(self, key_BKVD: Tensor, value_BKVD: Tensor) -> None:
        """Keep keys and values in kv_cache, from its start.

        Raises:
            ValueError: more rows or vision tokens than it has room for.
        """
        assert self.kv_cache is not None
        count = key_BKVD.shape[2]
        if count > self.kv_cache.max_seq_len:
            raise ValueError(f"the encoder's output has {count} tokens, the cache holds {self.kv_cache.max_seq_len}")
        self.kv_cache.update(torch.arange(count, device=key_BKVD.device), key_BKVD, value_BKVD)
        self.cached = count


class TanhGate(nn.Module):
    """x * tanh(scale): a layer that is added to a trained decoder starts at scale 0, as if it were not there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.scale)


class TransformerCrossAttentionLayer(nn.Module):
    """x + ca_scale(attn(ca_norm(x), images)), then h + mlp_scale(mlp(mlp_norm(h))); torchtune's parameter names.

    With an encoder's output (encoder_input), torchtune's call: keys and values are computed, and kept if there is a
    cache. Without it, those of the cache are used, or the layer does nothing. In the exported call they come from
    the StepContext.
    """

    def __init__(
        self,
        attn: CrossAttention,
        mlp: nn.Module,
        *,
        ca_norm: nn.Module,
        mlp_norm: nn.Module,
        ca_scale: nn.Module,
        mlp_scale: nn.Module,
    ) -> None:
        super().__init__()
        self.ca_norm = ca_norm
        self.attn = attn
        self.ca_scale = ca_scale
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_scale = mlp_scale
        self.index = 0  # among the decoder's cross-attention layers; the decoder sets it

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """See CrossAttention.state."""
        return self.attn.state(max_len)

    def setup_cache(
        self, batch_size: int, dtype: torch.dtype, max_seq_len: int, encoder_max_seq_len: int | None
    ) -> None:
        """Make a cache for the encoder's keys and values; ValueError where nothing says how many there may be."""
        attn = self.attn
        capacity = attn.max_seq_len if encoder_max_seq_len is None else encoder_max_seq_len
        if capacity is None:
            raise ValueError(
                "encoder_max_seq_len must be given: this decoder was built for any number of vision tokens"
            )
        attn.kv_cache = KVCache(batch_size, capacity, attn.num_kv_heads, attn.head_dim, dtype)
        attn.cached = 0

    def reset_cache(self) -> None:
        """Forget the images."""
        assert self.attn.kv_cache is not None
        self.attn.kv_cache.reset()
        self.attn.cached = 0

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerState | None = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """[b, s, d] -> [b, s, d]; in the exported call also the layer's present, which is empty.

        Args:
            encoder_input: [b, s_e, d].
            encoder_mask: bool [b, s, s_e], True where a token sees; or int, see cross_mask. Absent, all is seen.
        """
        if context is not None:
            cross = context.cross
            assert cross is not None
            tiles_BSV = cross.attention_mask_BSIT.flatten(2)
            made = context.once("cross mask", lambda: cross_mask(tiles_BSV, cross.num_patches))
            key, value = cross.key_values[self.index]
            return self._read(x, key, value, made), ()
        attn = self.attn
        if encoder_input is not None:
            if attn.max_seq_len is not None and encoder_input.shape[1] > attn.max_seq_len:
                raise ValueError(
                    f"encoder_input has {encoder_input.shape[1]} tokens, more than encoder_max_seq_len"
                    f" ({attn.max_seq_len})"
                )
            key, value = attn.keys_values(encoder_input)
            if attn.kv_cache is not None:
                attn.remember(key, value)
        elif attn.kv_cache is not None and attn.cached:
            count = attn.cached
            key, value = attn.kv_cache.k_cache[: len(x), :, :count], attn.kv_cache.v_cache[: len(x), :, :count]
        else:
            return x
        if encoder_mask is None:
            encoder_mask = torch.ones((*x.shape[:2], key.shape[2]), dtype=torch.bool, device=x.device)
        return self._read(x, key, value, cross_mask(encoder_mask[..., : key.shape[2]]))

    def _read(self, x: Tensor, key: Tensor, value: Tensor, mask: CrossMask) -> Tensor:
        attn = self.attn(self.ca_norm(x), key, value, mask.attend_B1SV)
        h = x + self.ca_scale(torch.where(mask.attends_BS1, attn, 0.0))
        return h + self.mlp_scale(torch.where(mask.sees_BS1, self.mlp(self.mlp_norm(h)), 0.0))


def build(config: DecoderConfig) -> CrossAttention:
    """The attention of a cross-attention layer."""
    norm = NORMS[config.norm]
    return CrossAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        **projections(config),
        q_norm=norm(config.head_dim, config.norm_eps),
        k_norm=norm(config.head_dim, config.norm_eps),
        scale=config.attention_scale,
    )
