"""Runners that compute an artifact's weights with PyTorch itself: as it is, or compiled when it is first called."""

from collections.abc import Callable

import torch

from exporter.clients import artifact_checkpoint
from exporter.layouts import LAYOUTS
from exporter.torch_model import MappedModel, map_model
from exporter.torch_program import decode_signature, decoder_program, encoder_program, on_device
from graphs.errors import CheckpointError
from graphs.families import find_family
from runtimes.artifact import Artifact
from runtimes.compiled_runner import CompiledRunner
from runtimes.eager_runner import EagerRunner
from runtimes.errors import ArtifactError
from runtimes.runner import Runner
from runtimes.torch_runner import torch_device

LAYOUT = "portable"


def open_eager(artifact: Artifact, device: str | None = None) -> EagerRunner:
    """Eager PyTorch; quantized weights become floats in every call."""
    device, model = torch_device(device), _map(artifact)
    manifest, layout = artifact.manifest, LAYOUTS[LAYOUT]
    encoder = None if model.encoder is None else layout.wrap_encoder(model.encoder).to(device)
    return EagerRunner(
        layout.wrap(model.decoder, manifest.cache).to(device),
        manifest.graphs["decoder"].signature,
        manifest.cache,
        encoder=encoder,
        vision=artifact.vision_part(),
        device=device,
    )


def open_compiled(artifact: Artifact, device: str | None = None) -> CompiledRunner:
    """torch.compile over the programs of exporter.torch_program."""
    device, model = torch_device(device), _map(artifact)
    manifest, layout = artifact.manifest, LAYOUTS[LAYOUT]
    signature, moved = manifest.graphs["decoder"].signature, dict[int, torch.Tensor]()
    programs = [
        decoder_program(model.decoder, layout, each, manifest.cache, manifest.vision)
        for each in (signature, decode_signature(signature))
    ]
    if model.encoder is not None:
        programs.append(encoder_program(model.encoder, layout, manifest.graphs["vision_encoder"].signature))
    prefill, decode, *encoder = (on_device(each, device, moved).module(check_guards=False) for each in programs)
    return CompiledRunner(
        prefill,
        decode,
        signature,
        manifest.cache,
        encoder=encoder[0] if encoder else None,
        vision=artifact.vision_part(),
        device=device,
    )


MODULE_RUNNERS: dict[str, Callable[[Artifact, str | None], Runner]] = {
    "eager": open_eager,
    "compiled": open_compiled,
}


def _map(artifact: Artifact) -> MappedModel:
    manifest = artifact.manifest
    if manifest.layout != LAYOUT:
        raise ArtifactError(
            f"{artifact.folder} has the layout {manifest.layout}, and PyTorch's runners take {LAYOUT}: use --runtime"
            f" onnxruntime, or export with --layout {LAYOUT}"
        )
    try:
        checkpoint = artifact_checkpoint(artifact)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from None
    family = find_family(checkpoint.config, checkpoint.shapes)
    config = family.parse_config(checkpoint.config)
    return map_model(family, config, checkpoint, getattr(torch, manifest.cache.dtype))
