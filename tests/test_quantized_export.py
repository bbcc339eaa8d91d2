"""Exports with quantized weights, whole: what is stored, what runtimes compute with it, and what is said of it.

Truths: docs/formats.md read by numpy alone (`numbers_of`), transformers' own models with those numbers in them, and the
gguf package's dequantization.
"""

import dataclasses
import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import gguf_cases
import ml_dtypes
import mllama_cases
import numpy as np
import onnx
import packed_cases
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, ExportResult, export
from exporter.progress import Quiet
from exporter.quality import TASKS_FILE
from exporter.verify import verify_artifact
from graphs.checkpoint import open_checkpoint
from graphs.errors import CheckpointError
from runtimes.artifact import Artifact, file_entry, open_artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError
from runtimes.generation import generate, read_stop_ids
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer
from runtimes.verification import artifact_targets

PROMPTS = [[1, 16, 21, 13, 19, 24, 31], [1, 87, 81, 84, 86, 3, 21, 18, 31]]
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed")


def run(checkpoint: Path, out: Path, precision: str | None, **options: Any) -> ExportResult:
    return export(ExportRequest(checkpoint=checkpoint, out=out, precision=precision, **options))


def failures(result: ExportResult) -> list[Any]:
    assert result.parity is not None
    return [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]


