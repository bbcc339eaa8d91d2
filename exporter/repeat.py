"""A decoder's graph, of which two layers of each kind are traced: the others are copies of the second.

What layers share (masks, rotary angles) is computed in the first that needs it, so the second of a kind computes
nothing but its own. Tracing and lowering a layer takes some tenths of a second, copying its nodes next to none. The
graph is the one that tracing every layer makes, node for node.
"""

import dataclasses
import re
from collections.abc import Mapping, MutableSequence, Sequence

import onnx_ir as ir
import torch
from torch import nn

from exporter.capture import capture
from exporter.layouts.layout import Layout
from exporter.lowering import lower
from graphs.checkpoint import TensorRef
from graphs.fixed_buffers import FixedBuffers
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec

LAYER = re.compile(r"layers\.(\d+)(?=[./])")  # how names of its nodes and parameters begin
OWN = frozenset(vars(nn.Module()))  # what torch itself keeps in a module


class NotRepeatableError(Exception):
    """Layers exchange more than one value, or a graph that is not laid out layer by layer: all have to be traced."""


def trace_decoder(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    tensor_names: Mapping[str, TensorRef],
    vision: VisionSpec | None = None,
) -> ir.Model:
    """What capture and lowering make of the decoder."""
    if copies := templates(decoder):
        try:
            return _trace_and_copy(decoder, layout, signature, cache, tensor_names, vision, copies)
        except NotRepeatableError:
            pass
    return _trace(decoder, layout, signature, cache, tensor_names, vision)


def _trace(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    tensor_names: Mapping[str, TensorRef],
    vision: VisionSpec | None,
) -> ir.Model:
    program = capture(decoder, layout, signature, cache, vision)
    return lower(program, layout, signature, tensor_names, decoder.real_buffers(), name="decoder").model


def templates(decoder: TransformerDecoder) -> dict[int, int]:
    """{layer: the one before it that it is a copy of}: every third and later one of a kind."""
    seen: dict[str, list[int]] = {}
    for index, layer in enumerate(decoder.layers):
        seen.setdefault(_kind(layer), []).append(index)
    return {index: same[1] for same in seen.values() for index in same[2:]}


def _trace_and_copy(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    tensor_names: Mapping[str, TensorRef],
    vision: VisionSpec | None,
    copies: Mapping[int, int],
) -> ir.Model:
    short_cache = dataclasses.replace(cache, tensors=tuple(t for t in cache.tensors if t.layer not in copies))
    dropped = {*cache.past_names(), *cache.present_names()}
    dropped -= {*short_cache.past_names(), *short_cache.present_names()}
    short_signature = dataclasses.replace(
        signature,
        inputs=tuple(spec for spec in signature.inputs if spec.name not in dropped),
        outputs=tuple(spec for spec in signature.outputs if spec.name not in dropped),
    )
    short = _without(decoder, copies)
    model = _trace(short, layout, short_signature, short_cache, tensor_names, vision)
    _Expansion(model.graph, len(decoder.layers), copies, _names_by_layer(tensor_names), cache).run(signature)
    return model


