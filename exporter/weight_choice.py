"""Which weight is stored how: the precision that was asked for, met with what the checkpoint holds."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from exporter.errors import ExportError
from exporter.precision import ALIASES, FLOAT_TYPES, Choice, FloatType, Precision, fit_block
from graphs.attention.causal import CausalSelfAttention
from graphs.checkpoint import Checkpoint, PackedTensor, TensorRef
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.families.family import TensorNames
from graphs.layers import FeedForward, MoE
from graphs.loading import build_on_meta
from graphs.quantization import WeightFormat


@dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """How one weight is stored, and whether its codes are those of the checkpoint."""

    parameter: str  # our name of it
    in_encoder: bool  # of the vision encoder
    stored: Choice
    kept: bool = False  # the checkpoint's codes are taken over
    packed: PackedTensor | None = None  # what the checkpoint holds, where that is not plain numbers
    joined: str = ""  # as which matrix it is stored, together with others that multiply the same; "": alone

    @property
    def format(self) -> WeightFormat | None:
        """How it is quantized; None where it is stored as floats."""
        return self.stored if isinstance(self.stored, WeightFormat) else None

    @property
    def has_zero_points(self) -> bool:
        """Whether its codes count from other numbers than 0: only those of a checkpoint may."""
        return self._as_packed and self.packed is not None and self.packed.asymmetric

    @property
    def has_negative_scales(self) -> bool:
        """Whether its scales may be below 0."""
        return self._as_packed and self.packed is not None and self.packed.negative_scales

    @property
    def _as_packed(self) -> bool:
        return self.kept and self.packed is not None and self.stored == self.packed.format


Choices = Mapping[TensorRef, WeightChoice]


def matrices(root: nn.Module) -> set[str]:
    """Parameters that multiply and may be quantized: of linear layers, but for the few numbers of a router."""
    routers = {id(module.router) for module in root.modules() if isinstance(module, MoE)}
    return {
        f"{name}.weight"
        for name, module in root.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and id(module) not in routers
    }


JOINED = {
    CausalSelfAttention: ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    FeedForward: ("gate_up_proj", ("w1", "w3")),
}  # {module: (one matrix, those that it is made of)}; one product is faster than several that read the same


def joinable(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """{name of a joined weight: the parameters that it may take the place of, in order}."""
    groups = {}
    for path, module in root.named_modules():
        for kind, (name, parts) in JOINED.items():
            if isinstance(module, kind) and all(isinstance(getattr(module, part), nn.Linear) for part in parts):
                groups[f"{path}.{name}.weight"] = tuple(f"{path}.{part}.weight" for part in parts)
    return groups


def _join(choices: dict[TensorRef, WeightChoice], names: TensorNames, root: nn.Module, checkpoint: Checkpoint) -> None:
    """Let weights that are quantized alike, and multiply the same numbers, be one matrix."""
    for joined, parameters in joinable(root).items():
        refs = [names[parameter] for parameter in parameters]
        kinds = {(choices[ref].format, choices[ref].has_zero_points, checkpoint.shape_of(ref)[-1]) for ref in refs}
        folders = {ref.label.rpartition(".weight")[0].rpartition(".")[0] for ref in refs}
        if len(folders) == 1:  # in the checkpoint's own words
            joined = f"{folders.pop()}.{joined.split('.')[-2]}.weight"
        (format, *_), *others = kinds
        if not others and format is not None and not format.has_tensor_scale and len(set(refs)) == len(refs):
            choices.update({ref: dataclasses.replace(choices[ref], joined=joined) for ref in refs})


def choose_weights(
    family: Family, config: DecoderConfig, checkpoint: Checkpoint, precision: Precision, *, requantize: bool
) -> Choices:
    """How each weight is to be stored.

    Raises:
        ExportError: a quantized weight of the checkpoint would have to be rounded again (`requantize` allows that), or
            an override matches nothing.
    """
    decoder, encoder = build_on_meta(config)
    named = [(decoder, family.tensor_names(config))]
    named += [] if encoder is None else [(encoder, family.encoder_names(config))]
    choices: dict[TensorRef, WeightChoice] = {}
    multiply: dict[str, TensorRef] = {}
    refused = []
    for root, names in named:
        quantizable = matrices(root)
        for parameter, ref in names.items():
            multiplies = parameter in quantizable
            if multiplies:
                multiply[parameter] = ref
            stored, asked = precision.choose(parameter, ref, multiplies=multiplies)
            packed = checkpoint.find_packed(ref)
            choice = WeightChoice(parameter=parameter, in_encoder=root is encoder, stored=stored, packed=packed)
            if packed is not None and not packed.floats and not (asked and isinstance(stored, FloatType)):
                choice = _keep(choice, packed, precision, multiplies=multiplies, asked=asked)
                if choice.format is not None and not choice.kept and not requantize:
                    refused.append(f"{ref.label} ({packed.kind}{': ' + packed.reason if packed.reason else ''})")
            if choice.format is not None and not choice.kept:
                inputs = checkpoint.shape_of(ref)[-1]
                choice = dataclasses.replace(choice, stored=fit_block(choice.format, inputs))
            choices[ref] = choice
        _join(choices, names, root, checkpoint)
    precision.check_overrides(multiply)
    if refused:
        raise ExportError(
            f"precision {precision.name} cannot express {len(refused)} weights exactly, such as {refused[0]}: pass"
            " --requantize to round again, or a float --precision (fp32, fp16, bf16) to dequantize"
        )
    return choices


def _keep(
    choice: WeightChoice, packed: PackedTensor, precision: Precision, *, multiplies: bool, asked: bool
) -> WeightChoice:
    """The choice with the checkpoint's own codes, where they may be taken over."""
    own, wanted = packed.format, choice.format
    if not multiplies:  # embeddings are looked up in floats, and float32 expresses scale * code exactly
        exact = precision.compute.name == "fp32" and not asked
        return dataclasses.replace(choice, stored=FLOAT_TYPES["fp32"]) if exact else choice
    if precision.as_stored and not asked:
        assert precision.weights is not None
        return dataclasses.replace(choice, stored=own or precision.weights, kept=own is not None)
    if own is None or wanted is None:
        return choice
    if own.block == wanted.block or (precision.any_block and not asked):
        if own.name == wanted.name:
            return dataclasses.replace(choice, stored=own, kept=True)
        if (own.name, wanted.name) == ("int4", "int8"):  # every code of 4 bits is one of 8 bits
            return dataclasses.replace(choice, stored=dataclasses.replace(own, name="int8"), kept=True)
    return choice


