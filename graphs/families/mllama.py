"""Llama 3.2 Vision, arXiv:2407.21783 section 7: a vision encoder, and Llama with gated cross-attention layers."""

from collections.abc import Container, Mapping
from typing import Any

from graphs.build import build_vision_encoder, on_meta
from graphs.checkpoint import TensorRef
from graphs.config import DecoderConfig, LayerKind, VisionConfig
from graphs.errors import CheckpointError
from graphs.families.family import (
    CROSS_NAMES,
    Family,
    TensorNames,
    huggingface_names,
    read_activation,
    read_sizes,
)
from graphs.keys import MAX_LAYERS, Keys, short
from graphs.rope_config import parse_rope

SPECIAL_TOKENS = 8  # rows of the embedding behind vocab_size, the image token among them
CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)  # where config.json says nothing, as in transformers
INTERMEDIATE_LAYERS = (3, 7, 15, 23, 30)
ASPECT_RATIOS = ([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1])


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    text = _part(keys, "text_config", "mllama_text_model")
    vision = _part(keys, "vision_config", "mllama_vision_model")
    sizes = read_sizes(text, longest=131_072, norm_eps=1e-5, kv_heads=8)
    if sizes["head_dim"] * sizes["num_attention_heads"] != sizes["hidden_size"]:
        raise CheckpointError(
            f"{text.where}: head_dim ({sizes['head_dim']}) must be hidden_size / num_attention_heads"
            f" ({sizes['hidden_size'] // sizes['num_attention_heads']}) for this model_type: remove it"
        )
    if sizes["tie_word_embeddings"]:
        raise CheckpointError(
            f"{text.where}: tie_word_embeddings must be false: the embedding has {SPECIAL_TOKENS} rows more than the"
            " head"
        )
    keys.only("tie_word_embeddings", (False,))
    image_token = keys.integer("image_token_index", keys.integer("image_token_id", sizes["vocab_size"]), minimum=0)
    if image_token >= sizes["vocab_size"] + SPECIAL_TOKENS:
        raise CheckpointError(
            f"{keys.where}: image_token_index ({image_token}) must be below vocab_size + {SPECIAL_TOKENS}"
            f" ({sizes['vocab_size'] + SPECIAL_TOKENS})"
        )
    rope = parse_rope(text, sizes["head_dim"], sizes["max_position_embeddings"], default_theta=500_000.0)
    text.get("dropout")
    kinds = {"full_attention": LayerKind(rope=rope), "cross_attention": LayerKind(attention="cross")}
    config = DecoderConfig(
        model_type="mllama",
        **sizes,
        layer_types=_layer_types(text, sizes["num_hidden_layers"]),
        layer_kinds=kinds,
        hidden_act=read_activation(text),
        num_special_tokens=SPECIAL_TOKENS,
        vision=read_vision(vision),
    )
    for part in (text, vision, keys):
        part.finish()
    return config


def _part(keys: Keys, name: str, model_type: str) -> Keys:
    value = keys.get(name)
    if not isinstance(value, Mapping):
        found = "it is missing" if value is None else f"found {short(value)}"
        raise CheckpointError(f"{keys.where}: {name} must be an object, {found}")
    part = Keys(value, f"{keys.where}: {name}")
    part.only("model_type", (model_type,))
    return part


def _layer_types(text: Keys, layers: int) -> tuple[str, ...]:
    text.used.add("cross_attention_layers")
    cross = text.raw.get("cross_attention_layers")
    cross = list(CROSS_LAYERS) if cross is None else cross
    good = isinstance(cross, list) and all(type(i) is int and 0 <= i < layers for i in cross)
    if not good or not cross or len(set(cross)) == layers:
        raise CheckpointError(
            f"{text.where}: cross_attention_layers must be a list of layers, 0 to {layers - 1}, one at least and not"
            f" all, found {short(cross)}"
        )
    return tuple("cross_attention" if index in cross else "full_attention" for index in range(layers))


