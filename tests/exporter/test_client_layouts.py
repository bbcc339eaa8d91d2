"""The layouts for other clients: what their graphs and files are, and that they compute what transformers does."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from runtimes.artifact import open_artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError
from runtimes.runner import open_runner

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3, 4, 2, 32, 100
PROMPTS = [[1, 5, 9, 13, 21, 34], [1, 7, 2]]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Made:
    """Exports tiny_llama once for each layout, precision and client, without verification."""
    folders: dict[tuple[str, ...], Path] = {}

    def get(layout: str, precision: str = "fp32", client: str | None = None) -> Path:
        key = (layout, precision, str(client))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("client") / "out"
            request = ExportRequest(
                checkpoint=tiny_llama,
                out=folders[key],
                layout=layout,
                precision=precision,
                client=client,
                verify=False,
            )
            export(request)
        return folders[key]

    return get


def dims(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def names(pattern: str) -> list[str]:
    return [pattern.format(layer, part) for layer in range(LAYERS) for part in ("key", "value")]


def test_the_dynamic_graph_is_what_hugging_face_clients_feed(made: Made) -> None:
    model = onnx.load(made("dynamic") / "model.onnx", load_external_data=False)
    past = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_DIM]
    present = ["batch_size", KV_HEADS, "total_sequence_length", HEAD_DIM]
    assert dims(model.graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **dict.fromkeys(names("past_key_values.{}.{}"), past),
    }
    outputs = dims(model.graph.output)
    assert list(outputs) == ["logits", *names("present.{}.{}")]
    assert outputs["logits"] == ["batch_size", "sequence_length", VOCAB]
    assert all(outputs[name] == present for name in names("present.{}.{}"))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]


def test_the_genai_graph_has_onnx_runtimes_fused_operators(made: Made) -> None:
    model = onnx.load(made("genai", "int4:lm_head=int4") / "model.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["GroupQueryAttention"] == LAYERS
    assert (
        counts["SkipSimplifiedLayerNormalization"] == 2 * LAYERS - 1
    )  # not of the embedding, nor of the chosen tokens
    assert counts["MatMulNBits"] == 4 * LAYERS + 1  # qkv, output, gate and up, down; head
    assert not {"MatMul", "DequantizeLinear", "TensorScatter", "RotaryEmbedding", "Attention"} & counts.keys()
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    assert attention.input[1] == attention.input[2] == ""  # queries, keys and values in one
    assert dims(model.graph.output)["logits"] == ["batch_size", 1, VOCAB]
    assert "logit_indices" in {initializer.name for initializer in model.graph.initializer}  # so it may be left out


def greedy_ids(checkpoint: Path, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """transformers' own, row by row, ends of texts included."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chosen = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        chosen.append(ids[len(prompt) :])
    return chosen


