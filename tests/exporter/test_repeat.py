"""Layers that are copied in the graph: it is the one that tracing every layer makes."""

import json
from collections.abc import Callable
from typing import Any

import mllama_cases
import onnx_ir as ir
import pytest
import test_families
import test_transformer_decoder
import torch

from exporter import repeat
from exporter.capture import build_on_meta, capture
from exporter.layouts import LAYOUTS
from exporter.lowering import lower
from exporter.precision import cache_spec, vision_spec
from exporter.repeat import templates, trace_decoder
from graphs.families import find_family

LAYERS = 6


def family_config(case: str) -> dict[str, Any]:
    """Of a case of tests/test_families.py, with more layers."""
    made = test_families.CASES[case].make_config(num_hidden_layers=LAYERS)
    return dict(json.loads(made.to_json_string(use_diff=False)))


def decoder_config(case: str) -> dict[str, Any]:
    """Of a case of tests/test_transformer_decoder.py, with more layers."""
    kinds = test_transformer_decoder.DECODERS[case]
    attention = kinds.get("attention", "causal")
    several = (attention * LAYERS)[:LAYERS] if isinstance(attention, list) else attention
    return test_transformer_decoder.SIZES | kinds | {"num_hidden_layers": LAYERS, "attention": several}


def uneven_config(case: str) -> dict[str, Any]:
    """A second layer of a kind, behind a copy of another."""
    full, near = "causal", "sliding_window"
    return decoder_config(case) | {
        "num_hidden_layers": 7,
        "attention": [full, near, full, full, near, near, full],
    }


def described(graph: ir.Graph) -> dict[str, Any]:
    """All of a graph but what its constants are called."""
    constants = {
        name: value.name if value.const_value is None else (value.dtype, value.const_value.numpy().tolist())
        for name, value in graph.initializers.items()
    }

    def facts(value: ir.Value | None) -> Any:
        return None if value is None else (value.name, value.dtype, str(value.shape))

    return {
        "nodes": [
            (
                node.name,
                node.op_identifier(),
                [None if value is None else constants.get(str(value.name), value.name) for value in node.inputs],
                {name: attribute.value for name, attribute in node.attributes.items()},
                [facts(value) for value in node.outputs],
            )
            for node in graph
        ],
        "inputs": [facts(value) for value in graph.inputs],
        "outputs": [facts(value) for value in graph.outputs],
        "weights": {name: facts(value) for name, value in graph.initializers.items() if value.const_value is None},
        "constants": sorted(map(str, (facts for facts in constants.values() if isinstance(facts, tuple)))),
    }


def trace_both(config: dict[str, Any], layout_name: str, dtype: str = "float32") -> tuple[dict[int, int], Any, Any]:
    """(templates, the graph with copies, the graph of all layers)."""
    family = find_family(config, {})
    parsed = family.parse_config(config)
    decoder, layout = build_on_meta(parsed, getattr(torch, dtype)), LAYOUTS[layout_name]
    cache, vision = cache_spec(decoder, 40, dtype), vision_spec(parsed, dtype, 2)
    signature, names = layout.signature(parsed, cache, 4, vision), family.tensor_names(parsed)
    copied = trace_decoder(decoder, layout, signature, cache, names, vision)
    program = capture(decoder, layout, signature, cache, vision)
    traced = lower(program, layout, signature, names, decoder.real_buffers(), name="decoder").model
    assert {value.name for value in copied.graph.inputs} == {spec.name for spec in signature.inputs}
    return templates(decoder), copied, traced


CASES: dict[str, tuple[Callable[[str], dict[str, Any]], str, str, dict[int, int]]] = {
    "llama, portable": (family_config, "llama", "portable", {2: 1, 3: 1, 4: 1, 5: 1}),
    "llama, genai": (family_config, "llama", "genai", {2: 1, 3: 1, 4: 1, 5: 1}),
    "layers of two kinds": (family_config, "gemma3_text", "dynamic", {4: 2, 5: 3}),
    "a window in some layers": (family_config, "qwen2", "portable", {3: 2, 4: 2, 5: 2}),
    "rows of fused matrices, angles of two lengths": (
        family_config,
        "phi3, longrope",
        "portable",
        {2: 1, 3: 1, 4: 1, 5: 1},
    ),
    "softcaps": (family_config, "gemma2", "portable", {4: 2, 5: 3}),
    "experts": (family_config, "qwen3_moe", "portable", {3: 2, 4: 2, 5: 2}),
    "sums": (decoder_config, "aft_simple", "portable", {2: 1, 3: 1, 4: 1, 5: 1}),
    "kinds in no order": (uneven_config, "sliding_window", "portable", {3: 2, 5: 4, 6: 2}),
    "every kind of attention": (decoder_config, "mixed", "portable", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_is_that_of_all_layers(case: str) -> None:
    """Node for node: names, order, attributes, shapes, weights, inputs and outputs."""
    make, name, layout, expected = CASES[case]
    found, copied, traced = trace_both(make(name), layout)
    if expected:
        assert found == expected
    assert described(copied.graph) == described(traced.graph)


def test_a_model_that_sees() -> None:
    """Its cross-attention layers stay; the layers between are copied."""
    case = mllama_cases.MllamaCase(text={"num_hidden_layers": 8, "cross_attention_layers": [1, 5]})
    found, copied, traced = trace_both(mllama_config(case), "portable", "float16")
    assert found == {3: 2, 4: 2, 6: 2, 7: 2}
    assert described(copied.graph) == described(traced.graph)


def mllama_config(case: mllama_cases.MllamaCase) -> dict[str, Any]:
    """As config.json says it."""
    return dict(json.loads(case.make_model().config.to_json_string(use_diff=False)))


def test_layers_that_differ_are_no_copies() -> None:
    """In a number, in a table, or in a shape."""
    config = family_config("llama")
    parsed = find_family(config, {}).parse_config(config)
    for change in ("eps", "table", "shape"):
        decoder = build_on_meta(parsed, torch.float32)
        assert templates(decoder) == {2: 1, 3: 1, 4: 1, 5: 1}
        layer: Any = decoder.layers[4]
        if change == "eps":
            layer.mlp_norm.eps *= 2
        elif change == "table":
            other = build_on_meta(
                find_family(config, {}).parse_config(config | {"rope_theta": 7.0, "rope_parameters": None}),
                torch.float32,
            )
            layer.attn.pos_embeddings = other.layers[4].attn.pos_embeddings
        else:
            layer.mlp_norm.scale = torch.nn.Parameter(layer.mlp_norm.scale[:-1])
        assert templates(decoder) == {2: 1, 3: 1, 5: 1}


def test_what_cannot_be_copied_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that hand on more than one value."""

    def refuse(self: object, signature: object) -> None:
        raise repeat.NotRepeatableError

    monkeypatch.setattr(repeat._Expansion, "run", refuse)
    _, copied, traced = trace_both(family_config("llama"), "portable")
    assert described(copied.graph) == described(traced.graph)
