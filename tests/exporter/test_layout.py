"""The exported graph follows the portable layout exactly, and its weights lie where it says."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, TensorProto
from safetensors import safe_open

from exporter.capture import build_on_meta
from exporter.layouts import LAYOUTS
from exporter.pipeline import trace
from exporter.precision import FLOAT_TYPES, cache_spec
from exporter.progress import Quiet
from graphs.checkpoint import open_checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family, find_family
from graphs.loading import check_weights

PRECISION_NAMES = ("fp32", "fp16", "bf16")
ONNX_DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LAYERS, KV_HEADS, HEAD_DIM, MAX_LEN, VOCAB = 3, 2, 32, 128, 100  # of examples/tiny_llama

# Every operator that ONNX Runtime, TensorRT and TensorRT-RTX have been seen to take in this layout.
ALLOWED_OPERATORS = {
    *("Add", "And", "Attention", "Cast", "Cos", "Equal", "Expand", "Gather", "GatherElements", "LessOrEqual", "MatMul"),
    *("Mul", "Not", "RMSNormalization", "Range", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Sin", "Slice"),
    *("Squeeze", "TensorScatter", "Transpose", "Unsqueeze"),
}

MODULES = re.compile(  # the paths of torchtune's modules, which name the nodes
    r"(tok_embeddings|norm|output|layers\.\d+(\.(sa_norm|mlp_norm|mlp(\.w[123]|\.activation)?|attn(\.(q|k|v|output)_proj)?))?)?"
)


def load(folder: Path) -> ModelProto:
    return onnx.load(folder / "decoder.onnx", load_external_data=False)


@pytest.fixture(params=PRECISION_NAMES)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(x_graphs: Callable[[str], Path], precision: str) -> ModelProto:
    return load(x_graphs(precision))


def describe(values: Any) -> list[tuple[str, int, list[int | str]]]:
    """(name, element type, shape with symbolic names) of graph inputs or outputs."""
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def nodes_of(model: ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def constants(model: ModelProto) -> dict[str, list[Any]]:
    """Values of the initializers that are stored in the graph itself."""
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
    }


def test_inputs_and_outputs_are_the_layouts(model: ModelProto, precision: str) -> None:
    """Names, order, dtypes and shapes are those of the design, written out here by hand."""
    int64, dtype = TensorProto.INT64, ONNX_DTYPES[precision]
    cache = ["batch_size", KV_HEADS, MAX_LEN, HEAD_DIM]
    parts = [(layer, part) for layer in range(LAYERS) for part in ("key", "value")]
    assert describe(model.graph.input) == [
        ("input_ids", int64, ["batch_size", "sequence_length"]),
        ("position_ids", int64, ["batch_size", "sequence_length"]),
        ("write_indices", int64, ["batch_size"]),
        ("attention_mask", int64, ["batch_size", "total_sequence_length"]),
        ("logit_indices", int64, ["batch_size", "n"]),
        *((f"past_key_values.{layer}.{part}", dtype, cache) for layer, part in parts),
    ]
    assert describe(model.graph.output) == [
        ("logits", TensorProto.FLOAT, ["batch_size", "n", VOCAB]),
        *((f"present.{layer}.{part}", dtype, cache) for layer, part in parts),
    ]


def test_only_standard_opset_24(model: ModelProto) -> None:
    """One opset import, no functions, no other domain, and only operators that every runtime takes."""
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= ALLOWED_OPERATORS


def test_no_subgraphs(model: ModelProto) -> None:
    """No node holds a graph (If, Loop, Scan)."""
    for node in model.graph.node:
        assert not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute), node.name


def test_attention_uses_only_what_every_runtime_honours(model: ModelProto) -> None:
    """Q, K, V and mask, one output, the scale, and neither causality nor a softcap."""
    found = nodes_of(model, "Attention")
    assert len(found) == LAYERS
    for node in found:
        assert len(node.input) == 4
        assert all(node.input)
        assert len(node.output) == 1
        values = attributes(node)
        assert values.pop("scale") == pytest.approx(HEAD_DIM**-0.5)
        # the others may be written out, at the value that means "off"
        assert values.items() <= {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}.items()


def test_cache_is_written_by_linear_tensor_scatter(model: ModelProto) -> None:
    """Each past goes straight from a graph input through one TensorScatter to its present."""
    written = {}
    for node in nodes_of(model, "TensorScatter"):
        assert attributes(node) == {"axis": -2, "mode": b"linear"}
        assert node.input[2] == "write_indices"
        written[node.output[0]] = node.input[0]
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert written == {f"present.{name}": f"past_key_values.{name}" for name in names}


def test_attention_reads_the_active_part_of_the_cache(model: ModelProto) -> None:
    """Keys and values are Slice(present, 0, total, axis 2), and total comes from the mask's shape."""
    makers = {output: node for node in model.graph.node for output in node.output}
    fixed = constants(model)
    for layer, node in enumerate(nodes_of(model, "Attention")):
        for name, part in zip(node.input[1:3], ("key", "value"), strict=True):
            cut = makers[name]
            assert cut.op_type == "Slice"
            present, start, end, axis = cut.input
            assert present == f"present.{layer}.{part}"
            assert (fixed[start], fixed[axis]) == ([0], [2])
            assert makers[end].op_type == "Shape"
            assert attributes(makers[end]) == {"start": 3, "end": 4}
            assert makers[end].input[0] == node.input[3]


