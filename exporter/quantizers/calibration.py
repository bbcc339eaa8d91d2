"""Calibration: text goes through the model layer by layer, and each layer's weights are quantized for it.

One layer's weights are in memory at a time, and between layers what enters the next one for all of the text. Every
layer sees what the quantized layers before it compute. Finished layers are kept in a folder, from which a run that was
stopped goes on.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.errors import ExportError
from exporter.progress import Progress
from exporter.quantizers import QUANTIZERS, Quantizer, mse
from exporter.quantizers.streaming import StreamedLayer
from exporter.quantizers.work import Calibrated, WorkFolder
from exporter.reference import reference_device
from graphs.attention.cross import TransformerCrossAttentionLayer
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families.family import TensorNames
from graphs.loading import build_on_meta, materialise
from graphs.quantization import WeightFormat
from graphs.transformer import TransformerDecoder

HEAD = "output.weight"


@torch.no_grad()
def calibrate(
    method: str,
    names: TensorNames,
    config: DecoderConfig,
    checkpoint: Checkpoint,
    tokens: Tensor,
    formats: Mapping[str, WeightFormat],
    scale_dtype: torch.dtype,
    work: Path,
    progress: Progress,
    *,
    fingerprint: str,
    device: torch.device | None = None,
) -> Calibrated:
    """Quantize the parameters that `formats` names.

    Those that text does not reach (cross attention to images, a vision encoder) are quantized by `mse`.

    Args:
        method: a name in QUANTIZERS that needs calibration.
        names: {our name of a parameter: where its numbers are}, of all that the decoder has and all in `formats`.
        tokens: int64 [samples, length].
        work: a folder for the results, and for what is needed to go on with a run that was stopped. The caller removes
            it; the result reads from it.
        fingerprint: of all that the results depend on. If `work` has another one, the run starts anew.
        device: by default, that of the reference.

    Raises:
        ExportError: the text does not fit the model, or the model computes numbers that are not finite.
    """
    decoder, _ = build_on_meta(config)
    _check_tokens(tokens, config.embedding_size, decoder.max_seq_len)
    run = _Run(
        QUANTIZERS[method],
        decoder,
        names,
        checkpoint,
        formats,
        scale_dtype,
        WorkFolder(work, fingerprint),
        progress,
        reference_device() if device is None else device,
    )
    run.quantize_reached(tokens)
    run.quantize_others()
    return Calibrated(work)


def _check_tokens(tokens: Tensor, vocabulary: int, max_len: int) -> None:
    if tokens.shape[1] > max_len:
        raise ExportError(
            f"calibration: samples are {tokens.shape[1]} tokens long, and the model's texts {max_len} at most:"
            " use shorter samples"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ExportError(
            f"calibration: the text holds token ids from {int(tokens.min())} to {int(tokens.max())}, and the model's go"
            f" from 0 to {vocabulary - 1}: is the tokenizer another model's?"
        )


class _Head(nn.Module):
    """What comes after the layers, called like one."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.norm = decoder.norm
        self.output = decoder.output

    def forward(self, h: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        logits: Tensor = self.output(self.norm(h))
        return logits


class _Run:
    """One calibration; its parts are the layers, the head, and each weight that text does not reach."""

    def __init__(
        self,
        quantizer: Quantizer,
        decoder: TransformerDecoder,
        names: TensorNames,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        scale_dtype: torch.dtype,
        work: WorkFolder,
        progress: Progress,
        device: torch.device,
    ) -> None:
        assert quantizer.quantize_layer is not None, "a method that looks at weights alone needs no calibration"
        self._quantize_layer = quantizer.quantize_layer
        self._streams = 2 if quantizer.compares else 1
        self._decoder = decoder
        self._names = names
        self._checkpoint = checkpoint
        self._formats = formats
        self._scale_dtype = scale_dtype
        self._work = work
        self._progress = progress
        self._device = device
        self._layers = [f"layers.{index}" for index in range(len(decoder.layers))]

    def quantize_reached(self, tokens: Tensor) -> None:
        """The layers and the head, from where an earlier run stopped."""
        parts = [*self._layers, *([HEAD] if HEAD in self._formats else [])]
        if not all(self._work.has(part) for part in parts):
            first, hidden = self._work.load_hidden() or (0, self._embed(tokens))
            for index in range(first, len(self._layers)):
                self._finish_layer(index, hidden)
            if HEAD in self._formats:
                self._finish_head(hidden)
        self._work.drop_hidden()

    def quantize_others(self) -> None:
        """Each weight for itself."""
        reached = (*(f"{layer}." for layer in self._layers), HEAD)
        others = sorted(name for name in self._formats if not name.startswith(reached))
        if others:
            self._progress.start("quantize what text does not reach", len(others))
        for index, name in enumerate(others):
            part = f"others.{index}"
            if not self._work.has(part):
                weight = self._checkpoint.load(self._names[name], torch.float32).to(self._device)
                with self._device:
                    quantized = mse.quantize(weight, self._formats[name], self._scale_dtype)
                self._work.save(part, {name: quantized}, {})
            self._progress.advance(1)

    def _embed(self, tokens: Tensor) -> Tensor:
        """float32 [streams, samples, length, width] on the CPU: what enters the first layer."""
        decoder = self._decoder
        # rows are looked up where they lie, and cast then: the table may be larger than any layer
        table = self._checkpoint.load(self._names["tok_embeddings.weight"], torch.float32)
        materialise(decoder, {"tok_embeddings.weight": table})
        self._load("pos_embeddings.", device=torch.device("cpu"))
        cast = decoder.tok_embeddings.register_forward_hook(lambda module, args, rows: rows.to(torch.float32))
        positions = torch.arange(tokens.shape[1])
        hidden = torch.cat([decoder.embed(rows[None], positions) for rows in tokens])
        cast.remove()
        decoder.tok_embeddings.to("meta")
        return hidden.repeat(self._streams, 1, 1, 1)

    def _finish_layer(self, index: int, hidden: Tensor) -> None:
        part, module = self._layers[index], self._decoder.layers[index]
        weights = sum(name.startswith(f"{part}.") for name in self._formats)
        self._progress.start(f"calibrate: layer {index + 1} of {len(self._layers)}", weights)
        self._load(f"{part}.")
        layer = self._quantize(part, f"{part}.", module, hidden)
        layer.advance()
        self._work.save_hidden(index + 1, hidden)
        module.to("meta")  # its weights are not needed any more

    def _finish_head(self, hidden: Tensor) -> None:
        self._progress.start("calibrate: output projection", 1)
        self._load("norm.", HEAD)
        head = _Head(self._decoder)
        self._quantize(HEAD, "", head, hidden)
        head.to("meta")

    def _quantize(self, part: str, prefix: str, module: nn.Module, hidden: Tensor) -> StreamedLayer:
        own = {f"{prefix}{name}": name for name, _ in module.named_parameters()}
        formats = {own[name]: format for name, format in self._formats.items() if name in own}
        layer = StreamedLayer(module, formats, self._scale_dtype, hidden, self._device, self._progress)
        with self._device:  # the small tables in which codes are looked up
            if not isinstance(module, TransformerCrossAttentionLayer):  # text alone goes around it
                self._quantize_layer(layer)
            for name in sorted(formats.keys() - layer.quantized.keys()):
                layer.put(name, mse.quantize(module.get_parameter(name), formats[name], self._scale_dtype))
        self._work.save(
            part,
            {f"{prefix}{name}": each for name, each in layer.quantized.items()},
            {f"{prefix}{name}": value for name, value in layer.changed.items()},
        )
        return layer

    def _load(self, *prefixes: str, device: torch.device | None = None) -> None:
        """Put parameters into the decoder, as float32."""
        wanted = {name: ref for name, ref in self._names.items() if name.startswith(prefixes)}
        parameters = {
            name: self._checkpoint.load(ref, torch.float32).to(device or self._device, torch.float32)
            for name, ref in wanted.items()
        }
        materialise(self._decoder, parameters)
        for name, buffer in list(self._decoder.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(self._decoder.get_submodule(owner), leaf, buffer.to(device or self._device))
