"""A decoder with a checkpoint's weights in it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphs.checkpoint import Checkpoint, check_tensors, load_tensor
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.transformer import TransformerDecoder


def expected_shapes(family: Family, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """{checkpoint tensor name: shape} for every tensor that the checkpoint must hold."""
    with torch.device("meta"):
        decoder = family.build(config)
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    return {theirs: tuple(parameters[ours].shape) for ours, theirs in family.tensor_names(config).items()}


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
        decoder = family.build(config)
    names = family.tensor_names(config)
    loaded = {name: load_tensor(checkpoint.tensors[name]) for name in sorted(set(names.values()))}
    materialise(decoder, {ours: loaded[theirs] for ours, theirs in names.items()})
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