def test_the_mask_is_made_once(model: ModelProto) -> None:
    """All layers share one bool mask."""
    assert len({node.input[3] for node in nodes_of(model, "Attention")}) == 1
    assert Counter(node.op_type for node in model.graph.node)["LessOrEqual"] == 1


def test_normalisation_and_rotary(model: ModelProto) -> None:
    """RMSNormalization accumulates in float32 (stash_type 1); Llama's pairs are not interleaved."""
    norms = nodes_of(model, "RMSNormalization")
    assert len(norms) == 2 * LAYERS + 1
    for node in norms:
        values = attributes(node)
        assert (values["stash_type"], values["axis"]) == (1, -1)
        assert values["epsilon"] == pytest.approx(1e-5)
    rotary = nodes_of(model, "RotaryEmbedding")
    assert len(rotary) == 2 * LAYERS
    assert {attributes(node).get("interleaved", 0) for node in rotary} == {0}
    assert {len(node.input) for node in rotary} == {3}


def test_weights_are_used_as_they_are_stored(model: ModelProto, precision: str) -> None:
    """Linears are Transpose -> MatMul on the stored weight, and no weight is cast in the graph."""
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    readers = {name: {node.op_type for node in model.graph.node if name in node.input} for name in weights}
    for name, kinds in readers.items():
        expected = {"RMSNormalization"} if "norm" in name else {"Transpose"}
        assert kinds == expected | ({"Gather"} if "embed_tokens" in name else set()), name
    dtypes = {t.data_type for t in model.graph.initializer if t.name in weights}
    assert dtypes == {ONNX_DTYPES[precision]}


def test_onnx_checks_the_file_in_full(x_graphs: Callable[[str], Path], precision: str) -> None:
    """The checker accepts it with its external data, and strict shape inference agrees with the declared outputs."""
    path = x_graphs(precision) / "decoder.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    declared = describe(model.graph.output)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for (name, dtype, shape), (_, found_dtype, found_shape) in zip(
        declared, describe(inferred.graph.output), strict=True
    ):
        assert dtype == found_dtype, name
        assert len(shape) == len(found_shape), name
        constants_agree = [a == b for a, b in zip(shape, found_shape, strict=True) if isinstance(a, int)]
        assert all(constants_agree), (name, shape, found_shape)
        if name != "logits":
            assert shape == found_shape


def test_nothing_in_the_file_but_the_graph(x_graphs: Callable[[str], Path], x_root: Path, precision: str) -> None:
    """No metadata, doc strings, producer versions, paths of this machine or stack traces."""
    path = x_graphs(precision) / "decoder.onnx"
    model = load(path.parent)
    graph = model.graph
    assert not model.metadata_props
    assert not graph.metadata_props
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        assert not item.metadata_props, item.name
        assert not item.doc_string, item.name
    assert (model.doc_string, graph.doc_string, model.producer_version, model.domain) == ("", "", "", "")
    data = path.read_bytes()
    for text in (str(x_root), str(path.parent.parent), "site-packages", ".py", "pkg.torch", "/tmp", "/root", "/home"):
        assert text.encode() not in data, text
    assert len(data) < 100_000