def numbers_of(folder: Path) -> dict[str, np.ndarray]:
    """{name: float64 [N, K] or as it is} of an artifact's model.safetensors, as docs/formats.md describes it."""
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    described = json.loads(header.pop("__metadata__").get("export_llm.quantization", "{}"))
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "U8": np.uint8}
    types["F8_E4M3"] = ml_dtypes.float8_e4m3fn
    arrays = {}
    for name, entry in header.items():
        first, end = (8 + size + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[first:end], types[entry["dtype"]]).reshape(entry["shape"])
    for name, entry in described.items():
        outputs, inputs = entry["shape"]
        codes = arrays[name]
        if entry["format"] in ("int4", "nvfp4"):
            codes = np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(-1)[: outputs * inputs]
            values = codes.astype(np.int64)
            values = np.where(values > 7, values - 16, values)
            if entry["format"] == "nvfp4":
                values = codes.view(ml_dtypes.float4_e2m1fn)
            codes = values.reshape(inputs, outputs)
        block = entry["block"] or inputs
        scales = arrays.pop(f"{name}_scale").astype(np.float64).reshape(inputs // block, outputs)
        if entry["format"] == "nvfp4":
            scales = scales * float(arrays.pop(f"{name}_scale_2"))
        zeros = np.zeros_like(scales)
        if entry["zero_points"]:
            packed = arrays.pop(f"{name}_zero_point")
            if entry["format"] == "int4":
                nibbles = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(-1)[: zeros.size].astype(np.int64)
                packed = np.where(nibbles > 7, nibbles - 16, nibbles)
            zeros = packed.astype(np.float64).reshape(zeros.shape)
        weight = (codes.astype(np.float64) - zeros.repeat(block, axis=0)) * scales.repeat(block, axis=0)
        arrays[name] = weight.T
        if "joined" in entry:  # outputs of several weights, one after the other
            parts = np.split(arrays.pop(name), np.cumsum(list(entry["joined"].values()))[:-1])
            arrays |= dict(zip(entry["joined"], parts, strict=True))
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def theirs(config: Path, weights: dict[str, np.ndarray]) -> transformers.PreTrainedModel:
    """transformers' Llama in float64 with these weights."""
    settings = transformers.AutoConfig.from_pretrained(config, attn_implementation="eager")
    settings.dtype = settings.torch_dtype = torch.float64
    model = transformers.AutoModelForCausalLM.from_config(settings).double().eval()
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    model.tie_weights()
    return model


def their_logits(model: transformers.PreTrainedModel, prompt: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].numpy()


def exact_runner(artifact: Artifact) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner.open(artifact, device="cpu", in_float32=True)


@pytest.mark.parametrize(
    "precision",
    [
        "int8",
        "int8:block=32",
        "int4",
        "int4:block=128,embed=fp32",
        "int4:lm_head=fp32,model.layers.1.*=int8,model.layers.2.mlp.down_proj=fp16",
        "fp8",
        "nvfp4",
        "int4:dtype=bf16",
        "nvfp4:dtype=fp16",
        "fp16:lm_head=int8",
    ],
)
def test_what_is_stored_is_what_is_computed(precision: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Parity passes; and ONNX Runtime, computing in float32, gives the logits of transformers in float64 with the
    numbers that docs/formats.md finds in the file."""
    result = run(tiny_llama, tmp_path / "out", precision)
    assert failures(result) == []
    assert result.parity is not None
    assert len(result.parity.reports) == 3  # the weights, ONNX Runtime as it is used, and in float32
    artifact = open_artifact(tmp_path / "out")
    model = theirs(tmp_path / "out", numbers_of(tmp_path / "out"))
    with exact_runner(artifact) as runner:
        ours = Decoding(runner).prefill(PROMPTS)
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        np.testing.assert_allclose(logits, their_logits(model, prompt), atol=2e-4, rtol=0)
    onnx_model = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    assert {opset.domain for opset in onnx_model.opset_import} == {""}


def test_overrides_decide_what_is_stored(tiny_llama: Path, tmp_path: Path) -> None:
    precision = "int4:lm_head=fp32,embed=fp32,model.layers.1.*=int8,model.layers.2.mlp.*=fp16"
    run(tiny_llama, tmp_path / "out", precision, verify=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    kinds = {name: str(tensor.format) for name, tensor in checkpoint.packed.items()}
    kinds |= {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "int4/32"
    assert kinds["model.layers.1.self_attn.v_proj.weight"] == "int8"
    assert kinds["model.layers.2.mlp.up_proj.weight"] == "F16"
    assert kinds["model.layers.2.self_attn.v_proj.weight"] == "int4/32"
    assert kinds["model.layers.1.input_layernorm.weight"] == "F32"  # a pattern over matrices leaves norms alone
    assert kinds["model.embed_tokens.weight"] == "F32"
    assert "lm_head.weight" not in kinds  # it stays tied


def test_a_pattern_that_matches_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.layer\.\* matches no matrix .* such as lm_head, model\.layers\.0"):
        run(tiny_llama, tmp_path / "out", "int4:model.layer.*=int8", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_becomes_one_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """Where head and embedding are stored in two ways, config.json says so, and the artifact is a checkpoint still."""
    run(tiny_llama, tmp_path / "int8", "int8", verify=False)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    original = json.loads((tiny_llama / "config.json").read_text())
    assert original.pop("tie_word_embeddings") is True
    assert config == original
    again = run(tmp_path / "int8", tmp_path / "again", None)
    assert again.manifest.precision == "stored"
    assert failures(again) == []
    first, second = numbers_of(tmp_path / "int8"), numbers_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first if "embed" not in name)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8", "nvfp4"])
def test_the_same_export_writes_the_same_bytes(precision: str, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny_llama, tmp_path / name, precision, verify=False)
    for file in ("model.safetensors", "decoder.onnx", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("precision", "most_lost"), [("int8", 0.01), ("int4", 0.03), ("fp8", 0.01), ("nvfp4", 0.03)])
def test_the_tiny_model_still_answers(
    precision: str, most_lost: float, tiny_llama: Path, tmp_path: Path, load_tasks: Callable[[Path], ModuleType]
) -> None:
    """Exact-match scores through ONNX Runtime as it runs by default, activations in 8 bits included."""
    tasks = load_tasks(tiny_llama)
    run(tiny_llama, tmp_path / "out", precision, verify=False)
    artifact = open_artifact(tmp_path / "out")
    tokenizer, stop_ids = Tokenizer(artifact.folder), read_stop_ids(artifact.folder)
    with open_runner(artifact, "onnxruntime", device="cpu") as runner:

        def answer(prompts: list[str]) -> list[str]:
            texts = []
            for start in range(0, len(prompts), 8):
                rows = [tokenizer.encode(prompt) for prompt in prompts[start : start + 8]]
                result = generate(runner, rows, tasks.MAX_ANSWER_CHARS + 1, stop_ids=stop_ids)
                texts += [tokenizer.decode(ids) for ids in result.token_ids]
            return texts

        scores = tasks.score(answer, count=200)
    assert all(score >= 0.995 - most_lost for score in scores.values()), scores


# ---- quality


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def test_the_quality_report_by_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Every figure from transformers' logits in float64, with the original and with the stored numbers."""
    text = tmp_path / "text.txt"
    lines = ["27+58=85", "sort 52914=12459", "reverse planet=tenalp", "sort 7=7", "99+1=100", "reverse oak=kao"] * 40
    text.write_text("\n".join(lines))
    result = run(tiny_llama, tmp_path / "out", "int4", eval_text=text)
    assert result.parity is not None
    quality = result.parity.quality
    assert quality is not None
    ids = Tokenizer(tiny_llama).encode(text.read_text())[1 : 16 * 63 + 1]
    rows = np.pad(np.array(ids).reshape(16, 63), ((0, 0), (1, 0)), constant_values=1)  # every row begins with <s>
    assert (quality.tokens, quality.text) == (1024, "text.txt")
    original = {name: tensor.double().numpy() for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    models = [theirs(tiny_llama, original), theirs(tmp_path / "out", numbers_of(tmp_path / "out"))]
    with torch.no_grad():
        p, q = (model(torch.from_numpy(rows)).logits.numpy() for model in models)
    divergence = kl(p, q)
    assert quality.kl_mean == pytest.approx(divergence.mean(), rel=1e-3)
    assert quality.kl_p999 == pytest.approx(np.percentile(divergence, 99.9), rel=1e-3)
    assert quality.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2e-3)
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(logits[:, :-1].reshape(-1, 100)), torch.from_numpy(rows[:, 1:].ravel())
        )
        for logits in (p, q)
    ]
    assert quality.perplexity_original == pytest.approx(float(losses[0].exp()), rel=1e-3)
    assert quality.perplexity_stored == pytest.approx(float(losses[1].exp()), rel=1e-3)
    assert [layer.layer for layer in quality.worst_layers] != []
    weights = sum(array.size for array in numbers_of(tmp_path / "out").values())
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert quality.bytes_per_weight * weights == pytest.approx(size, rel=0.03)  # its header is not counted
    assert {name: task.problems for name, task in quality.tasks.items()} == {"add": 200, "sort": 200, "reverse": 200}
    assert all(task.original >= 0.99 for task in quality.tasks.values())
    stored = json.loads((tmp_path / "out" / "parity.json").read_text())["quality"]
    assert stored == json.loads(json.dumps(quality.to_dict()))


