"""TransformerDecoder: the reference decoder, with torchtune's interface and a second call for export.

`forward` is torchtune's: tokens in, logits out, the KV cache (if set up) inside the module. `step` is the call that
is exported: every piece of state is an argument and a result.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphs.attention.causal import CausalSelfAttention, LayerCache, StepContext
from graphs.kv_cache import KVCache
from graphs.positions import RotaryPositionalEmbeddings, inverse_frequencies


class TransformerDecoderLayer(nn.Module):
    """x + attn(sa_norm(x)), then h + mlp(mlp_norm(h))."""

    def __init__(self, attn: CausalSelfAttention, mlp: nn.Module, sa_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.sa_norm = sa_norm
        self.attn = attn
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerCache | None = None,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """[b, s, d] -> [b, s, d]; with an explicit cache (context and past), also the layer's present."""
        attn = self.attn(self.sa_norm(x), mask, input_pos, context=context, past=past)
        present = None
        if past is not None:
            attn, present = attn
        h = x + attn
        h = h + self.mlp(self.mlp_norm(h))
        return h if present is None else (h, present)


class TransformerDecoder(nn.Module):
    """Transformer decoder derived from the Llama 2 architecture, with torchtune's interface.

    Args:
        tok_embeddings: token embedding, [v, d].
        layer: one layer, copied num_layers times, or the num_layers layers themselves.
        num_layers, max_seq_len, num_heads, head_dim: as named; the last three size the KV cache.
        norm: applied before the output projection.
        output: projection to the vocabulary.
        tie_word_embeddings: the output projection uses the embedding's weight.
    """

    causal_mask: Tensor | None

    def __init__(
        self,
        tok_embeddings: nn.Embedding,
        layer: TransformerDecoderLayer | Sequence[TransformerDecoderLayer],
        num_layers: int,
        max_seq_len: int,
        num_heads: int,
        head_dim: int,
        norm: nn.Module,
        output: nn.Linear,
        *,
        tie_word_embeddings: bool = False,
    ) -> None:
        super().__init__()
        layers = [copy.deepcopy(layer) for _ in range(num_layers)] if isinstance(layer, nn.Module) else list(layer)
        if len(layers) != num_layers:
            raise ValueError(f"num_layers ({num_layers}) does not match the {len(layers)} layers given")
        self.tok_embeddings = tok_embeddings
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.output = output
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tie_word_embeddings = tie_word_embeddings
        self.causal_mask = None
        if tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def real_buffers(self) -> dict[str, Tensor]:
        """Values of the buffers that export needs, on the CPU, whatever device the decoder was built on."""
        return {
            f"{name}.inv_freq": inverse_frequencies(module.rope, module.dim)
            for name, module in self.named_modules(remove_duplicate=False)
            if isinstance(module, RotaryPositionalEmbeddings)
        }

    def setup_caches(self, batch_size: int, dtype: torch.dtype) -> None:
        """Give every layer a KV cache for `batch_size` rows; `forward` then needs input_pos."""
        device = self.tok_embeddings.weight.device
        with device:
            for layer in self.layers:
                layer.attn.kv_cache = KVCache(
                    batch_size, self.max_seq_len, layer.attn.num_kv_heads, self.head_dim, dtype
                )
            self.causal_mask = torch.ones(self.max_seq_len, self.max_seq_len, dtype=torch.bool).tril()

    def reset_caches(self) -> None:
        """Forget all keys and values; ValueError when no caches are set up."""
        if self.causal_mask is None:
            raise ValueError("no KV caches are set up: call setup_caches first")
        for layer in self.layers:
            layer.attn.kv_cache.reset()

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """tokens int [b, s] -> logits [b, s, v]; input_pos [s] are the tokens' positions, needed with KV caches.

        Raises:
            ValueError: the causal mask is set (caches are set up) but input_pos is None, or s is above max_seq_len.
        """
        length = tokens.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"seq_len ({length}) of the tokens is bigger than max_seq_len ({self.max_seq_len})")
        mask = None
        if self.causal_mask is not None:
            if input_pos is None:
                raise ValueError("caches are set up, but the positions of the input tokens (input_pos) are missing")
            mask = self.causal_mask[input_pos][None, None]
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask, input_pos)
        return self.output(self.norm(h))

    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        attention_mask: Tensor,
        logit_indices: Tensor,
        past: Sequence[LayerCache],
    ) -> tuple[Tensor, list[LayerCache]]:
        """Run new tokens against an explicit cache.

        Args:
            input_ids, position_ids: int64 [B, S].
            write_indices: int64 [B], the slot of each row's first new token; write_indices + S <= capacity.
            attention_mask: int64 [B, T], 1 for cache slots that may be seen; T <= capacity.
            logit_indices: int64 [B, n], which of the S positions get logits.
            past: (key, value) per layer, each [B, K, capacity, D].

        Returns:
            float32 logits [B, n, V] (float64 for a float64 model), and (key, value) per layer, updated.

        A slot is seen when its index is at most the query's position and its attention_mask is 1.
        """
        h = self.tok_embeddings(input_ids)
        slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        mask_BST = (slots <= position_ids.unsqueeze(-1)) & (attention_mask != 0).unsqueeze(1)
        rope = self.layers[0].attn.pos_embeddings.tables(position_ids, h.dtype)
        context = StepContext(rope, mask_BST.unsqueeze(1), write_indices)
        present = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            h, layer_present = layer(h, context=context, past=layer_past)
            present.append(layer_present)
        wanted = logit_indices.unsqueeze(-1).expand(-1, -1, h.shape[-1])
        logits = self.output(self.norm(h.gather(1, wanted)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), present