def test_nodes_are_named_after_modules(model: ModelProto) -> None:
    """`layers.0.attn.q_proj/MatMul`: the module that made the node (none at the top), a slash, the operator."""
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for node in model.graph.node:
        module, _, operator = node.name.rpartition("/")
        assert MODULES.fullmatch(module), node.name
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", operator), node.name
    for expected in (
        *("tok_embeddings/Gather", "layers.0.attn.q_proj/MatMul", "layers.2.mlp.w2/MatMul", "output/MatMul"),
        *("layers.1.sa_norm/RMSNormalization", "norm/RMSNormalization", "layers.2.attn/Attention"),
        *("layers.0.mlp.activation/Sigmoid", "layers.0.mlp/Mul"),
    ):
        assert expected in names


def test_values_are_named_after_their_nodes(model: ModelProto) -> None:
    """What a node makes has the node's name, unless it is a graph output."""
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type != "TensorScatter" and node.output[0] not in outputs:
            assert node.output[0] == node.name


def test_tied_head_is_one_initializer(model: ModelProto) -> None:
    """The embedding table is stored once and read by the embedding and by the head."""
    names = [tensor.name for tensor in model.graph.initializer]
    assert names.count("model.embed_tokens.weight") == 1
    assert not [name for name in names if "lm_head" in name]
    readers = [node.name for node in model.graph.node if "model.embed_tokens.weight" in node.input]
    assert sorted(readers) == ["output/Transpose", "tok_embeddings/Gather"]


