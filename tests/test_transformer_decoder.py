"""Every attention variant, position, norm and MLP as a decoder of its own: exported, verified, built, documented.

The maths is checked against plain loops in tests/graphs/; here a checkpoint with each of them goes the whole way.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, ExportResult, export
from exporter.precision import cache_spec
from exporter.progress import Quiet
from exporter.stateless import STATELESS_FILE, export_stateless
from exporter.targets.tensorrt import build_engine
from graphs.attention import ATTENTION
from graphs.attention.linformer import LinformerAttention
from graphs.build import build_decoder
from graphs.checkpoint import open_checkpoint
from graphs.errors import CheckpointError
from graphs.families import FAMILIES, find_family
from graphs.loading import load_decoder
from runtimes.decoding import Decoding
from runtimes.eager_runner import EagerRunner

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "model_type": "transformer_decoder",
    "vocab_size": 70,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
DECODERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding_window": {"attention": ["causal", "sliding_window"], "sliding_window": 20},
    "alibi": {"attention": "alibi"},
    "sparse_top_k": {"attention": "sparse_top_k", "attention_top_k": 4, "position_embedding": "learned"},
    "aft_full": {"attention": "aft_full", "aft_rank": 8},
    "aft_local": {"attention": "aft_local", "sliding_window": 4, "position_embedding": "sinusoidal"},
    "aft_simple": {"attention": "aft_simple", "position_embedding": "learned"},
    "mixed": {
        "attention": ["aft_simple", "alibi"],
        "norm": "layer_norm",
        "hidden_act": "gelu",
        "gated_mlp": False,
        "mlp_bias": True,
        "attention_bias": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gemma-like": {
        "hidden_act": "gelu_pytorch_tanh",
        "norm": "gemma_rms_norm",
        "post_norms": True,
        "qk_norm": True,
        "attn_logit_softcapping": 5.0,
        "rope_interleaved": False,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 24,
    },
    "experts": {"hidden_act": "relu", "gated_mlp": False, "num_local_experts": 3, "tie_word_embeddings": True},
}


def save_decoder(folder: Path, **config: Any) -> Path:
    """A random checkpoint in torchtune's names, with weights large enough that every part matters."""
    raw = SIZES | config
    torch.manual_seed(len(str(config)))
    decoder = build_decoder(FAMILIES["transformer_decoder"].parse_config(raw))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name or "_scale." in name:
                parameter.normal_(0, 0.3) if raw.get("norm") == "gemma_rms_norm" else parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: parameter.data for name, parameter in decoder.named_parameters()}, folder / "model.safetensors")
    return folder


def failures(result: ExportResult) -> list[Any]:
    assert result.parity is not None
    return [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]


def has_rtx() -> bool:
    return importlib.util.find_spec("tensorrt_rtx") is not None


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_decoder_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Parity on ONNX Runtime in float32 and float16, and a float16 engine, with a cache longer than was trained."""
    checkpoint = save_decoder(tmp_path / "checkpoint", **DECODERS[name])
    config = FAMILIES["transformer_decoder"].parse_config(json.loads((checkpoint / "config.json").read_text()))
    max_len = config.position_limit or 72
    exact = export(ExportRequest(checkpoint=checkpoint, out=tmp_path / "fp32", max_len=max_len))
    assert not failures(exact)
    targets = ("tensorrt-rtx",) if has_rtx() else ("onnx",)
    archs = ("89",) if has_rtx() else ()
    half = export(
        ExportRequest(
            checkpoint=checkpoint,
            out=tmp_path / "fp16",
            max_len=max_len,
            precision="fp16",
            targets=targets,
            gpu_archs=archs,
        )
    )
    assert not failures(half)


@pytest.mark.parametrize("name", list(DECODERS))
def test_rows_that_wait_and_rows_that_move(name: str, tmp_path: Path) -> None:
    """A row that skips a step, or whose state moves to another row, goes on as if it were alone."""
    checkpoint = open_checkpoint(save_decoder(tmp_path / "checkpoint", **DECODERS[name]))
    family = find_family(checkpoint.config, checkpoint.tensors)
    config = family.parse_config(checkpoint.config)
    decoder = load_decoder(family, config, checkpoint)
    cache = cache_spec(decoder, 24, "float32")
    signature = LAYOUTS["portable"].signature(config, cache, 3)

    def open_decoding() -> Decoding:
        return Decoding(EagerRunner(LAYOUTS["portable"].wrap(decoder), signature, cache))

    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    together = open_decoding()
    together.prefill(prompts)
    together.decode(np.array([20, 0, 21]), np.array([True, False, True]))  # row 1 waits
    together.decode(np.array([22, 23, 0]), np.array([True, True, False]))  # row 2 waits
    together.reorder(np.array([1, 2, 1]))
    found = together.decode(np.array([24, 25, 26]))
    for row, tokens in enumerate(([*prompts[1], 23, 24], [*prompts[2], 21, 25], [*prompts[1], 23, 26])):
        alone = open_decoding()
        alone.prefill([tokens[:-1]])
        np.testing.assert_allclose(found[row], alone.decode(np.array(tokens[-1:]))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*(name for name in ATTENTION if name != "linformer"), "linformer"])
def test_a_layer_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Without state, each layer's ONNX graph gives what eager PyTorch gives; Linformer's engine builds."""
    torch.manual_seed(0)
    if name == "linformer":
        layer: nn.Module = LinformerAttention(40, 5, 64, 8, *(nn.Linear(40, 40) for _ in range(4)))
    else:
        config = FAMILIES["transformer_decoder"].parse_config(SIZES | DECODERS[name])
        layer = build_decoder(config).layers[-1].attn
    signature, verdict = export_stateless(layer.to(dtype), tmp_path, embed_dim=40, max_len=64)
    assert verdict.passed, verdict
    if name == "linformer" and has_rtx():
        graph, engine = tmp_path / STATELESS_FILE, tmp_path / "engine"
        build_engine("tensorrt-rtx", graph, engine, signature, gpu_archs=("89",), progress=Quiet())
        assert engine.stat().st_size > 1000


