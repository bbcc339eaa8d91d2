"""Valid inputs to be made hostile: one folder for each reader, a few kilobytes each."""

import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import gguf_cases  # noqa: E402
import packed_cases  # noqa: E402

from exporter.pipeline import ExportRequest, export  # noqa: E402
from graphs.families import find_family  # noqa: E402
from graphs.formats import own  # noqa: E402
from graphs.loading import expected_shapes  # noqa: E402
from graphs.quantization import WeightFormat, largest_scales, with_scales  # noqa: E402
from runtimes.artifact import GOLDEN_FILE, Manifest, open_artifact  # noqa: E402
from runtimes.golden import Golden, save_golden  # noqa: E402
from runtimes.parity import Spread, Yardstick, make_case, run_case  # noqa: E402
from runtimes.prefix import Prefix  # noqa: E402
from runtimes.prefix_file import save_prefix  # noqa: E402
from runtimes.runner import open_runner  # noqa: E402

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,  # of the shipped tokenizer
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# config.json of other families, by what differs
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "rope_local_base_freq": 1e4},
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1]},
    "transformer_decoder": {"attention": ["aft_local"], "sliding_window": 8, "position_embedding": "learned"},
    "llama": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
SMALL = ("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
PT2_METADATA = "archive/data/aotinductor/model/abc.wrapper_metadata.json"  # where PyTorch looks for it


def make_seeds(folder: Path) -> None:
    """Fill `folder` with one folder for each kind of input."""
    torch.manual_seed(0)
    _checkpoint(folder / "checkpoint")
    _sharded(folder / "checkpoint", folder / "sharded")
    _configs(folder / "configs")
    for method in ("gptq", "awq"):
        _packed(folder / method, method)
    _own(folder / "own")
    _gguf(folder / "gguf")
    for layout in ("portable", "genai"):
        request = ExportRequest(checkpoint=folder / "checkpoint", out=folder / layout, layout=layout, verify=False)
        export(request)
    _images(folder / "images")
    _prefix(folder / "prefix", folder / "portable")
    _golden(folder / "portable", folder / "golden")
    _package(folder / "package")
    _parity(folder / "portable", folder / "parity")
    (folder / "text").mkdir()
    shutil.copy(folder / "checkpoint" / "tokenizer.json", folder / "text")
    (folder / "text" / "text.txt").write_text("12+34=46\n" * 20)
    (folder / "text" / "tasks.jsonl").write_text('{"task": "sum", "prompt": "1+2=", "answer": "3"}\n' * 3)


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors of all names and shapes that config.json describes."""
    family = find_family(config)
    return {name: torch.randn(shape) for name, shape in expected_shapes(family, family.parse_config(config)).items()}


def _checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in SMALL:
        shutil.copy(ROOT / "examples" / "tiny_llama" / name, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    save_file(weights(LLAMA), folder / "model.safetensors")


def _sharded(source: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = weights(LLAMA)
    places = {name: names[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _configs(folder: Path) -> None:
    folder.mkdir()
    for model_type, more in OTHERS.items():
        config = LLAMA | {"model_type": model_type, "tie_word_embeddings": model_type != "transformer_decoder"} | more
        (folder / f"{model_type}.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "examples" / "tiny_vision" / "config.json", folder / "mllama.json")


def _packed(folder: Path, method: str) -> None:
    folder.mkdir()
    group = {"group_size": 32, "bits": 4}
    settings = group | ({"version": "gemm"} if method == "awq" else {"checkpoint_format": "gptq", "desc_act": False})
    config = LLAMA | {"quantization_config": {"quant_method": method, **settings}}
    tensors = weights(LLAMA)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        layer = packed_cases.layer(outputs, inputs, group=32, dtype=torch.float16)
        parts = packed_cases.pack_gptq(layer) if method == "gptq" else packed_cases.pack_awq(layer)
        tensors |= packed_cases.named(name.removesuffix(".weight"), parts)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def _own(folder: Path) -> None:
    """As export-llm writes quantized weights."""
    folder.mkdir()
    format, tensors, entries = WeightFormat(name="int4", block=16), weights(LLAMA), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors.pop(name)
        scales, _ = largest_scales(weight, format, torch.float32)
        parts = own.parts(with_scales(weight, scales, format), torch.float32)
        tensors |= {f"{name}{suffix}": part for suffix, part in parts.items()}
        entries[name] = own.describe(format, (weight.shape[0], weight.shape[1]), zero_points=False)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_file(tensors, folder / "model.safetensors", metadata={own.METADATA_KEY: json.dumps(entries)})


def _gguf(folder: Path) -> None:
    folder.mkdir()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(26)), *(chr(33 + i) for i in range(71))]
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 26, *[1] * 71],
        "tokenizer.chat_template": "{{ messages }}",
        "general.alignment": 32,
    }

    def type_of(name: str) -> gguf_cases.Type:
        return gguf_cases.Type.Q4_0 if "ffn" in name else gguf_cases.Type.F16

    gguf_cases.convert(folder / "model.gguf", LLAMA, weights(LLAMA), type_of=type_of, extra=extra)


def _images(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copy(ROOT / "examples" / "tiny_vision" / name, folder)
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.png", pnginfo=None)
    image.save(folder / "b.jpg", exif=exif)
    image.save(folder / "c.webp")
    image.convert("P").save(folder / "d.gif", save_all=True, append_images=[image.rotate(90).convert("P")] * 2)
    image.save(folder / "e.bmp")
    image.save(folder / "f.tiff", compression="tiff_lzw")
    image.convert("I;16").save(folder / "g.png")
    image.convert("RGBA").save(folder / "h.ico")
    image.save(folder / "i.ppm")
    image.convert("CMYK").save(folder / "j.jpg")
    image.save(folder / "k.apng.png", save_all=True, append_images=[image])


def _prefix(folder: Path, artifact: Path) -> None:
    folder.mkdir()
    shutil.copy(artifact / "manifest.json", folder)
    manifest = open_artifact(artifact).manifest
    empty = Prefix(token_ids=(1, 2, 3), tensors={}, dtypes={})
    shapes = empty.shapes(manifest.cache)
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    prefix = Prefix(token_ids=(1, 2, 3), tensors=tensors, dtypes=dict.fromkeys(shapes, "float32"))
    save_prefix(folder / "saved.prefix", prefix, manifest)


def _golden(artifact: Path, folder: Path) -> None:
    """A case for that artifact, with zeros for answers."""
    shutil.copytree(artifact, folder)
    opened = open_artifact(artifact)
    with open_runner(opened, device="cpu") as runner:
        case = make_case(16, opened.manifest.cache, 2)
        trace = run_case(runner, case)
    spread = Spread(1.0, 1.0)
    golden = Golden(
        case=case,
        truth=trace,
        greedy=trace.greedy,
        greedy_truth=[np.zeros((len(tokens), trace.far_logits.shape[-1]), np.float32) for tokens in trace.greedy],
        yardsticks={
            "float32": Yardstick(logits=spread, cache=(spread,) * len(opened.manifest.cache.tensors), images=())
        },
        precision="float32",
        reference="nobody",
    )
    (folder / GOLDEN_FILE).write_bytes(save_golden(golden))


def _package(folder: Path) -> None:
    """What a compiled program says of itself, without the program."""
    folder.mkdir()
    weight = np.arange(8, dtype="<f4").tobytes()
    (folder / "model.safetensors").write_bytes(weight)
    place = {"file": "model.safetensors", "offset": 0, "dtype": "F32", "shape": [2, 4]}
    facts = {
        "torch": torch.__version__,
        "device": "cpu",
        "processor": [],
        "places": {"weight": place},
        "tables": {"cosines": [[2], "AACAPwAAgD8="]},
    }
    metadata = {"export_llm": json.dumps(facts), "AOTI_DEVICE_KEY": "cpu"}
    write_package(folder / "decoder.pt2", json.dumps(metadata).encode())


def write_package(path: Path, metadata: bytes, name: str | None = None) -> None:
    """A zip file such as PyTorch writes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/archive_format", "pt2")
        file.writestr(name or PT2_METADATA, metadata)


def _parity(artifact: Path, folder: Path) -> None:
    """An artifact with a report of its quality."""
    shutil.copytree(artifact, folder)
    quality = {
        **{"text": "of a text", "tokens": 10, "kl_mean": 0.1, "kl_p999": 0.2, "top1_agreement": 0.9},
        **{"perplexity_original": 2.0, "perplexity_stored": 2.1, "bytes_per_weight": 1.0},
        "worst_layers": [{"layer": "layers.0", "error": 0.1}],
        "tasks": {"sum": {"problems": 1, "original": 1.0, "stored": 0.5}},
    }
    (folder / "parity.json").write_text(json.dumps({"passed": True, "reports": [], "not_run": {}, "quality": quality}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parity"] = {"passed": True, "runtimes": ["x"], "not_run": {}}
    manifest["files"]["parity.json"] = {"sha256": "", "bytes": 0}
    seal(folder, manifest)


def seal(folder: Path, data: dict[str, Any]) -> None:
    """Write a manifest as if an export had written it: with the digests of the files as they are, and of itself.

    What an attacker would do. Data that is none of a manifest is written as it is.
    """
    from runtimes.artifact import DIGEST_KEY, _digest
    from runtimes.hashing import sha256_of

    files = data.get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        plain = (
            isinstance(name, str) and "/" not in name and "\0" not in name and len(name) < 200 and name.isprintable()
        )
        if plain and isinstance(entry, dict) and (folder / name).is_file() and not (folder / name).is_symlink():
            entry |= {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
            entry.pop("chunk_bytes", None)
    data.pop(DIGEST_KEY, None)
    data[DIGEST_KEY] = _digest(data)
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header, and the right length before it."""
    (length,) = struct.unpack("<Q", data[:8])
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def header_of(data: bytes) -> bytes:
    """The JSON at the start of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a seed."""
    return Manifest.from_json((folder / "manifest.json").read_text())