def test_untied_head_is_its_own_initializer(x_one_layer: Callable[..., Path]) -> None:
    """With tie_word_embeddings false the head reads lm_head.weight, and only that."""
    from safetensors.torch import load_file, save_file

    folder = x_one_layer("untied", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors")
    model = traced(folder)
    readers = {
        name: [node.name for node in model.graph if any(value and value.name == name for value in node.inputs)]
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    assert readers == {"model.embed_tokens.weight": ["tok_embeddings/Gather"], "lm_head.weight": ["output/Transpose"]}


def test_biases_become_adds(x_one_layer: Callable[..., Path]) -> None:
    """attention_bias and mlp_bias: each linear adds its own bias after its MatMul."""
    from safetensors.torch import load_file, save_file

    folder = x_one_layer("biased", attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    linears = [name for name in tensors if name.endswith("_proj.weight")]
    for name in linears:
        tensors[name.replace(".weight", ".bias")] = torch.randn(tensors[name].shape[0])
    save_file(tensors, folder / "model.safetensors")
    model = traced(folder)
    readers = {
        value.name: node
        for node in model.graph
        for value in node.inputs
        if value is not None and value.name and value.name.endswith(".bias")
    }
    assert sorted(readers) == sorted(name.replace(".weight", ".bias") for name in linears)
    for name, node in readers.items():
        assert node.op_type == "Add", name
        other = next(value for value in node.inputs if value is not None and value.name != name)
        assert other.producer().op_type == "MatMul", name


def test_external_data_is_what_the_safetensors_library_reads(x_graphs: Callable[[str], Path], precision: str) -> None:
    """Each weight initializer's location, offset and length give the bytes that the safetensors library returns."""
    folder = x_graphs(precision)
    model = load(folder)
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    data = (folder / "model.safetensors").read_bytes()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert sorted(tensor.name for tensor in external) == sorted(file.keys())
        for tensor in external:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where.keys() == {"location", "offset", "length"}
            assert where["location"] == "model.safetensors"
            begin, length = int(where["offset"]), int(where["length"])
            stored = file.get_tensor(tensor.name)
            assert list(tensor.dims) == list(stored.shape)
            assert data[begin : begin + length] == stored.view(torch.uint8).numpy().tobytes(), tensor.name


def test_small_constants_only_in_the_graph(model: ModelProto) -> None:
    """What is stored in the graph itself is the rotary frequencies and shapes of a few numbers; none is repeated."""
    inline = [tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    (frequencies,) = [tensor for tensor in inline if tensor.name.endswith("inv_freq")]
    assert re.fullmatch(r"layers\.\d\.attn\.pos_embeddings\.inv_freq", frequencies.name)  # which all layers share
    expected = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    found = torch.from_numpy(onnx.numpy_helper.to_array(frequencies).copy()).double()
    assert frequencies.data_type == TensorProto.FLOAT
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    others = [tensor for tensor in inline if tensor.name != frequencies.name]
    assert all(onnx.numpy_helper.to_array(tensor).size <= 4 for tensor in others)
    contents = [
        (tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes()) for tensor in others
    ]
    assert len(set(contents)) == len(contents)


def test_max_len_sets_the_capacity(x_one_layer: Callable[..., Path]) -> None:
    """--max-len is the constant third dimension of every cache tensor."""
    model = traced(x_one_layer(), max_len=77)
    shapes = {value.name: list(value.shape or ()) for value in (*model.graph.inputs, *model.graph.outputs)}
    cache = [shape for name, shape in shapes.items() if name.startswith(("past_", "present"))]
    assert len(cache) == 4
    assert all(shape[1:] == [KV_HEADS, 77, HEAD_DIM] for shape in cache)


def test_tracing_reads_no_weight(x_copy: Callable[..., Path]) -> None:
    """With the safetensors file deleted after its header was read, the graph is traced all the same."""
    folder = x_copy()
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    check_weights(family, config, checkpoint)
    (folder / "model.safetensors").unlink()
    model = lowered(family, config)
    weights = [value for name, value in model.graph.initializers.items() if name.startswith("model.")]
    assert len(weights) == len(checkpoint.tensors)
    assert all(value.const_value is None for value in weights)


def test_interleaved_pairs_reach_the_operator(x_one_layer: Callable[..., Path]) -> None:
    """A decoder whose rotary pairs are (0, 1), (2, 3), .. lowers to RotaryEmbedding(interleaved=1)."""
    model = traced(x_one_layer(), interleaved=True)
    rotary = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len(rotary) == 2
    assert {node.attributes["interleaved"].as_int() for node in rotary} == {1}


def test_manifest_repeats_the_graphs_interface(x_graphs: Callable[[str], Path], precision: str) -> None:
    """The signature in manifest.json is that of the file, read with onnx."""
    folder = x_graphs(precision)
    manifest = json.loads((folder / "manifest.json").read_text())
    signature = manifest["graphs"]["decoder"]["signature"]
    names = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT} | {
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
    }
    model = load(folder)
    for key, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        assert [(s["name"], names[s["dtype"]], s["shape"]) for s in signature[key]] == describe(values)
    assert signature["aliases"] == {
        f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    assert signature["limits"] == {"input_ids": VOCAB}
    dtype = FLOAT_TYPES[precision].dtype
    assert manifest["cache"] == {
        "steady_len": None,
        "max_len": MAX_LEN,
        "dtype": dtype,
        "tensors": [
            {"layer": layer, "name": name, "dtype": dtype, "shape": [KV_HEADS, MAX_LEN, HEAD_DIM], "slot_axis": 1}
            for layer in range(LAYERS)
            for name in ("key", "value")
        ],
    }


def traced(folder: Path, *, max_len: int = MAX_LEN, interleaved: bool = False) -> ir.Model:
    """The graph of a checkpoint, without weights."""
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    kind = config.layer_kinds["full_attention"]
    assert kind.rope is not None
    kind = dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, interleaved=interleaved))
    return lowered(family, dataclasses.replace(config, layer_kinds={"full_attention": kind}), max_len)


def lowered(family: Family, config: DecoderConfig, max_len: int = MAX_LEN) -> ir.Model:
    """The fp32 graph of a decoder, without weights."""
    layout = LAYOUTS["portable"]
    decoder = build_on_meta(config, torch.float32)
    cache = cache_spec(decoder, max_len, "float32")
    return trace(decoder, layout, layout.signature(config, cache, 8), cache, family.tensor_names(config), Quiet())