def table(path: Path) -> dict[str, list[str]]:
    """The rows of a Markdown file's first table: {first cell without its backquotes: the other cells}."""
    lines = re.split(r"\n\n", path.read_text()[path.read_text().index("\n|") + 1 :])[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip(" `"): row[1:] for row in rows}


def test_the_documented_tables() -> None:
    """docs/attention.md has every variant and docs/families.md every family; what they say builds is tested above."""
    variants = table(ROOT / "docs" / "attention.md")
    assert list(variants) == list(ATTENTION)
    for name, cells in variants.items():
        suffix = " (stateless)" if name == "linformer" else ""
        assert cells[-2:] == [f"runs{suffix}", f"builds{suffix}"]
        assert name in DECODERS or suffix
    families = table(ROOT / "docs" / "families.md")
    assert set(families) == set(FAMILIES)
    assert {cells[-1] for cells in families.values()} == {"builds"}  # tests/test_families.py


def test_the_documented_stateless_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python block of docs/attention.md runs."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(), re.DOTALL)
    exec(block, {})
    assert (tmp_path / "linformer" / STATELESS_FILE).is_file()


def test_learned_positions_end_where_training_did(tmp_path: Path) -> None:
    """A longer cache is refused, and so is a position beyond the table."""
    checkpoint = save_decoder(tmp_path / "checkpoint", **DECODERS["aft_simple"])
    with pytest.raises(Exception, match="--max-len 65 goes beyond the 64 positions that this model has learned"):
        export(ExportRequest(checkpoint=checkpoint, out=tmp_path / "out", max_len=65, verify=False))
    result = export(ExportRequest(checkpoint=checkpoint, out=tmp_path / "out", max_len=16, verify=False))
    assert result.manifest.graphs["decoder"].signature.limits["position_ids"] == 64


# --- torchtune's own checkpoints ---------------------------------------------------------------------------------


def as_torchtune(folder: Path, out: Path) -> Path:
    """A Hugging Face checkpoint as torchtune saves it: its names, q and k rows reordered for neighbouring pairs."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    renamed = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.scale",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.output_proj",
        "mlp.gate_proj": "mlp.w1",
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
    }
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        if match is None:
            tensors[renamed[name]] = tensor
            continue
        layer, part = match.groups()
        if (projection := part.rpartition(".")[2]) in heads:
            rows = tensor.unflatten(0, (heads[projection], 2, -1))  # halves of each head
            tensor = rows.transpose(1, 2).flatten(0, 2).contiguous()  # pairs of each head
        norms = {"input_layernorm": "sa_norm.scale", "post_attention_layernorm": "mlp_norm.scale"}
        ours = norms[part] if part in norms else f"{parts[part]}.weight"
        tensors[f"layers.{layer}.{ours}"] = tensor
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("tied", [False, True])
def test_a_torchtune_checkpoint(tied: bool, tmp_path: Path) -> None:
    """It gives transformers' logits of the checkpoint it came from, and exports; its artifact opens like itself."""
    torch.manual_seed(3)
    shape = {key: value for key, value in SIZES.items() if key != "model_type"}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / "huggingface")
    folder = as_torchtune(tmp_path / "huggingface", tmp_path / "torchtune")
    ids = torch.randint(SIZES["vocab_size"], (2, 30))
    for path in (folder, tmp_path / "out"):
        checkpoint = open_checkpoint(path)
        family = find_family(checkpoint.config, checkpoint.tensors)
        ours = load_decoder(family, family.parse_config(checkpoint.config), checkpoint)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        if path == folder:
            assert not failures(export(ExportRequest(checkpoint=folder, out=tmp_path / "out")))


def test_torchtune_names_of_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_type gemma2 is not supported in that format; supported: llama"):
        find_family({"model_type": "gemma2"}, {"tok_embeddings.weight"})
