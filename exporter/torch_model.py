"""A model whose tensors are the files of a checkpoint, memory-mapped, and where each of them lies there.

Nothing is read or copied when it is made. Weights that are stored in another dtype than the model computes in are cast
in every call, and quantized ones stay in their codes.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from exporter.capture import build_encoder_on_meta, build_on_meta
from graphs.checkpoint import Checkpoint, StoredTensor, TensorRef
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.families.family import TensorNames
from graphs.formats import own
from graphs.loading import materialise, named_models
from graphs.quantized_linear import BUFFERS, QuantizedLinear
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedModel:
    """A model, and {name of a parameter or buffer: where its numbers lie}; other buffers are computed."""

    decoder: TransformerDecoder
    encoder: VisionEncoder | None
    decoder_places: dict[str, StoredTensor]
    encoder_places: dict[str, StoredTensor]


def map_model(family: Family, config: DecoderConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> MappedModel:
    """The checkpoint's model, computing in `dtype`."""
    decoder = build_on_meta(config, dtype)
    encoder = None if config.vision is None else build_encoder_on_meta(config, dtype)
    places = [_map(root, names, checkpoint, dtype) for root, names in named_models(family, config, decoder, encoder)]
    return MappedModel(decoder=decoder, encoder=encoder, decoder_places=places[0], encoder_places=dict(*places[1:]))


def _map(root: nn.Module, names: TensorNames, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Put the checkpoint's tensors into a module that was built on the meta device."""
    places: dict[str, StoredTensor] = {}
    plain, casts = {}, []
    mapped: dict[TensorRef | StoredTensor, Tensor] = {}  # tied parameters, and matrices of several layers, stay one
    for name, ref in names.items():
        path, _, leaf = name.rpartition(".")
        packed = checkpoint.find_packed(ref)
        if packed is not None and packed.parts and packed.format is not None:
            parts = {suffix: mapped.setdefault(each, own.map_part(each)) for suffix, each in packed.parts.items()}
            shape, bias = (packed.of_outputs, packed.shape[1]), root.get_submodule(path).bias
            layer = QuantizedLinear(packed.format, shape, parts, bias, dtype, packed.outputs)
            root.set_submodule(path, layer)
            places |= {f"{path}.{BUFFERS[suffix]}": each for suffix, each in packed.parts.items()}
            continue
        plain[name] = mapped.setdefault(ref, checkpoint.load(ref))
        if plain[name].dtype != dtype:
            casts.append((path, leaf))
        places[name] = checkpoint.place(ref)
    materialise(root, plain)
    for path, leaf in casts:
        parametrize.register_parametrization(root.get_submodule(path), leaf, _Cast(dtype), unsafe=True)
        name = f"{path}.{leaf}"
        places[f"{path}.parametrizations.{leaf}.original"] = places.pop(name)
    return places


class _Cast(nn.Module):
    """A parameter in the dtype that it is computed in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor) -> Tensor:
        return stored.to(self.dtype)
