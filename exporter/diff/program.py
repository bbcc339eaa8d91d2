"""The program behind an artifact's graph: for every value of it, the PyTorch operator that says what it should be.

It is traced anew from the artifact's config, as the export did, and no weight is read for that.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from exporter.capture import build_encoder_on_meta, build_on_meta, capture, capture_encoder
from exporter.layouts import LAYOUTS
from exporter.layouts.layout import WRAPPED
from exporter.lowering import Lowered, lower
from exporter.progress import Progress
from graphs.checkpoint import TensorRef
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.families.family import TensorNames
from runtimes.artifact import Artifact
from runtimes.signature import GraphSignature


@dataclass(frozen=True, kw_only=True)
class Program:
    """One graph's program; `node` is a name in program.graph."""

    name: str  # of the graph in the manifest
    exported: ExportedProgram
    signature: GraphSignature
    values: Mapping[str, str]  # {value of the ONNX graph: node}
    parameters: Mapping[str, TensorRef]  # {node: where its numbers are}
    buffers: Mapping[str, Tensor]  # {node: its numbers}
    stacks: Mapping[str, tuple[str, ...]]  # {node: paths of the modules it was traced in, from the outside in}
    computes: Mapping[str, str]  # {node: its operator's name in PyTorch, or ours}
    reads: Mapping[str, tuple[str, ...]]  # {node: the weights that it reads itself}
    of_tokens: Mapping[str, int]  # {node with a batch axis in front: which axis counts the call's tokens}

    def module(self, node: str) -> str:
        """The innermost module that a node was traced in; "" outside of any."""
        return (self.stacks.get(node) or ("",))[-1]


def trace_programs(artifact: Artifact, family: Family, config: DecoderConfig, progress: Progress) -> list[Program]:
    """The artifact's graphs in the order they run in: the vision encoder, if there is one, then the decoder."""
    manifest, layout = artifact.manifest, LAYOUTS[artifact.manifest.layout]
    dtype = getattr(torch, manifest.cache.dtype)
    programs = []
    if manifest.vision is not None:
        progress.start("trace the vision encoder")
        signature, names = manifest.graphs["vision_encoder"].signature, family.encoder_names(config)
        traced = capture_encoder(build_encoder_on_meta(config, dtype), layout, signature)
        lowered = lower(traced, layout, signature, names, {}, name="vision_encoder")
        programs.append(_program("vision_encoder", lowered, signature, names, {}))
    progress.start("trace the decoder")
    decoder = build_on_meta(config, dtype)
    signature, names = manifest.graphs["decoder"].signature, family.tensor_names(config)
    traced = capture(decoder, layout, signature, manifest.cache, manifest.vision)
    lowered = lower(traced, layout, signature, names, decoder.real_buffers(), name="decoder")
    programs.append(_program("decoder", lowered, signature, names, decoder.real_buffers()))
    return programs


def _program(
    name: str, lowered: Lowered, signature: GraphSignature, names: TensorNames, buffers: Mapping[str, Tensor]
) -> Program:
    exported = lowered.program
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "call_function"}
    values = {value: origin for value, origin in lowered.origins.items() if origin in nodes}
    outputs = exported.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    values |= {spec.name: str(node) for spec, node in zip(signature.outputs, outputs, strict=True)}
    given = exported.graph_signature
    parameters = {node: _inner(path) for node, path in given.inputs_to_parameters.items()}
    tables = {node: _inner(path) for node, path in given.inputs_to_buffers.items()}
    refs = {node: names[path] for node, path in parameters.items() if path in names}
    return Program(
        name=name,
        exported=exported,
        signature=signature,
        values=values,
        parameters=refs,
        computes={node: _operator(each) for node, each in nodes.items()},
        stacks={node: _stack(each) for node, each in nodes.items()},
        reads={
            node: tuple(refs[used.name].label for used in each.all_input_nodes if used.name in refs)
            for node, each in nodes.items()
        },
        buffers={node: buffers[path] for node, path in tables.items() if path in buffers},
        of_tokens=_token_axes(exported),
    )


def _operator(node: Node) -> str:
    """`attention` of export_llm.attention.default; of one of several results, what made them."""
    source = node.args[0] if node.target is operator.getitem else node
    name = str(source.target) if isinstance(source, Node) else str(node.target)
    return name.split(".")[1] if "." in name else name


def _stack(node: Node) -> tuple[str, ...]:
    paths = (path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return tuple(_inner(path) for path in paths if path.startswith(f"{WRAPPED}."))


def _token_axes(exported: ExportedProgram) -> dict[str, int]:
    """Of every operator whose result is [batch, .., tokens, ..]: the axis of tokens."""
    inputs = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    if "input_ids" not in inputs:
        return {}
    batch, tokens = map(str, inputs["input_ids"].meta["val"].shape)
    axes = {}
    for node in exported.graph.nodes:
        shape = _shape(node)
        if shape[:1] == [batch] and tokens in shape:
            axes[node.name] = shape.index(tokens)
    return axes


def _shape(node: Node) -> list[str]:
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else []


def _inner(path: str) -> str:
    """A module path without the layout's wrapper."""
    return path.removeprefix(f"{WRAPPED}.")