def read_vision(keys: Keys) -> VisionConfig:
    """The vision_config object; where it says nothing, transformers' values."""
    hidden = keys.integer("hidden_size", 1280)
    heads = keys.integer("attention_heads", keys.integer("num_attention_heads", 16))
    if hidden % heads:
        raise CheckpointError(f"{keys.where}: hidden_size ({hidden}) must be a multiple of attention_heads ({heads})")
    layers = keys.integer("num_hidden_layers", 32, maximum=MAX_LAYERS)
    config = VisionConfig(
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", 5120),
        num_hidden_layers=layers,
        num_global_layers=keys.integer("num_global_layers", 8, minimum=0, maximum=MAX_LAYERS),
        attention_heads=heads,
        num_channels=keys.integer("num_channels", 3),
        image_size=keys.integer("image_size", 448),
        patch_size=keys.integer("patch_size", 14),
        max_num_tiles=keys.integer("max_num_tiles", 4, maximum=1024),
        max_aspect_ratio_id=_aspect_ratios(keys),
        intermediate_layers_indices=_intermediate_layers(keys, layers),
        norm_eps=keys.number("norm_eps", 1e-5),
        hidden_act=read_activation(keys, default="gelu"),
    )
    if config.patch_size > config.image_size:
        raise CheckpointError(
            f"{keys.where}: patch_size ({config.patch_size}) must be at most image_size ({config.image_size})"
        )
    output_dim = keys.integer("vision_output_dim", 7680)
    if output_dim != config.output_dim:
        raise CheckpointError(
            f"{keys.where}: vision_output_dim ({output_dim}) must be hidden_size times one more than"
            f" intermediate_layers_indices ({config.output_dim})"
        )
    return config


def _aspect_ratios(keys: Keys) -> int:
    """How many there are. Which is which is the image processor's business; the model knows them by number."""
    ratios = keys.get("supported_aspect_ratios", list(ASPECT_RATIOS))
    if not isinstance(ratios, list) or not ratios:
        raise CheckpointError(
            f"{keys.where}: supported_aspect_ratios must be a list of [height, width] in tiles, found {short(ratios)}"
        )
    return len(ratios)


def _intermediate_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    indices = keys.get("intermediate_layers_indices", list(INTERMEDIATE_LAYERS))
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < layers for i in indices) or not indices:
        raise CheckpointError(
            f"{keys.where}: intermediate_layers_indices must be a list of local layers, 0 to {layers - 1}, one at"
            f" least, found {short(indices)}"
        )
    return tuple(indices)


def _for_tensors(tensors: Container[str]) -> Family:
    """The family with the names that this checkpoint has.

    Checkpoints on the hub and those that transformers saves begin with language_model; a state_dict of transformers 5
    itself has model.language_model.
    """
    return _INSIDE if "model.language_model.embed_tokens.weight" in tensors else FAMILY


def _family(text: str, head: str, vision: str) -> Family:
    """Args: what the names of the decoder's, the head's and the encoder's tensors begin with."""

    def encoder_names(config: DecoderConfig) -> TensorNames:
        with on_meta():
            encoder = build_vision_encoder(config)
        names = {}
        for name, _ in encoder.named_parameters():
            part, _, rest = name.partition(".")
            if part != "cross":
                names[name] = TensorRef(f"{vision}{name}")
                continue
            index, _, rest = rest.partition(".")
            layer = config.cross_layers[int(index)]
            names[name] = TensorRef(f"{text}.layers.{layer}.{CROSS_NAMES[f'attn.{rest}']}")
        return names

    def tensor_names(config: DecoderConfig) -> TensorNames:
        return huggingface_names(config, text, head)

    return Family(
        parse_config=parse_config, tensor_names=tensor_names, encoder_names=encoder_names, for_tensors=_for_tensors
    )


FAMILY = _family("language_model.model", "language_model.lm_head", "")
_INSIDE = _family("model.language_model", "lm_head", "model.")