def refuse_for_engines(choices: Choices, engines: Sequence[str]) -> None:
    """ExportError where engines are asked for, which could not have some weights' codes as they are."""
    for what, names in (
        ("zero points", [ref.label for ref, choice in choices.items() if choice.has_zero_points]),
        ("scales below 0", [ref.label for ref, choice in choices.items() if choice.has_negative_scales]),
    ):
        if engines and names:
            raise ExportError(
                f"target {engines[0]} takes no {what}, which {names[0]} and {len(names) - 1} more have: use --precision"
                " int8, which expresses these weights exactly at twice the size, or --requantize --precision int4,"
                " which rounds again"
            )


def untie(
    family: Family, config: DecoderConfig, checkpoint: Checkpoint, precision: Precision
) -> tuple[DecoderConfig, Checkpoint]:
    """The model with an output projection of its own, where a tied one would be stored in another way than the
    embedding; else as it is."""
    names = family.tensor_names(config)
    embed, head = names[ALIASES["embed"]], names[ALIASES["lm_head"]]
    if embed != head:
        return config, checkpoint
    of_head, _ = precision.choose(ALIASES["lm_head"], head, multiplies=True)
    of_embedding, _ = precision.choose(ALIASES["embed"], embed, multiplies=False)
    packed = checkpoint.find_packed(embed)
    keeps_codes = precision.as_stored and packed is not None and not packed.floats
    if isinstance(of_head, FloatType) and of_head == of_embedding and not keeps_codes:
        return config, checkpoint
    config = dataclasses.replace(config, tie_word_embeddings=False)
    own = family.tensor_names(config)[ALIASES["lm_head"]].name
    if embed.name in checkpoint.packed:
        copies = {**checkpoint.packed, own: dataclasses.replace(checkpoint.packed[embed.name], name=own)}
        return config, dataclasses.replace(checkpoint, packed=copies)
    tensors = {**checkpoint.tensors, own: dataclasses.replace(checkpoint.tensors[embed.name], name=own)}
    return config, dataclasses.replace(checkpoint, tensors=tensors)