def _kind(module: nn.Module) -> str:
    """What a module computes, its parameters' values apart."""
    fields = {name: _shown(value) for name, value in sorted(vars(module).items()) if name not in OWN}
    tensors = {
        name: None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    tables = {}
    if isinstance(module, FixedBuffers):
        tables = {name: table.numpy().tobytes() for name, table in module.real_buffers().items()}
    parts = {name: None if part is None else _kind(part) for name, part in module._modules.items()}
    return repr((type(module), fields, tensors, tables, parts))


def _shown(value: object) -> str:
    """A tensor is like none but itself: what repr shows of it may leave numbers out."""
    return f"tensor {id(value)}" if isinstance(value, torch.Tensor) else repr(value)


def _without(decoder: TransformerDecoder, layers: Mapping[int, int]) -> TransformerDecoder:
    """The decoder without those layers; the others keep their names."""
    kept = nn.ModuleList()
    for index, layer in enumerate(decoder.layers):
        if index not in layers:
            kept.add_module(str(index), layer)
    short = TransformerDecoder.__new__(type(decoder))
    short.__dict__ = vars(decoder) | {"_modules": decoder._modules | {"layers": kept}}
    return short


def _names_by_layer(tensor_names: Mapping[str, TensorRef]) -> dict[int, dict[str, str]]:
    """{layer: {name within the layer: name in the graph}} of its parameters."""
    names: dict[int, dict[str, str]] = {}
    for name, ref in tensor_names.items():
        if found := LAYER.match(name):
            names.setdefault(int(found[1]), {})[name[found.end() :]] = ref.label
    return names


def _layer_of(node: ir.Node) -> int | None:
    found = LAYER.match(node.name or "")
    return None if found is None else int(found[1])


class _Expansion:
    """Puts the copies into a graph that was traced without them."""

    def __init__(
        self,
        graph: ir.Graph,
        layers: int,
        copies: Mapping[int, int],
        weights: Mapping[int, Mapping[str, str]],
        cache: CacheSpec,
    ) -> None:
        self._graph = graph
        self._count = layers
        self._copies = copies
        self._weights = weights
        self._names = [*zip(cache.tensors, cache.past_names(), cache.present_names(), strict=True)]
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._outputs = {str(value.name): value for value in graph.outputs}
        self._nodes: dict[int, list[ir.Node]] = {}
        for node in graph:
            if (layer := _layer_of(node)) is not None:
                self._nodes.setdefault(layer, []).append(node)

    def run(self, signature: GraphSignature) -> None:
        """Do it; inputs and outputs are then the signature's, in order."""
        traced = [index for index in range(self._count) if index not in self._copies]
        if [*self._nodes] != traced:
            raise NotRepeatableError
        hidden = {index: self._hidden(index) for index in traced}  # what each hands to the next
        before = dict(zip(traced[1:], traced, strict=False))
        read: dict[int, ir.Value] = {}  # what each is handed
        at, last = hidden[0], self._nodes[0][-1]
        for index in range(1, self._count):
            if index in self._copies:
                template = self._copies[index]
                new, at = self._copy(template, index, read[template], at, hidden[template])
                self._graph.insert_after(last, new)
                last = new[-1]
            else:
                _rewire(self._nodes[index], hidden[before[index]], at)
                read[index] = at
                at, last = hidden[index], self._nodes[index][-1]
        _rewire([node for node in self._graph if _layer_of(node) is None], hidden[traced[-1]], at)
        _reset(self._graph.inputs, [self._inputs[spec.name] for spec in signature.inputs])
        _reset(self._graph.outputs, [self._outputs[spec.name] for spec in signature.outputs])

    def _hidden(self, layer: int) -> ir.Value:
        """The one value that later nodes read and the layer's own do not."""
        found = [
            value
            for node in self._nodes[layer]
            for value in node.outputs
            if value.uses()
            and not value.is_graph_output()
            and all(_layer_of(use.node) != layer for use in value.uses())
        ]
        if len(found) != 1:
            raise NotRepeatableError
        return found[0]

    def _copy(
        self, template: int, index: int, entering: ir.Value, at: ir.Value, leaving: ir.Value
    ) -> tuple[list[ir.Node], ir.Value]:
        """(nodes as the template's, that read `at` where those read `entering`; what they make of `leaving`)."""
        names = self._state_names(template, index)
        values = {entering: at} | self._state(names) | self._parameters(template, index)
        nodes = []
        for node in self._nodes[template]:
            if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                raise NotRepeatableError
            copied = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else values.get(value, value) for value in node.inputs],
                [attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr)],
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=_renamed(str(node.name), index),
            )
            for old, new in zip(node.outputs, copied.outputs, strict=True):
                new.name = names.get(str(old.name)) or _renamed(str(old.name), index)
                new.type, new.shape = old.type, None if old.shape is None else old.shape.copy()
                values[old] = new
                if old.is_graph_output():
                    self._outputs[new.name] = new
            nodes.append(copied)
        return nodes, values[leaving]

    def _state_names(self, template: int, index: int) -> dict[str, str]:
        """{input or output of the template's state: the layer's own}."""
        own = {tensor.name: names for tensor, *names in self._names if tensor.layer == index}
        return {
            old: new
            for tensor, *names in self._names
            if tensor.layer == template
            for old, new in zip(names, own[tensor.name], strict=True)
        }

    def _state(self, names: Mapping[str, str]) -> dict[ir.Value, ir.Value]:
        """{state that the template reads: the layer's own}, which becomes an input."""
        states = {}
        for old_name, name in names.items():
            if (old := self._inputs.get(old_name)) is not None:
                states[old] = self._inputs[name] = _like(old, name)
        return states

    def _parameters(self, template: int, index: int) -> dict[ir.Value, ir.Value]:
        """{parameter of the template: the layer's own}, which becomes an initializer."""
        initializers = self._graph.initializers
        parameters: dict[ir.Value, ir.Value] = {}
        for leaf, label in self._weights.get(template, {}).items():
            if (old := initializers.get(label)) is None:
                continue
            wanted = self._weights[index][leaf]
            if wanted not in initializers:
                initializers[wanted] = _like(old, wanted)
            if parameters.setdefault(old, initializers[wanted]) is not initializers[wanted]:
                raise NotRepeatableError  # one weight of the template is two of this layer's
        return parameters


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _like(value: ir.Value, name: str) -> ir.Value:
    """Another value of that type and shape."""
    return ir.Value(name=name, type=value.type, shape=None if value.shape is None else value.shape.copy())


def _renamed(name: str, layer: int) -> str:
    found = LAYER.match(name)
    if found is None:
        raise NotRepeatableError
    return f"layers.{layer}{name[found.end() :]}"


def _rewire(nodes: Sequence[ir.Node], old: ir.Value, new: ir.Value) -> None:
    """Let them read `new` where they read `old`."""
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(position, new)


def _reset(values: MutableSequence[ir.Value], wanted: Sequence[ir.Value]) -> None:
    values.clear()
    values.extend(wanted)
