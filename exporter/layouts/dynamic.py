"""The dynamic layout: a cache that grows by concatenation, as Optimum, transformers.js and onnxruntime-genai feed it.

Inputs and outputs have Hugging Face's names and order of dimensions; operators are the portable layout's.
"""

import dataclasses

from torch import Tensor, nn

from exporter.errors import ExportError
from exporter.layouts import portable
from exporter.layouts.portable import length_range, limits, spec
from graphs.config import DecoderConfig
from graphs.state import GrowingContext, LayerState
from graphs.transformer import TransformerDecoder
from runtimes.artifact import CLIENT_GRAPH_FILE
from runtimes.signature import SLOT_DIMS, CacheSpec, DimRange, GraphSignature, VisionSpec


class DynamicDecoder(nn.Module):
    """The decoder with the layout's inputs, in order; the cache is a list with a tuple for each layer."""

    def __init__(self, decoder: TransformerDecoder, cache: CacheSpec | None = None) -> None:
        super().__init__()
        self.wrapped = decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        context = GrowingContext(position_ids, attention_mask, past_key_values[0][0].shape[2])
        h, present = self.wrapped.advance(input_ids, context, past_key_values)
        return self.wrapped.logits(h), present


def require_text_and_caches(layout: str, config: DecoderConfig, cache: CacheSpec) -> None:
    """ExportError for models whose state those clients have no inputs for."""
    if config.vision is not None:
        raise ExportError(f"--layout {layout} is for models that read text only: use --layout portable")
    others = sorted({tensor.name for tensor in cache.tensors} - {"key", "value"})
    if others or len(cache.tensors) != 2 * config.num_hidden_layers:
        raise ExportError(
            f"--layout {layout} carries keys and values of every layer and nothing else, but this model has"
            f" {', '.join(others) or 'layers without any'}: use --layout portable"
        )


def length_dims(cache: CacheSpec, max_batch: int) -> dict[str, DimRange]:
    """Sizes of the dimensions that clients choose."""
    length = length_range(cache)
    return {
        "batch_size": DimRange(min=1, opt=1, max=max_batch),
        "sequence_length": length,
        "total_sequence_length": length,
        "past_sequence_length": dataclasses.replace(length, min=0),
    }


def signature(
    config: DecoderConfig, cache: CacheSpec, max_batch: int, vision: VisionSpec | None = None
) -> GraphSignature:
    """The decoder's inputs and outputs for one model; ExportError where the layout cannot carry its state."""
    require_text_and_caches("dynamic", config, cache)
    past, present = SLOT_DIMS["dynamic"]
    return GraphSignature(
        inputs=(
            spec("input_ids", "batch_size", "sequence_length"),
            spec("attention_mask", "batch_size", "total_sequence_length"),
            spec("position_ids", "batch_size", "sequence_length"),
            *cache.past_specs(past),
        ),
        outputs=(
            spec("logits", "batch_size", "sequence_length", config.vocab_size, dtype="float32"),
            *cache.present_specs(present),
        ),
        dims=length_dims(cache, max_batch),
        aliases={},
        limits=limits(config),
    )


LAYOUT = dataclasses.replace(
    portable.LAYOUT, wrap=DynamicDecoder, signature=signature, graph_file=CLIENT_GRAPH_FILE, shared_cache=False
)
