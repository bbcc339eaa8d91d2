"""A decoder with a checkpoint's weights in it."""

from collections.abc import Mapping

from torch import Tensor, nn

from graphs.build import build_decoder, build_vision_encoder, on_meta
from graphs.checkpoint import Checkpoint, check_tensors
from graphs.config import DecoderConfig
from graphs.errors import CheckpointError
from graphs.families import Family
from graphs.families.family import TensorNames
from graphs.transformer import TransformerDecoder, real_buffers
from graphs.vision import VisionEncoder

FEW_MISSING = 500  # tensors: so many are listed one by one


def expected_shapes(family: Family, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """{checkpoint tensor name: shape} for every tensor that the checkpoint must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, names in named_models(family, config, *build_on_meta(config)):
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for ours, ref in names.items():
            shape = tuple(parameters[ours].shape)
            if ref.rows is not None:  # of a tensor that holds several parameters, the last one ends where it does
                shape = (max(ref.rows[1], *shapes.get(ref.name, (0,))[:1]), *shape[1:])
            shapes[ref.name] = shape
    return shapes


def build_on_meta(config: DecoderConfig) -> tuple[TransformerDecoder, VisionEncoder | None]:
    """The decoder, and the vision encoder if there is one, with parameters that have shapes and no storage."""
    with on_meta():
        return build_decoder(config), None if config.vision is None else build_vision_encoder(config)


def named_models(
    family: Family, config: DecoderConfig, decoder: TransformerDecoder, encoder: VisionEncoder | None
) -> list[tuple[nn.Module, TensorNames]]:
    """Each module, with where its parameters are."""
    names: list[tuple[nn.Module, TensorNames]] = [(decoder, family.tensor_names(config))]
    return names if encoder is None else [*names, (encoder, family.encoder_names(config))]


def check_size(config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """CheckpointError where config.json describes far more tensors than there are, before a module is made for each."""
    experts = sum(kind.experts.num_experts for kind in config.kinds if kind.experts is not None)
    vision = 0 if config.vision is None else config.vision.num_hidden_layers + config.vision.num_global_layers
    least, found = config.num_hidden_layers + experts + vision, len(checkpoint.all_tensors)
    if least > found + FEW_MISSING:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json describes at least {least:,} tensors, but the checkpoint holds"
            f" {found:,}: one of them is another model's, or damaged"
        )


def check_weights(family: Family, config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, listing every problem, unless the checkpoint holds just the tensors the config needs."""
    check_size(config, checkpoint)
    check_tensors(checkpoint, expected_shapes(family, config), family.is_ignorable, family.duplicates(config))


def load_decoder(family: Family, config: DecoderConfig, checkpoint: Checkpoint) -> TransformerDecoder:
    """The decoder with the checkpoint's tensors, memory-mapped, in the dtypes they are stored in; quantized ones in
    float32, in memory.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype; all of them are listed.
    """
    return load_model(family, config, checkpoint)[0]


def load_model(
    family: Family, config: DecoderConfig, checkpoint: Checkpoint
) -> tuple[TransformerDecoder, VisionEncoder | None]:
    """The decoder, and the vision encoder if there is one; as load_decoder."""
    check_weights(family, config, checkpoint)
    model = build_on_meta(config)
    for module, names in named_models(family, config, *model):
        loaded = {ref: checkpoint.load(ref) for ref in sorted(set(names.values()), key=str)}
        materialise(module, {ours: loaded[ref] for ours, ref in names.items()})
    return model


def materialise(root: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Put real parameters into a module that was built on the meta device, and recompute its buffers."""
    shared: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for name, tensor in parameters.items():
        module, _, leaf = name.rpartition(".")
        parameter = shared.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        setattr(root.get_submodule(module), leaf, parameter)
    for name, tensor in real_buffers(root).items():
        module, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(module), leaf, tensor)
    root.eval()
