"""What a model family is, and the parts of config.json and of the tensor names that nearly all of them share."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphs.checkpoint import TensorRef
from graphs.config import DecoderConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.keys import MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS, Keys, short
from graphs.layers import ACTIVATION_ALIASES
from graphs.ops import ACTIVATION_FUNCTIONS

TensorNames = dict[str, TensorRef]  # {parameter name: where its numbers are in the checkpoint}

# cross-attention layers: {our name: Hugging Face's, in the layer}
CROSS_NAMES = {
    "ca_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "ca_scale.scale": "cross_attn_attn_gate",
    "mlp_scale.scale": "cross_attn_mlp_gate",
    "attn.q_norm.scale": "cross_attn.q_norm.weight",
    "attn.k_norm.scale": "cross_attn.k_norm.weight",
    "attn.q_proj.weight": "cross_attn.q_proj.weight",
    "attn.k_proj.weight": "cross_attn.k_proj.weight",
    "attn.v_proj.weight": "cross_attn.v_proj.weight",
    "attn.output_proj.weight": "cross_attn.o_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is read."""

    parse_config: Callable[[Mapping[str, Any]], DecoderConfig]
    tensor_names: Callable[[DecoderConfig], TensorNames]
    encoder_names: Callable[[DecoderConfig], TensorNames] = lambda config: {}  # of the vision encoder's parameters
    for_tensors: "Callable[[Container[str]], Family] | None" = None  # where a checkpoint's tensors decide on the names

    def all_refs(self, config: DecoderConfig) -> set[TensorRef]:
        """What the parameters of all graphs refer to."""
        return {*self.tensor_names(config).values(), *self.encoder_names(config).values()}

    def is_ignorable(self, name: str) -> bool:
        """True for tensors that old checkpoints store but that follow from config.json."""
        return name.endswith(".rotary_emb.inv_freq")

    def duplicates(self, config: DecoderConfig) -> dict[str, str]:
        """{tensor that may be present: the one it must equal}: some writers store a tied head as well."""
        names = self.tensor_names(config)
        tied = names["output.weight"].name == names["tok_embeddings.weight"].name
        return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def read_sizes(
    keys: Keys,
    *,
    longest: int,
    norm_eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    odd_heads: bool = False,
) -> dict[str, Any]:
    """The sizes that every config.json gives under the same keys.

    Args:
        longest, norm_eps, kv_heads, head_dim, tied: this model_type's values where a key is absent; None for kv_heads:
            as many as query heads; None for head_dim: hidden_size / num_attention_heads.
        odd_heads: whether head_dim may be odd (nothing is rotated).
    """
    heads = keys.integer("num_attention_heads")
    hidden = keys.integer("hidden_size")
    if hidden % heads:
        raise CheckpointError(
            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}): check config.json"
        )
    absent = "num_key_value_heads" not in keys.raw
    kv_heads = keys.integer("num_key_value_heads", kv_heads if absent and kv_heads is not None else heads)
    if heads % kv_heads:
        raise CheckpointError(f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads}): check config.json")
    absent = "head_dim" not in keys.raw
    dim = keys.integer("head_dim", head_dim if absent and head_dim is not None else hidden // heads)
    if dim > MAX_HEAD_DIM:
        raise CheckpointError(f"head_dim ({dim}) must be at most {MAX_HEAD_DIM}: check config.json")
    if dim % 2 and not odd_heads:
        raise CheckpointError(f"head_dim ({dim}) must be even for rotary embedding: check config.json")
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("intermediate_size"),
        "num_hidden_layers": keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "max_position_embeddings": keys.integer("max_position_embeddings", longest),
        "norm_eps": keys.number("rms_norm_eps", norm_eps),
        "tie_word_embeddings": keys.boolean("tie_word_embeddings", tied),
        "attention_scale": dim**-0.5,
    }


def read_activation(keys: Keys, key: str = "hidden_act", default: str = "silu") -> str:
    """An activation that we have, under its first Hugging Face name."""
    name: str = keys.one_of(key, (*ACTIVATION_FUNCTIONS, *ACTIVATION_ALIASES), default)
    return ACTIVATION_ALIASES.get(name, name)


def read_layer_types(keys: Keys, layers: int, *, window: int | None) -> tuple[str, ...] | None:
    """`layer_types`, full_attention or sliding_attention for each layer; None where config.json has none."""
    types = keys.strings("layer_types", layers, ("full_attention", "sliding_attention"))
    check_window(keys, types or (), window)
    return types


def check_window(keys: Keys, types: tuple[str, ...], window: int | None) -> None:
    """CheckpointError where a layer needs a window and there is none."""
    if "sliding_attention" in types and window is None:
        raise CheckpointError(
            f"{keys.where}: layers of sliding_attention (layer_types) need a sliding_window, which is null or"
            " switched off by use_sliding_window"
        )


def one_layer_type(keys: Keys, layers: int, window: int | None) -> None:
    """Refuse `layer_types` that say something else than this model_type does: all layers alike."""
    same = "full_attention" if window is None else "sliding_attention"
    if keys.strings("layer_types", layers, ("full_attention", "sliding_attention")) not in (None, (same,) * layers):
        raise CheckpointError(
            f"{keys.where}: layer_types must all be {same} (sliding_window is {window}): this model_type's layers are"
            f" alike, found {short(keys.get('layer_types'))}"
        )


