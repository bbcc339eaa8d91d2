"""Everything the maths of a decoder needs, as frozen data. Families build it from config.json (graphs/families/)."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, arXiv:2104.09864, with the frequency scalings of Hugging Face's `rope_type`.

    Fields after `interleaved` belong to one or two rope types each; positions.py has the formulas.
    """

    theta: float
    dim: int  # rotated numbers of each head, even; the rest of the head is left alone
    rope_type: str = "default"
    interleaved: bool = False  # True: pairs (0, 1), (2, 3), .. (torchtune, Meta); False: (0, D/2), .. (Hugging Face)
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0  # multiplies cosines and sines

    @property
    def depends_on_length(self) -> bool:
        """True when a token's angle depends on how long its row is when it is fed, not on its position alone."""
        return self.rope_type in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A feed-forward layer of routed experts; Mixtral, arXiv:2401.04088."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of each expert
    norm_topk_prob: bool  # the chosen experts' weights are made to add up to 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer."""

    attention: str = "causal"  # an entry of graphs.attention.ATTENTION; or "cross", to images
    window: int | None = None  # tokens that sliding_window sees, and aft_local has biases for, the query's own included
    top_k: int | None = None  # keys that sparse_top_k keeps
    rope: RopeConfig | None = None
    experts: ExpertsConfig | None = None  # None: one feed-forward network


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder of Llama 3.2 Vision; names are those of Hugging Face's vision_config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # of the local transformer
    num_global_layers: int
    attention_heads: int
    num_channels: int
    image_size: int  # height and width of a tile, in pixels
    patch_size: int
    max_num_tiles: int
    max_aspect_ratio_id: int  # ids 1 .. this are aspect ratios, 0 is no image
    intermediate_layers_indices: tuple[int, ...]  # local layers whose results the encoder's result holds as well
    norm_eps: float
    hidden_act: str  # an entry of graphs.ops.ACTIVATION_FUNCTIONS

    @property
    def num_patches(self) -> int:
        """Vision tokens of a tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_dim(self) -> int:
        """Numbers of a vision token before the projector."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder; names are Hugging Face's config keys where it has one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]  # per layer, a key of layer_kinds
    layer_kinds: Mapping[str, LayerKind]
    norm_eps: float
    tie_word_embeddings: bool
    attention_scale: float  # multiplies q.k
    attention_bias: bool = False  # of the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm: str = "rms_norm"  # an entry of graphs.layers.NORMS
    hidden_act: str = "silu"  # an entry of graphs.ops.ACTIVATION_FUNCTIONS
    gated_mlp: bool = True  # SwiGLU and its like; False: two matrices
    qk_norm: bool = False  # each query and key head is normalised
    post_norms: bool = False  # the results of attention and feed-forward are normalised as well
    position_embedding: str | None = None  # added to the token embedding: an entry of graphs.positions.ABSOLUTE
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # divides the logits
    aft_rank: int = 0  # aft_full: inner width of its factorised position bias
    num_special_tokens: int = 0  # rows of the embedding behind vocab_size; tokens that are read and never predicted
    vision: VisionConfig | None = None  # what makes the keys and values that layers of attention="cross" read

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.layer_kinds[name] for name in self.layer_types)

    @property
    def embedding_size(self) -> int:
        """Rows of the token embedding."""
        return self.vocab_size + self.num_special_tokens

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Which layers attend to images."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind.attention == "cross")

    @property
    def position_limit(self) -> int | None:
        """Positions that there are learned numbers for; None when any position can be computed."""
        learned = self.position_embedding == "learned" or any(
            kind.attention in ("aft_full", "aft_local") for kind in self.kinds
        )
        return self.max_position_embeddings if learned else None
