"""TransformerDecoder: the reference decoder, with torchtune's interface and a second call for export.

`forward` is torchtune's: tokens in, logits out, the KV cache (if set up) inside the module. `step` is the call that
is exported: every piece of state is an argument and a result.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphs.attention.causal import CausalSelfAttention
from graphs.attention.cross import TransformerCrossAttentionLayer
from graphs.fixed_buffers import FixedBuffers
from graphs.kv_cache import KVCache
from graphs.state import CrossInputs, LayerState, StateTensor, StepContext


class TransformerDecoderLayer(nn.Module):
    """x + attn(sa_norm(x)), then h + mlp(mlp_norm(h)).

    Args:
        sa_scale, mlp_scale: applied to the results of attn and mlp (Gemma 2's post-norms).
        residual_multiplier: multiplies both results (Granite).
        fusion_layer: a cross-attention layer that x goes through first (Llama 3.2 Vision as torchtune builds it).
    """

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module,
        sa_norm: nn.Module,
        mlp_norm: nn.Module,
        *,
        sa_scale: nn.Module | None = None,
        mlp_scale: nn.Module | None = None,
        residual_multiplier: float = 1.0,
        fusion_layer: TransformerCrossAttentionLayer | None = None,
    ) -> None:
        super().__init__()
        self.fusion_layer = fusion_layer
        self.sa_norm = sa_norm
        self.attn = attn
        self.sa_scale = nn.Identity() if sa_scale is None else sa_scale
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_scale = nn.Identity() if mlp_scale is None else mlp_scale
        self.residual_multiplier = residual_multiplier

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """What it carries from call to call."""
        state: tuple[StateTensor, ...] = self.attn.state(max_len)
        return state

    def setup_cache(
        self, batch_size: int, dtype: torch.dtype, max_seq_len: int, encoder_max_seq_len: int | None
    ) -> None:
        """Give the layer a KV cache for `batch_size` rows, and its fusion layer another."""
        attn = self.attn
        attn.kv_cache = KVCache(batch_size, max_seq_len, attn.num_kv_heads, attn.head_dim, dtype)
        if self.fusion_layer is not None:
            self.fusion_layer.setup_cache(batch_size, dtype, max_seq_len, encoder_max_seq_len)

    def reset_cache(self) -> None:
        """Forget all keys and values."""
        self.attn.kv_cache.reset()
        if self.fusion_layer is not None:
            self.fusion_layer.reset_cache()

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
        """[b, s, d] -> [b, s, d]; with explicit state (context and past), also the layer's present.

        encoder_input and encoder_mask are the fusion layer's.
        """
        if self.fusion_layer is not None:
            x = self.fusion_layer(x, context=context, encoder_input=encoder_input, encoder_mask=encoder_mask)
            x = x if context is None else x[0]
        attn = self.attn(self.sa_norm(x), mask, input_pos, context=context, past=past)
        present = None
        if past is not None:
            attn, present = attn
        h = x + scaled(self.sa_scale(attn), self.residual_multiplier)
        h = h + scaled(self.mlp_scale(self.mlp(self.mlp_norm(h))), self.residual_multiplier)
        return h if present is None else (h, present)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor, computed in float32 at least: a factor rounded to 16 bits would be off for every number alike."""
    return x if factor == 1.0 else (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)


class TransformerDecoder(nn.Module):
    """Transformer decoder derived from the Llama 2 architecture, with torchtune's interface.

    Args:
        tok_embeddings: token embedding, [v, d].
        layer: one layer, copied num_layers times, or the num_layers layers themselves; `layers` is another name for it.
        num_layers, max_seq_len, num_heads, head_dim: as named; the last three size the KV cache. num_layers may be
            left out when the layers themselves are given.
        norm: applied before the output projection.
        output: projection to the vocabulary.
        tie_word_embeddings: the output projection uses the embedding's weight.
        pos_embeddings: called with position ids [b, s]; its result is added to the tokens' embeddings.
        embedding_multiplier: multiplies the tokens' embeddings (Gemma, Granite).
        logits_multiplier: multiplies the logits (Granite).
        logits_softcap: logits become logits_softcap * tanh(logits / logits_softcap) (Gemma 2); 0: they do not.
        num_patches: vision tokens of a tile, for decoders with cross-attention layers.

    Raises:
        ValueError: num_layers and the layers given do not match, or layers are given twice or not at all.
    """

    causal_mask: Tensor | None

    def __init__(
        self,
        tok_embeddings: nn.Module,
        layer: nn.Module | Sequence[nn.Module] | None = None,
        num_layers: int | None = None,
        max_seq_len: int | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        norm: nn.Module | None = None,
        output: nn.Linear | None = None,
        *,
        layers: nn.Module | Sequence[nn.Module] | None = None,
        tie_word_embeddings: bool = False,
        pos_embeddings: nn.Module | None = None,
        embedding_multiplier: float = 1.0,
        logits_multiplier: float = 1.0,
        logits_softcap: float = 0.0,
        num_patches: int = 1,
    ) -> None:
        super().__init__()
        if (layer is None) == (layers is None):
            raise ValueError("pass the decoder's layers once: as layer or as layers")
        if max_seq_len is None or num_heads is None or head_dim is None or norm is None or output is None:
            raise ValueError("max_seq_len, num_heads, head_dim, norm and output must be given")
        self.tok_embeddings = tok_embeddings
        self.layers = _as_list(layer if layers is None else layers, num_layers)
        self.norm = norm
        self.output = output
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tie_word_embeddings = tie_word_embeddings
        self.pos_embeddings = pos_embeddings
        self.embedding_multiplier = embedding_multiplier
        self.logits_multiplier = logits_multiplier
        self.logits_softcap = logits_softcap
        self.num_patches = num_patches
        self.causal_mask = None
        for index, cross_layer in enumerate(self.cross_layers):
            cross_layer.index = index
        if tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def cross_layers(self) -> list[TransformerCrossAttentionLayer]:
        """The layers that read images, first to last."""
        return [module for module in self.modules() if isinstance(module, TransformerCrossAttentionLayer)]

    def real_buffers(self) -> dict[str, Tensor]:
        """Values of the buffers that export needs, on the CPU, whatever device the decoder was built on."""
        return real_buffers(self)

    def state(self, max_len: int) -> tuple[tuple[StateTensor, ...], ...]:
        """Per layer, the tensors that `step` takes and returns, for texts of up to max_len tokens; some have none."""
        return tuple(layer.state(max_len) for layer in self.layers)

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int | None = None) -> None:
        """Give every layer a KV cache for `batch_size` rows; `forward` then needs input_pos.

        Args:
            encoder_max_seq_len: vision tokens that cross-attention layers have room for; by default, as many as they
                were built for.

        Raises:
            ValueError: a layer keeps no keys and values: `step` carries its state.
        """
        attentions = [layer.attn for layer in self.layers if not isinstance(layer, TransformerCrossAttentionLayer)]
        others = {type(attn).__name__ for attn in attentions if not isinstance(attn, CausalSelfAttention)}
        if others:
            raise ValueError(
                f"{', '.join(sorted(others))} has no KV cache: use step, which carries every layer's state"
            )
        with self.output.weight.device:
            for layer in self.layers:
                layer.setup_cache(batch_size, dtype, self.max_seq_len, encoder_max_seq_len)
            self.causal_mask = torch.ones(self.max_seq_len, self.max_seq_len, dtype=torch.bool).tril()

    def reset_caches(self) -> None:
        """Forget all keys and values; ValueError when no caches are set up."""
        if self.causal_mask is None:
            raise ValueError("no KV caches are set up: call setup_caches first")
        for layer in self.layers:
            layer.reset_cache()

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor | None = None,
        *,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens int [b, s] -> logits [b, s, v]; input_pos [s] are the tokens' positions, needed with KV caches.

        Args:
            encoder_input: [b, s_e, d], what cross-attention layers read; with KV caches it is needed once.
            encoder_mask: bool [b, s, s_e], True where a token sees; or int, see graphs.attention.cross.cross_mask.

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
        h = self.embed(tokens, torch.arange(length, device=tokens.device) if input_pos is None else input_pos)
        for layer in self.layers:
            h = layer(h, mask, input_pos, encoder_input=encoder_input, encoder_mask=encoder_mask)
        return self.logits(h).to(h.dtype)

    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        attention_mask: Tensor,
        logit_indices: Tensor,
        past: Sequence[LayerState],
        cross_attention_mask: Tensor | None = None,
        cross_key_values: Sequence[LayerState] = (),
    ) -> tuple[Tensor, list[LayerState]]:
        """Run new tokens against explicit state.

        Args:
            input_ids, position_ids: int64 [B, S].
            write_indices: int64 [B], the slot of each row's first new token; write_indices + S <= capacity.
            attention_mask: int64 [B, T], 1 for cache slots that may be seen; T <= capacity.
            logit_indices: int64 [B, n], which of the S positions get logits.
            past: per layer that has a state, the tensors that `state` lists, each [B, *shape]; for softmax attention
                (key, value), each [B, K, capacity, D].
            cross_attention_mask: int64 [B, S, I, T], which tiles of which images each token sees
                (graphs.attention.cross.cross_mask).
            cross_key_values: per cross-attention layer (key, value), each [B, K, I * T * num_patches, D].

        Returns:
            float32 logits [B, n, V] (float64 for a float64 model), and the states of `past`, updated.

        A slot is seen when its index is at most the query's position and its attention_mask is 1. Tokens whose own
        attention_mask is 0 are padding: they leave no trace in sums.
        """
        cross = None
        if cross_attention_mask is not None:
            cross = CrossInputs(cross_attention_mask, cross_key_values, self.num_patches)
        context = StepContext(position_ids, write_indices, attention_mask, cross)
        h, present = self.advance(input_ids, context, past)
        wanted = logit_indices.unsqueeze(-1).expand(-1, -1, h.shape[-1])
        return self.logits(h.gather(1, wanted)), present

    def advance(
        self, input_ids: Tensor, context: StepContext, past: Sequence[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """What the last layer returns for tokens [B, S], [B, S, d], and the states of `past`, updated."""
        h = self.embed(input_ids, context.position_ids)
        present, states = [], iter(past)
        for layer in self.layers:
            if isinstance(layer, TransformerCrossAttentionLayer):
                h, _ = layer(h, context=context)
            else:
                h, layer_present = layer(h, context=context, past=next(states))
                present.append(layer_present)
        return h, present

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """What the first layer reads: [b, s, d] for tokens [b, s] at positions [s] or [b, s]."""
        h = scaled(self.tok_embeddings(tokens), self.embedding_multiplier)
        if self.pos_embeddings is not None:
            h = h + self.pos_embeddings(position_ids.expand(tokens.shape)).to(h.dtype)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Logits of what the last layer returns, at least float32: a softcap or a factor is applied to what float32 can
        hold."""
        logits = self.output(self.norm(h))
        logits = scaled(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.logits_multiplier)
        if self.logits_softcap:
            logits = self.logits_softcap * torch.tanh(logits / self.logits_softcap)
        return logits


def real_buffers(root: nn.Module) -> dict[str, Tensor]:
    """{name: value, on the CPU} of every buffer that a part of `root` can compute (its own real_buffers)."""
    return {
        f"{name}.{leaf}".removeprefix("."): table
        for name, module in root.named_modules(remove_duplicate=False)
        if isinstance(module, FixedBuffers)
        for leaf, table in module.real_buffers().items()
    }


def _as_list(layers: nn.Module | Sequence[nn.Module] | None, num_layers: int | None) -> nn.ModuleList:
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        if num_layers is None:
            raise ValueError("num_layers must be given where one layer is to be copied")
        return nn.ModuleList(copy.deepcopy(layers) for _ in range(num_layers))
    given = list(layers or ())
    if num_layers not in (None, len(given)):
        raise ValueError(f"num_layers ({num_layers}) does not match the {len(given)} layers given")
    return nn.ModuleList(given)