def same_kind(layers: int, kind: LayerKind) -> dict[str, Any]:
    """The fields of a decoder whose layers are all alike; `sliding_attention` if they have a window."""
    name = "full_attention" if kind.window is None else "sliding_attention"
    return {"layer_types": (name,) * layers, "layer_kinds": {name: kind}}


def windowed(kind: LayerKind, window: int | None) -> LayerKind:
    """The kind with a sliding window, if there is one."""
    return kind if window is None else replace(kind, attention="sliding_window", window=window)


def read_window_layers(keys: Keys, layers: int, kind: LayerKind) -> dict[str, Any]:
    """The layers' types: with use_sliding_window, those from max_window_layers on have a window unless listed."""
    used = keys.boolean("use_sliding_window", False)
    window = keys.optional_integer("sliding_window", 4096)
    first = keys.integer("max_window_layers", 28, minimum=0)
    window = window if used else None
    types = read_layer_types(keys, layers, window=window)
    if types is None:
        types = tuple("full_attention" if window is None or i < first else "sliding_attention" for i in range(layers))
    kinds = {"full_attention": kind, "sliding_attention": windowed(kind, window)}
    return {"layer_types": types, "layer_kinds": {name: kinds[name] for name in sorted(set(types))}}


def read_expert_counts(keys: Keys, *, num_experts: int, num_experts_per_tok: int) -> dict[str, int]:
    """How many experts there are, under either of Hugging Face's two names, and how many a token gets.

    Args:
        num_experts, num_experts_per_tok: this model_type's values where a key is absent.
    """
    counts = [
        keys.integer(key, num_experts, maximum=MAX_EXPERTS)
        for key in ("num_local_experts", "num_experts")
        if key in keys.raw
    ]
    if len(set(counts)) > 1:
        raise CheckpointError(f"{keys.where}: num_local_experts ({counts[0]}) contradicts num_experts ({counts[1]})")
    count = counts[0] if counts else num_experts
    used = keys.integer("num_experts_per_tok", num_experts_per_tok)
    if used > count:
        raise CheckpointError(
            f"{keys.where}: num_experts_per_tok ({used}) must be at most the number of experts ({count})"
        )
    return {"num_experts": count, "num_experts_per_tok": used}


def huggingface_names(config: DecoderConfig, model: str = "model", head: str = "lm_head") -> TensorNames:
    """Where Hugging Face keeps each parameter of a Llama-like decoder; tied parameters share one tensor.

    Args:
        model, head: what the names of the decoder's and of the head's tensors begin with.
    """
    embedding = f"{model}.embed_tokens.weight"
    names = {
        "tok_embeddings.weight": embedding,
        "norm.scale": f"{model}.norm.weight",
        "output.weight": embedding if config.tie_word_embeddings else f"{head}.weight",
    }
    per_layer = {"sa_norm.scale": "input_layernorm.weight"}
    if config.post_norms:
        per_layer |= {
            "sa_scale.scale": "post_attention_layernorm.weight",
            "mlp_norm.scale": "pre_feedforward_layernorm.weight",
            "mlp_scale.scale": "post_feedforward_layernorm.weight",
        }
    else:
        per_layer["mlp_norm.scale"] = "post_attention_layernorm.weight"
    if config.qk_norm:
        per_layer |= {"attn.q_norm.scale": "self_attn.q_norm.weight", "attn.k_norm.scale": "self_attn.k_norm.weight"}
    linears = {
        "attn.q_proj": ("self_attn.q_proj", config.attention_bias),
        "attn.k_proj": ("self_attn.k_proj", config.attention_bias),
        "attn.v_proj": ("self_attn.v_proj", config.attention_bias),
        "attn.output_proj": ("self_attn.o_proj", config.attention_output_bias),
    }
    dense = {
        "mlp.w1": ("mlp.gate_proj", config.mlp_bias),
        "mlp.w2": ("mlp.down_proj", config.mlp_bias),
        "mlp.w3": ("mlp.up_proj", config.mlp_bias),
    }
    for i, kind in enumerate(config.kinds):
        of_layer = dict(CROSS_NAMES if kind.attention == "cross" else per_layer)
        of_kind = {} if kind.attention == "cross" else linears
        for ours, (theirs, has_bias) in (of_kind | (dense if kind.experts is None else {})).items():
            of_layer[f"{ours}.weight"] = f"{theirs}.weight"
            if has_bias:
                of_layer[f"{ours}.bias"] = f"{theirs}.bias"
        names |= {f"layers.{i}.{ours}": f"{model}.layers.{i}.{theirs}" for ours, theirs in of_layer.items()}
    return {ours: TensorRef(theirs) for ours, theirs in names.items()}


def expert_names(config: DecoderConfig, block: str, projections: tuple[str, str, str]) -> TensorNames:
    """The router and the experts, one tensor for each projection of each.

    Args:
        block: the module that holds them, in each layer.
        projections: an expert's gate, down and up projection.
    """
    names = {}
    for i, kind in enumerate(config.kinds):
        if kind.experts is None:
            continue
        theirs = f"model.layers.{i}.{block}"
        names[f"layers.{i}.mlp.router.weight"] = TensorRef(f"{theirs}.gate.weight")
        for expert in range(kind.experts.num_experts):
            for ours, projection in zip(("w1", "w2", "w3"), projections, strict=True):
                names[f"layers.{i}.mlp.experts.{expert}.{ours}.weight"] = TensorRef(
                    f"{theirs}.experts.{expert}.{projection}.weight"
                )
    return names
