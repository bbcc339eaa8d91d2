"""A decoder with a checkpoint's weights in it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphs.build import build_decoder
from graphs.checkpoint import Checkpoint, check_tensors, load_tensor
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.transformer import TransformerDecoder


def expected_shapes(family: Family, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """{checkpoint tensor name: shape} for every tensor that the checkpoint must hold."""
    with torch.device("meta"):
        decoder = build_decoder(config)
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, ref in family.tensor_names(config).items():
        shape = tuple(parameters[ours].shape)
        if ref.rows is not None:  # of a tensor that holds several parameters, the last one ends where it does
            shape = (max(ref.rows[1], *shapes.get(ref.name, (0,))[:1]), *shape[1:])
        shapes[ref.name] = shape
    return shapes


def check_weights(family: Family, config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, listing every problem, unless the checkpoint holds just the tensors the config needs."""
    check_tensors(checkpoint, expected_shapes(family, config), family.is_ignorable, family.duplicates(config))


def load_decoder(family: Family, config: DecoderConfig, checkpoint: Checkpoint) -> TransformerDecoder:
    """The decoder with the checkpoint's tensors, memory-mapped, in the dtypes they are stored in.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype; all of them are listed.
    """
    check_weights(family, config, checkpoint)
    with torch.device("meta"):
        decoder = build_decoder(config)
    names = family.tensor_names(config)
    loaded = {ref: load_tensor(ref.slice(checkpoint.tensors[ref.name])) for ref in sorted(set(names.values()), key=str)}
    materialise(decoder, {ours: loaded[ref] for ours, ref in names.items()})
    return decoder


def materialise(decoder: TransformerDecoder, parameters: Mapping[str, Tensor]) -> None:
    """Put real parameters into a decoder that was built on the meta device, and recompute its buffers."""
    shared: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for name, tensor in parameters.items():
        module, _, leaf = name.rpartition(".")
        parameter = shared.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        setattr(decoder.get_submodule(module), leaf, parameter)
    for name, tensor in decoder.real_buffers().items():
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, tensor)
    decoder.eval()
