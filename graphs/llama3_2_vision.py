"""The decoder of Llama 3.2 Vision as torchtune builds it: its arguments, its parameter names, its defaults."""

import math

import torch
from torch import Tensor, nn

from graphs.attention.causal import CausalSelfAttention
from graphs.attention.cross import CrossAttention, TanhGate, TransformerCrossAttentionLayer
from graphs.config import RopeConfig
from graphs.layers import FeedForward, RMSNorm
from graphs.positions import RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder, TransformerDecoderLayer

NORM_EPS = 1e-5
FUSED_NORM_EPS = 1e-6  # of ca_norm, and of mlp_norm beside it
WIDTH_MULTIPLE = 256  # intermediate_dim is one, where it is not given


class FusionEmbedding(nn.Module):
    """Token embeddings in two parts: of the vocabulary, and of special tokens that were added behind it."""

    def __init__(self, vocab_size: int, fusion_vocab_size: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, embed_dim))
        self.fusion_embedding = nn.Embedding(fusion_vocab_size, embed_dim)
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """int [b, s] -> [b, s, d]; tokens from vocab_size on are special ones."""
        vocab_size = self.weight.shape[0]
        special = tokens >= vocab_size
        of_vocabulary = nn.functional.embedding(tokens.where(~special, 0), self.weight)
        return torch.where(
            special.unsqueeze(-1), self.fusion_embedding((tokens - vocab_size).where(special, 0)), of_vocabulary
        )


def llama3_2_vision_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    fusion_interval: int,
    num_special_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    encoder_max_seq_len: int,
    rope_base: float = 500_000.0,
    intermediate_dim: int | None = None,
) -> TransformerDecoder:
    """Llama 3 with a cross-attention layer in front of every fusion_interval-th layer.

    Args:
        vocab_size: tokens of the vocabulary.
        num_layers: self-attention layers.
        fusion_interval: layers from one cross-attention layer to the next; the first has that number, counted from 1.
        num_special_tokens: tokens that were added for images; the output does not predict them.
        num_heads, num_kv_heads: query heads, key/value heads.
        embed_dim: width of the decoder and of the encoder's output.
        max_seq_len: longest text.
        encoder_max_seq_len: most vision tokens.
        rope_base: theta of the rotary embedding, which is interleaved and scaled as in Llama 3.1.
        intermediate_dim: width of the feed-forward networks; by default 8 / 3 of embed_dim, rounded up to a multiple
            of 256.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, embed_dim none of num_heads, or fusion_interval below 1.
    """
    if fusion_interval < 1:
        raise ValueError(f"fusion_interval ({fusion_interval}) must be at least 1")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    head_dim = embed_dim // num_heads
    if intermediate_dim is None:
        intermediate_dim = -(-4 * int(2 * embed_dim / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    width = intermediate_dim
    rope = RotaryPositionalEmbeddings.from_config(
        RopeConfig(
            theta=float(rope_base),
            dim=head_dim,
            rope_type="llama3",
            interleaved=True,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        max_seq_len,
    )

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    def projections() -> dict[str, nn.Module]:
        return {
            "q_proj": linear(embed_dim, num_heads * head_dim),
            "k_proj": linear(embed_dim, num_kv_heads * head_dim),
            "v_proj": linear(embed_dim, num_kv_heads * head_dim),
            "output_proj": linear(num_heads * head_dim, embed_dim),
        }

    def mlp() -> FeedForward:
        return FeedForward(
            gate_proj=linear(embed_dim, width), down_proj=linear(width, embed_dim), up_proj=linear(embed_dim, width)
        )

    def fusion_layer() -> TransformerCrossAttentionLayer:
        attention = CrossAttention(
            embed_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            **projections(),
            q_norm=RMSNorm(head_dim, NORM_EPS),
            k_norm=RMSNorm(head_dim, NORM_EPS),
            scale=1 / math.sqrt(head_dim),
            max_seq_len=encoder_max_seq_len,
        )
        return TransformerCrossAttentionLayer(
            attention,
            mlp(),
            ca_norm=RMSNorm(embed_dim, FUSED_NORM_EPS),
            mlp_norm=RMSNorm(embed_dim, FUSED_NORM_EPS),
            ca_scale=TanhGate(),
            mlp_scale=TanhGate(),
        )

    def layer(number: int) -> TransformerDecoderLayer:
        attention = CausalSelfAttention(
            embed_dim, num_heads, num_kv_heads, head_dim, **projections(), pos_embeddings=rope, max_seq_len=max_seq_len
        )
        return TransformerDecoderLayer(
            attention,
            mlp(),
            RMSNorm(embed_dim, NORM_EPS),
            RMSNorm(embed_dim, NORM_EPS),
            fusion_layer=fusion_layer() if number % fusion_interval == 0 else None,
        )

    return TransformerDecoder(
        tok_embeddings=FusionEmbedding(vocab_size, num_special_tokens, embed_dim),
        layers=[layer(number) for number in range(1, num_layers + 1)],
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, NORM_EPS),
        output=linear(embed_dim, vocab_size),
    )