def test_task_scores_are_what_greedy_decoding_answers(tiny_llama: Path, tmp_path: Path) -> None:
    """A model that is damaged enough to be wrong often: its scores are those of transformers' generate."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_llama, checkpoint)
    lines = (tiny_llama / TASKS_FILE).read_text().splitlines()[::12]
    (checkpoint / TASKS_FILE).write_text("\n".join(lines))
    weights = load_file(checkpoint / "model.safetensors")
    torch.manual_seed(0)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.12 * torch.randn_like(weights[name])
    save_file(weights, checkpoint / "model.safetensors")
    result = run(checkpoint, tmp_path / "out", "int4")
    assert result.parity is not None
    assert result.parity.quality is not None
    tokenizer = Tokenizer(checkpoint)
    problems = [json.loads(line) for line in lines]
    originals = {name: tensor.double().numpy() for name, tensor in weights.items()}
    for of_model, numbers, folder in (
        ("original", originals, checkpoint),
        ("stored", numbers_of(tmp_path / "out"), tmp_path / "out"),
    ):
        model = theirs(folder, numbers)
        right: dict[str, list[bool]] = {}
        for problem in problems:
            prompt = tokenizer.encode(problem["prompt"])
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=2)[0].tolist()
            answer = ids[len(prompt) :]
            right.setdefault(problem["task"], []).append(
                answer[-1] == 2 and tokenizer.decode(answer) == problem["answer"]
            )
        scores = {task: getattr(score, of_model) for task, score in result.parity.quality.tasks.items()}
        assert scores == {task: pytest.approx(np.mean(answers)) for task, answers in right.items()}
        assert min(scores.values()) < 1


def test_a_precision_that_loses_nothing_has_no_report(tiny_llama: Path, tmp_path: Path) -> None:
    result = run(tiny_llama, tmp_path / "out", "fp32")
    assert result.parity is not None
    assert result.parity.quality is None
    rounded = run(tiny_llama, tmp_path / "fp16", "fp16")
    assert rounded.parity is not None
    assert rounded.parity.quality is not None
    assert 0 < rounded.parity.quality.kl_mean < 1e-6


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe", "is not text in UTF-8"), (b"", "holds 0 tokens: too little"), (None, "cannot be read")],
)
def test_text_that_cannot_be_used(content: bytes | None, words: str, tiny_llama: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ExportError, match=words):
        run(tiny_llama, tmp_path / "out", "int4", eval_text=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


def test_tasks_that_are_damaged(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / TASKS_FILE).write_text('{"task": "add", "prompt": "1+1="}\n')
    with pytest.raises(ExportError, match=r"tasks\.jsonl, line 1: expected"):
        run(tmp_path / "checkpoint", tmp_path / "out", "int4")


# ---- parity that bites


@pytest.fixture(scope="module")
def int4_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    run(tiny_llama, out, "int4", verify=False)
    return out


def verify_again(folder: Path, reference: Path | None = None) -> list[str]:
    """Rungs that fail."""
    artifact = open_artifact(folder, check_hashes=False)
    summary = verify_artifact(artifact, artifact_targets(artifact, "cpu"), reference)
    return [rung.name for report in summary.reports for rung in report.rungs if not rung.passed]


def test_an_unchanged_artifact_passes(int4_artifact: Path, tiny_llama: Path) -> None:
    assert verify_again(int4_artifact) == []
    assert verify_again(int4_artifact, tiny_llama) == []


def change_scales(tensors: dict[str, Tensor], name: str) -> None:
    """Scales shifted by one block."""
    tensors[f"{name}_scale"] = tensors[f"{name}_scale"].roll(1, dims=0)


def change_one_code(tensors: dict[str, Tensor], name: str) -> None:
    """One bit of one code: 1 of 32,768 weights is off by 8 steps."""
    tensors[name] = tensors[name].clone()
    tensors[name][100] ^= 8


def swap_nibbles(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = (tensors[name] >> 4) | (tensors[name] << 4)


@pytest.mark.parametrize("change", [change_scales, change_one_code, swap_nibbles])
def test_stored_weights_that_are_not_the_checkpoints(
    change: Callable[[dict[str, Tensor], str], None], int4_artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Graph and weights agree, so only a comparison with the checkpoint can tell."""
    folder = tmp_path / "changed"
    shutil.copytree(int4_artifact, folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    change(tensors, name)
    with path.open("r+b") as file:
        for part in (name, f"{name}_scale"):
            file.seek(8 + size + header[part]["data_offsets"][0])
            file.write(tensors[part].contiguous().numpy().tobytes())
    assert "weights in int4/32" in verify_again(folder, tiny_llama)


def shift_block_size(model: onnx.ModelProto) -> None:
    """Scales of one matrix are read from another of the same shape."""
    node = next(node for node in model.graph.node if node.name == "layers.1.mlp.gate_up_proj/DequantizeLinear")
    node.input[1] = node.input[1].replace("layers.1", "layers.0")


def other_codes(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.name == "layers.1.mlp.w2/DequantizeLinear")
    node.input[0] = node.input[0].replace("layers.1", "layers.2")


@pytest.mark.parametrize("change", [shift_block_size, other_codes])
def test_a_graph_that_reads_other_scales_or_codes(
    change: Callable[[onnx.ModelProto], None], int4_artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(int4_artifact, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    change(model)
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    manifest = open_artifact(int4_artifact).manifest
    files = {**manifest.files, "decoder.onnx": file_entry(folder / "decoder.onnx")}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    assert "prefill logits" in verify_again(folder)


def test_another_model_is_refused_as_reference(int4_artifact: Path, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="differ in norm_eps"):
        verify_again(int4_artifact, tmp_path / "other")


# ---- checkpoints that are quantized already


def to_gguf(folder: Path, out: Path, kind: gguf.GGMLQuantizationType) -> Path:
    config, weights = gguf_cases.read_folder(folder)
    plain = gguf.GGMLQuantizationType.F32
    return gguf_cases.convert(out, config, weights, type_of=lambda name: plain if "norm" in name else kind)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_gguf_equals_its_dequantization(kind: str, precision: str | None, tiny_llama: Path, tmp_path: Path) -> None:
    """ONNX Runtime in float32 against transformers in float64 with what the gguf package dequantizes."""
    path = to_gguf(tiny_llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    result = run(path, tmp_path / "out", precision if kind != "F16" else "fp32")
    assert failures(result) == []
    assert result.parity is not None
    assert result.parity.quality is None  # nothing was rounded
    numbers = gguf_cases.dequantized(path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    weights = {}
    for name in load_file(tiny_llama / "model.safetensors"):
        array = numbers[table.get_name(name, try_suffixes=(".weight",))].double().numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # llama.cpp's rows back into Hugging Face's order
                array = array.reshape(heads, 16, 2, 128).swapaxes(1, 2).reshape(array.shape)
        weights[name] = array
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = theirs(tiny_llama, weights)
    with exact_runner(open_artifact(tmp_path / "out")) as runner:
        ours = Decoding(runner).prefill(PROMPTS)
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        np.testing.assert_allclose(logits, their_logits(model, prompt), atol=2e-4, rtol=0)
    assert config["model_type"] == "llama"
    # codes of a tied matrix are kept where it multiplies; as floats it serves both uses
    assert config["tie_word_embeddings"] is (precision == "fp32" or kind == "F16")
    if precision is None and kind != "F16":
        assert result.manifest.quantization is not None
        assert result.manifest.quantization["quantizer"] == "none: the checkpoint's own codes"


def test_q4_1_has_no_exact_form(tiny_llama: Path, tmp_path: Path) -> None:
    path = to_gguf(tiny_llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_1)
    with pytest.raises(ExportError, match=r"cannot express .* \(GGUF Q4_1: its blocks have a minimum.* --requantize"):
        run(path, tmp_path / "out", None)
    again = run(path, tmp_path / "out", "int4", requantize=True)
    assert failures(again) == []
    assert again.parity is not None
    assert again.parity.quality is not None
    assert 0 < again.parity.quality.kl_mean < 1
    floats = run(path, tmp_path / "floats", "fp32")
    assert failures(floats) == []


@needs_rtx
def test_engines_take_q4_0_as_int8(tiny_llama: Path, tmp_path: Path) -> None:
    path = to_gguf(tiny_llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0)
    with pytest.raises(ExportError, match=r"takes no scales below 0, .* --precision int8, which expresses"):
        run(path, tmp_path / "out", None, targets=("tensorrt-rtx",))
    result = run(path, tmp_path / "out", "int8", targets=("tensorrt-rtx",))
    assert failures(result) == []
    assert result.parity is not None
    assert result.parity.quality is None  # 8 bits express every weight of 4
    run(path, tmp_path / "int4", None, verify=False)
    eight, four = numbers_of(tmp_path / "out"), numbers_of(tmp_path / "int4")
    assert all(np.array_equal(eight[name], four[name]) for name in eight if "embed" not in name)


def quantized_llama(folder: Path, tiny_llama: Path, method: str, **changes: Any) -> Path:
    """The tiny Llama with its matrices packed as a library packs them; zeros of 4 bits differ from group to group."""
    tensors = {name: tensor.half() for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    config = json.loads((tiny_llama / "config.json").read_text())
    rng = np.random.default_rng(0)
    for name in list(tensors):
        if "proj" in name:
            weight = tensors.pop(name).double().numpy()
            groups = weight.reshape(len(weight), -1, 32)
            low, high = groups.min(axis=-1), groups.max(axis=-1)
            scales = np.maximum((high - low) / 15, 1e-4).astype(np.float16)
            zeros = np.clip(np.rint(-low / scales), 1, 15).astype(np.int64)
            codes = np.clip(np.rint(groups / scales[..., None].astype(np.float64)) + zeros[..., None], 0, 15)
            order = np.arange(weight.shape[1]) // 32
            if changes.get("desc_act"):
                order = rng.permutation(order)
            layer = packed_cases.Layer(
                bits=4,
                codes=codes.reshape(weight.shape).astype(np.int64),
                zeros=zeros,
                scales=torch.from_numpy(scales),
                groups=order,
            )
            pack = {"gptq": packed_cases.pack_gptq, "awq": packed_cases.pack_awq}[method]
            tensors |= packed_cases.named(name.removesuffix(".weight"), pack(layer))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": method, "bits": 4, "group_size": 32, **changes}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(tiny_llama / file, folder)
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_of_gptq_and_awq_are_taken_over(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path / "checkpoint", tiny_llama, method)
    result = run(checkpoint, tmp_path / "out", None)
    assert failures(result) == []
    assert result.parity is not None
    assert result.parity.quality is None
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    opened, stored = open_checkpoint(checkpoint), numbers_of(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(stored[name], opened.packed[name].dequantize(torch.float64).numpy())
    model = theirs(tmp_path / "out", stored)
    with exact_runner(open_artifact(tmp_path / "out")) as runner:
        ours = Decoding(runner).prefill(PROMPTS)
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        np.testing.assert_allclose(logits, their_logits(model, prompt), atol=2e-4, rtol=0)


@needs_rtx
def test_engines_take_no_zero_points_but_their_int8(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path / "checkpoint", tiny_llama, "awq")
    with pytest.raises(ExportError, match=r"takes no zero points, .* --precision int8"):
        run(checkpoint, tmp_path / "out", "int4", targets=("tensorrt-rtx",))
    result = run(checkpoint, tmp_path / "out", "int8", targets=("tensorrt-rtx",))
    assert failures(result) == []
    opened, stored = open_checkpoint(checkpoint), numbers_of(tmp_path / "out")
    for name in opened.packed:
        assert np.array_equal(stored[name], opened.packed[name].dequantize(torch.float64).numpy())


def test_act_order_is_refused_or_rounded_again(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = quantized_llama(tmp_path / "checkpoint", tiny_llama, "gptq", desc_act=True)
    with pytest.raises(ExportError, match=r"cannot express 21 weights exactly, such as .*GPTQ.* --requantize"):
        run(checkpoint, tmp_path / "out", None)
    assert failures(run(checkpoint, tmp_path / "out", "int4", requantize=True)) == []


def test_requantize_needs_something_to_requantize(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no quantized weights"):
        run(tiny_llama, tmp_path / "out", "int4", requantize=True)


def test_another_quantization_method_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "checkpoint")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='"hqq" is not supported; supported: gptq, awq'):
        run(tmp_path / "checkpoint", tmp_path / "out", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.update(format="int5"),
        lambda entry: entry.update(block=-32),
        lambda entry: entry.update(block=48),
        lambda entry: entry.update(shape=[128]),
        lambda entry: entry.update(shape=[1 << 40, 1 << 40]),
        lambda entry: entry.update(zero_points=True),
        lambda entry: entry.pop("block"),
    ],
)
def test_damaged_descriptions_are_refused(
    damage: Callable[[dict[str, Any]], Any], int4_artifact: Path, tmp_path: Path
) -> None:
    raw = (int4_artifact / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    described = json.loads(header["__metadata__"]["export_llm.quantization"])
    damage(described["model.layers.1.mlp.down_proj.weight"])
    header["__metadata__"]["export_llm.quantization"] = json.dumps(described)
    text = json.dumps(header).encode()
    shutil.copytree(int4_artifact, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(CheckpointError, match=r"quantized weight model\.layers\.1\.mlp\.down_proj\.weight is damaged"):
        open_checkpoint(tmp_path / "checkpoint")


# ---- vision


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_vision_is_quantized_as_well(precision: str, tmp_path: Path) -> None:
    checkpoint = mllama_cases.save(next(iter(mllama_cases.CASES.values())).make_model(), tmp_path / "checkpoint")
    result = run(checkpoint, tmp_path / "out", precision, targets=("tensorrt-rtx",) if HAS_RTX else ("onnx",))
    assert failures(result) == []
    packed = open_checkpoint(tmp_path / "out").packed
    assert any(name.startswith("vision_model.") for name in packed)
    assert any("cross_attn.k_proj" in name for name in packed)


# ---- calibrated methods


def kl_mean(result: ExportResult) -> float:
    assert result.parity is not None
    assert result.parity.quality is not None
    return result.parity.quality.kl_mean


@pytest.mark.parametrize("quantizer", ["mse", "gptq", "awq"])
def test_every_quantizer_goes_the_whole_way(quantizer: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Parity passes, the rounding is better than to nearest, and nothing but the artifact is left."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{a}+{b}={a + b}\nsort {b}{a}=" for a in range(100) for b in range(30)))
    calibration = None if quantizer == "mse" else text
    result = run(tiny_llama, tmp_path / "out", "int4", quantizer=quantizer, calibration=calibration)
    assert failures(result) == []
    assert result.manifest.quantization is not None
    assert result.manifest.quantization["quantizer"] == quantizer
    assert kl_mean(result) < 0.6 * kl_mean(run(tiny_llama, tmp_path / "rtn", "int4"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "rtn", "text.txt"}
    with exact_runner(open_artifact(tmp_path / "out")) as runner:
        ours = Decoding(runner).prefill(PROMPTS)
    model = theirs(tmp_path / "out", numbers_of(tmp_path / "out"))
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        np.testing.assert_allclose(logits, their_logits(model, prompt), atol=2e-4, rtol=0)


@pytest.mark.slow
def test_gptq_has_at_most_half_the_divergence_of_rounding(shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    """On a trained model, calibrated on text that the model makes up, measured on other such text."""
    checkpoint = shared_model("stories15m-llama")
    results = {
        quantizer: run(checkpoint, tmp_path / quantizer, "int4", quantizer=quantizer) for quantizer in ("rtn", "gptq")
    }
    assert all(failures(result) == [] for result in results.values())
    assert kl_mean(results["gptq"]) <= kl_mean(results["rtn"]) / 2


class StopsAt(Quiet):
    """Raises KeyboardInterrupt when a stage begins."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.stages: list[str] = []

    def start(self, stage: str, total: int | None = None) -> None:
        self.stages.append(stage)
        if stage.startswith(self.stage):
            raise KeyboardInterrupt


def test_a_stopped_calibration_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{a}+{b}={a + b}" for a in range(100) for b in range(50)))

    def request(out: str) -> ExportRequest:
        return ExportRequest(
            checkpoint=tiny_llama,
            out=tmp_path / out,
            precision="int4",
            quantizer="gptq",
            calibration=text,
            verify=False,
        )

    export(request("whole"))
    with pytest.raises(KeyboardInterrupt) as stopped:
        export(request("out"), StopsAt("calibrate: layer 3"))
    kept = tmp_path / ".out.calibration"
    assert kept.is_dir()
    assert any(f"kept in {kept}" in note for note in stopped.value.__notes__)
    assert not (tmp_path / "out").exists()
    seen = StopsAt("no such stage")
    export(request("out"), seen)
    layers = [stage for stage in seen.stages if stage.startswith("calibrate: layer")]
    assert layers == ["calibrate: layer 3 of 3"]
    assert not kept.exists()
    for file in ("model.safetensors", "decoder.onnx"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantizer": "gguf"}, "'gguf' is not supported; supported: rtn, mse, gptq, awq"),
        ({"calibration": Path("text")}, "--calibration is for --quantizer gptq, awq; rtn looks at weights alone"),
        ({"quantizer": "gptq", "calibration": Path("nowhere.txt")}, "nowhere.txt cannot be read"),
    ],
)
def test_quantizers_that_cannot_be_used(options: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        run(tiny_llama, tmp_path / "out", "int4", **options)
    assert list(tmp_path.iterdir()) == []
