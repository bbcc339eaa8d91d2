"""How quantized weights are stored: a reader for each way. All of them yield graphs.checkpoint.PackedTensor."""

import dataclasses

from graphs.checkpoint import Checkpoint
from graphs.errors import CheckpointError
from graphs.formats import awq, gptq, own
from graphs.formats.gguf import open_gguf
from graphs.keys import short

__all__ = ["open_gguf", "unpack"]

# quantization_config.quant_method: the reader
METHODS = {"gptq": gptq.unpack, "awq": awq.unpack}


def unpack(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantized tensors among `packed`, and config.json without `quantization_config`.

    Raises:
        CheckpointError: the method is not supported, or the tensors are not what it describes.
    """
    checkpoint = own.unpack(checkpoint)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        return checkpoint
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"config.json: quantization_config.quant_method {short(method)} is not supported; supported:"
            f" {', '.join(METHODS)}"
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return METHODS[method](dataclasses.replace(checkpoint, config=config), quantization)