def test_a_client_that_pads_on_the_left(made: Made, tiny_llama: Path) -> None:
    """A loop over the dynamic graph as transformers and Optimum make it: left padding, masks and positions of it."""
    session = onnxruntime.InferenceSession(made("dynamic") / "model.onnx", providers=["CPUExecutionProvider"])
    longest, rows, steps = max(map(len, PROMPTS)), len(PROMPTS), 20
    ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS], np.int64)
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS], np.int64)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    past = {name: np.zeros((rows, KV_HEADS, 0, HEAD_DIM), np.float32) for name in names("past_key_values.{}.{}")}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected = model(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(positions)).logits
    fed: list[list[int]] = [list(prompt) for prompt in PROMPTS]
    for step in range(steps):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = session.run(None, feeds)
        if step == 0:
            for row, prompt in enumerate(PROMPTS):
                ours, theirs = logits[row, -len(prompt) :], expected[row, -len(prompt) :].detach().numpy()
                np.testing.assert_allclose(ours, theirs, atol=2e-4)
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1:].argmax(axis=-1)
        for row, token in enumerate(ids[:, 0].tolist()):
            fed[row].append(token)
        mask = np.concatenate((mask, np.ones((rows, 1), np.int64)), axis=1)
        positions = positions[:, -1:] + 1
    assert [row[len(prompt) :] for row, prompt in zip(fed, PROMPTS, strict=True)] == greedy_ids(
        tiny_llama, PROMPTS, steps
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4", "int8:block=32"])
def test_every_layout_chooses_the_same_tokens(made: Made, precision: str) -> None:
    """In float32, so that only the graph can differ; a ragged batch, and rows that end before others."""
    logits = {}
    for layout in ("portable", "dynamic", "genai"):
        with open_runner(open_artifact(made(layout, precision)), device="cpu", in_float32=True) as runner:
            decoding = Decoding(runner)
            found = [decoding.prefill(PROMPTS)]
            for step in range(12):
                tokens = found[-1].argmax(axis=-1)
                found.append(decoding.decode(tokens, np.array([True, step < 6])))
            logits[layout] = np.stack([step[0] for step in found] + [step[1] for step in found[:7]])
    for layout in ("dynamic", "genai"):
        np.testing.assert_allclose(logits[layout], logits["portable"], atol=1e-3)


def test_genai_config_says_what_the_checkpoint_does(made: Made, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    for layout, shared in (("dynamic", False), ("genai", True)):
        written = json.loads((made(layout) / "genai_config.json").read_text())
        model = written["model"]
        assert (model["type"], model["vocab_size"]) == ("llama", config["vocab_size"])
        assert (model["bos_token_id"], model["eos_token_id"]) == (config["bos_token_id"], config["eos_token_id"])
        assert model["context_length"] == written["search"]["max_length"] == 128
        assert written["search"]["past_present_share_buffer"] is shared
        decoder = model["decoder"]
        assert (decoder["head_size"], decoder["num_key_value_heads"]) == (HEAD_DIM, KV_HEADS)
        asked = set(decoder["inputs"]) - {"past_key_names", "past_value_names"}
        inputs = onnxruntime.InferenceSession(made(layout) / "model.onnx").get_inputs()
        assert asked == {value.name for value in inputs if not value.name.startswith("past")}


@pytest.mark.parametrize(
    ("precision", "suffix"),
    [("fp32", ""), ("fp16", "_fp16"), ("int8", "_int8"), ("int4", "_q4"), ("int4:dtype=fp16", "_q4f16")],
)
def test_files_have_the_names_that_transformers_js_looks_for(made: Made, precision: str, suffix: str) -> None:
    folder = made("dynamic", precision, "transformers-js")
    graph = f"model{suffix}.onnx"
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [graph, f"{graph}_data"]
    assert not list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.onnx"))
    config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert config["use_external_data_format"] == {graph: 1}
    model = onnx.load(folder / "onnx" / graph, load_external_data=False)
    locations = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    assert locations == {f"{graph}_data"}
    assert open_artifact(folder).manifest.graphs["decoder"].file == f"onnx/{graph}"


def test_transformers_js_finds_the_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    """It looks into tokenizer_config.json only."""
    shutil.copytree(tiny_llama, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{{ messages[0].content }} é")
    request = ExportRequest(
        checkpoint=tmp_path / "checkpoint",
        out=tmp_path / "out",
        layout="dynamic",
        client="transformers-js",
        verify=False,
    )
    export(request)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    original = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    assert written == original | {"chat_template": "{{ messages[0].content }} é"}


def test_a_renamed_artifact_is_checked_and_verified_as_any(made: Made, x_run: Callable[..., Any]) -> None:
    folder = made("dynamic", "fp16", "transformers-js")
    ran = x_run("verify", folder, "--quiet")
    assert ran.code == 0, ran.err
    assert "parity passed" in ran.out
    data = folder / "onnx" / "model_fp16.onnx_data"
    original = data.read_bytes()
    try:
        data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=r"onnx/model_fp16.onnx_data has changed since the export"):
            open_artifact(folder)
    finally:
        data.write_bytes(original)


def test_a_file_of_the_users_beside_renamed_ones_is_not_lost(tiny_llama: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        checkpoint=tiny_llama,
        out=tmp_path / "out",
        layout="dynamic",
        client="transformers-js",
        verify=False,
        force=True,
    )
    export(request)
    export(request)  # replaces its own files
    (tmp_path / "out" / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds what no export made, and would be lost: onnx/notes.txt"):
        export(request)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": "optimum"}, "--client 'optimum' is not supported; supported: transformers-js"),
        ({"client": "transformers-js"}, "--client transformers-js needs --layout dynamic, got portable"),
        (
            {"client": "transformers-js", "layout": "dynamic", "precision": "bf16"},
            "--client transformers-js: it has no name for precision bf16, computed in bf16; it knows fp32, fp16",
        ),
        (
            {"client": "transformers-js", "layout": "dynamic", "weights": "reference"},
            "--client transformers-js gives the weights' files other names: use --weights copy",
        ),
        ({"layout": "genai", "targets": ("tensorrt-rtx",)}, "target tensorrt-rtx needs --layout portable, got genai"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path) -> None:
    reference = changes.get("weights") == "reference"
    request = ExportRequest(checkpoint=tiny_llama, out=tiny_llama if reference else tmp_path / "out", **changes)
    with pytest.raises(ExportError) as caught:
        export(request)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["dynamic", "genai"])
def test_models_with_eyes_need_the_portable_layout(layout: str, tiny_vision: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"--layout {layout} is for models that read text only"):
        export(ExportRequest(checkpoint=tiny_vision, out=tmp_path / "out", layout=layout))


def test_the_genai_layout_has_no_gaps(made: Made) -> None:
    feeds = {
        "input_ids": np.array([[1, 5]]),
        "position_ids": np.array([[4, 5]]),
        "write_indices": np.array([4]),
        "attention_mask": np.array([[0, 0, 0, 0, 1, 1]]),
        "logit_indices": np.array([[1]]),
    }
    with open_runner(open_artifact(made("genai"))) as runner:
        runner.reset(1)
        with pytest.raises(FeedError, match="hides no slots of a row: attention_mask must be 1 from slot 0 on"):
            runner.step(feeds)
        shifted = feeds | {"write_indices": np.array([0]), "attention_mask": np.ones((1, 2), np.int64)}
        with pytest.raises(FeedError, match="takes a token's slot as its position"):
            runner.step(shifted)
