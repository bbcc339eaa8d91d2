"""--target torch: programs that compute what the decoder computes, and packages that hold no weights."""

import dataclasses
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from exporter.errors import ExportError
from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export
from exporter.precision import cache_spec
from exporter.targets import aot_inductor
from exporter.targets.aot_inductor import require_loadable
from exporter.torch_program import DECOMPOSITIONS, decode_signature, decoder_program, on_device
from exporter.torch_runners import MODULE_RUNNERS
from graphs.build import build_decoder
from graphs.families import find_family
from runtimes.artifact import Artifact, open_artifact
from runtimes.errors import ArtifactError
from runtimes.signature import CacheSpec, GraphSignature

LAYOUT = LAYOUTS["portable"]
MAX_LEN = 12
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "experts": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "alibi": {"model_type": "transformer_decoder", "attention": "alibi"},
    "aft_local": {"model_type": "transformer_decoder", "attention": "aft_local", "sliding_window": 4},
}


def make(name: str) -> tuple[torch.nn.Module, GraphSignature, CacheSpec]:
    """A decoder with random weights."""
    config = SIZES | CONFIGS[name]
    if config["model_type"] == "transformer_decoder":
        config["norm_eps"] = config.pop("rms_norm_eps")
    parsed = find_family(config, {}).parse_config(config)
    torch.manual_seed(0)
    decoder = build_decoder(parsed).requires_grad_(False).eval()
    cache = cache_spec(decoder, MAX_LEN, "float32")
    return decoder, LAYOUT.signature(parsed, cache, 4), cache


@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("name", CONFIGS)
def test_programs_compute_what_the_decoder_does(name: str, step: str) -> None:
    """Without one of our operators left, for ragged rows and for one; the new state is where the old one was."""
    decoder, signature, cache = make(name)
    program = decoder_program(
        decoder, LAYOUT, decode_signature(signature) if step == "decode" else signature, cache, None
    )
    assert not [node.target for node in program.graph.nodes if str(node.target).startswith("export_llm")]
    module, rng = program.module(check_guards=False), torch.Generator().manual_seed(1)
    tokens, wanted = (1, 1) if step == "decode" else (4, 2)
    for rows in (1, 3):
        write = torch.tensor([5, 0, 2][:rows])
        inputs = [
            torch.randint(0, SIZES["vocab_size"], (rows, tokens), generator=rng),
            write[:, None] + torch.arange(tokens),
            write,
            (torch.arange(MAX_LEN - 1) < write[:, None] + tokens).to(torch.int64),
            torch.full((rows, wanted), tokens - 1),
        ]
        past = [torch.rand(tensor.array_shape(rows), generator=rng) for tensor in cache.tensors]
        logits, present = LAYOUT.wrap(decoder, cache)(*inputs, cache.by_layer([tensor.clone() for tensor in past]))
        torch.testing.assert_close(module((*inputs, cache.by_layer(past))), logits, atol=1e-5, rtol=1e-5)
        for updated, expected in zip(past, (tensor for layer in present for tensor in layer), strict=True):
            torch.testing.assert_close(updated, expected, atol=1e-5, rtol=1e-5)


def test_programs_move_to_another_device() -> None:
    """Whole, with weights that both programs share; "meta" stands for a GPU."""
    decoder, signature, cache = make("llama")
    moved: dict[int, torch.Tensor] = {}
    for each in (signature, decode_signature(signature)):
        program = on_device(decoder_program(decoder, LAYOUT, each, cache, None), "meta", moved)
        tensors = [*program.state_dict.values(), *program.constants.values()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert len(moved) == len(program.state_dict)
        program.validate()


def test_every_boundary_operator_has_a_decomposition() -> None:
    """Of the portable layout, which programs are traced from."""
    assert DECOMPOSITIONS.keys() == LAYOUT.lowerings.keys()


def test_packages_hold_no_weights(torch_artifact: Artifact) -> None:
    """Neither in their code nor beside it: they say where in model.safetensors each lies."""
    entry = torch_artifact.manifest.engines["torch"]
    assert entry.files == ("decoder.prefill.pt2", "decoder.decode.pt2")
    assert (entry.library_version, entry.gpu_archs) == (torch.__version__, ())
    weights = load_file(torch_artifact.path("model.safetensors"))
    for file in entry.files:
        with zipfile.ZipFile(torch_artifact.path(file)) as package:
            content = b"".join(package.read(name) for name in package.namelist())
        held = [name for name, array in weights.items() if array.size > 8 and array.ravel()[:16].tobytes() in content]
        assert not held
        assert sum(name.encode() in content for name in ("model.safetensors", "places")) == 2


def test_a_package_that_cannot_be_loaded_is_not_published(
    torch_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it end the export: it is loaded in a process of its own."""
    good = torch_artifact.path("decoder.decode.pt2")
    require_loadable(good)
    bad = tmp_path / "decoder.decode.pt2"
    bad.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"compiled decoder\.decode\.pt2, and cannot load it \(.*Error.*\): leave"):
        require_loadable(bad)
    monkeypatch.setattr(aot_inductor, "LOAD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ExportError, match=r"and cannot load it \(SIGSEGV\)"):
        require_loadable(good)


def test_the_command_verifies_packages(torch_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """The parity suite of ONNX Runtime, with the same limits."""
    ran = x_run("verify", torch_artifact.folder, "--runtime", "aoti", "--json")
    assert ran.code == 0, ran.err
    (report,) = json.loads(ran.out)["reports"]
    assert report["runtime"].startswith("AOTInductor of PyTorch 2.")
    assert {"prefill logits", "8 decode steps", "8 greedy tokens", "cache tail untouched"} <= {
        rung["name"] for rung in report["rungs"]
    }


def test_every_runtime_generates_the_same_tokens(torch_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """Greedy, through the command."""
    found = {}
    for runtime in ("onnxruntime", "aoti", "eager"):
        command = ("generate", torch_artifact.folder, "--prompt", "sort 52914=", "--max-new-tokens", "12", "--json")
        ran = x_run(*command, "--runtime", runtime)
        assert ran.code == 0, ran.err
        found[runtime] = json.loads(ran.out)["token_ids"]
    assert found["aoti"] == found["eager"] == found["onnxruntime"]
    assert len(found["aoti"]) == 12


def test_an_artifact_without_packages(tiny_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """The message says how to get some."""
    x_run("verify", tiny_artifact.folder, "--runtime", "aoti").refused(
        "holds no packages for PyTorch (engines: none)", "export with --target torch"
    )


def test_eager_needs_the_portable_layout(tiny_artifact: Artifact) -> None:
    """Other layouts carry the cache in another way."""
    other = dataclasses.replace(tiny_artifact, manifest=dataclasses.replace(tiny_artifact.manifest, layout="dynamic"))
    for open_one in MODULE_RUNNERS.values():
        with pytest.raises(ArtifactError, match="has the layout dynamic, and PyTorch's runners take portable"):
            open_one(other, "cpu")


def test_no_compiler_is_said_before_any_work(
    one_layer_llama: Path, tmp_path: Path, x_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when $CXX names one that is not there."""
    command = ("export", one_layer_llama, "-o", tmp_path / "out", "--target", "torch")
    monkeypatch.setenv("CXX", "no-such-compiler")
    x_run(*command).refused("target torch needs a C++ compiler, and there is no no-such-compiler here", "set CXX")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    x_run(*command).refused("there is no g++ here: install g++ (apt-get install g++)")
    assert not (tmp_path / "out").exists()


def test_no_inductor_is_said_before_any_work(
    one_layer_llama: Path, tmp_path: Path, x_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    x_run("export", one_layer_llama, "-o", tmp_path / "out", "--target", "torch").refused(
        "target torch needs PyTorch's compiler, which cannot be imported", "pip install torch"
    )


def test_torch_needs_the_portable_layout(one_layer_llama: Path, tmp_path: Path, x_run: Callable[..., Any]) -> None:
    """As engines do."""
    x_run("export", one_layer_llama, "-o", tmp_path / "out", "--target", "torch", "--layout", "dynamic").refused(
        "target torch needs --layout portable, got dynamic"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", ["fp16", "bf16", "int8", "int4:embed=fp16", "int4:dtype=bf16", "fp8", "nvfp4:dtype=fp16"]
)
def test_parity_in_every_precision(one_layer_llama: Path, tmp_path: Path, precision: str) -> None:
    """Codes stay codes: packages name them by their places."""
    request = ExportRequest(checkpoint=one_layer_llama, out=tmp_path / "out", targets=("torch",), precision=precision)
    parity = export(request).parity
    assert parity is not None
    assert not parity.not_run
    (report,) = [report for report in parity.reports if "AOTInductor" in report.runtime]
    assert report.passed, report
    if ":" in precision or precision == "int8":
        with zipfile.ZipFile(tmp_path / "out" / "decoder.decode.pt2") as package:
            (facts,) = [json.loads(package.read(n)) for n in package.namelist() if n.endswith("wrapper_metadata.json")]
        places = json.loads(facts["export_llm"])["places"]
        assert any(name.endswith("q_proj.codes") for name in places)


@pytest.mark.slow
def test_parity_of_a_model_that_sees(tiny_vision: Path, tmp_path: Path) -> None:
    """Its vision encoder is a package as well."""
    parity = export(ExportRequest(checkpoint=tiny_vision, out=tmp_path / "out", targets=("torch",))).parity
    assert parity is not None
    assert parity.passed
    assert [report.runtime for report in parity.reports if "AOTInductor" in report.runtime]
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.engines["torch/vision_encoder"].files == ("vision_encoder.pt2",)


@pytest.mark.slow
def test_compiled_passes_the_same_suite(torch_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """torch.compile, through the command."""
    ran = x_run("verify", torch_artifact.folder, "--runtime", "compiled", "--json")
    assert ran.code == 0, ran.err


@pytest.mark.slow
def test_compiled_sees(tiny_vision_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """Images, through torch.compile."""
    ran = x_run("verify", tiny_vision_artifact.folder, "--runtime", "compiled", "--json")
    assert ran.code == 0, ran.err


@pytest.mark.slow
def test_the_same_machine_makes_the_same_packages(one_layer_llama: Path, tmp_path: Path) -> None:
    """Bit for bit, and beside a checkpoint's own weights as well."""
    shutil.copytree(one_layer_llama, tmp_path / "one")
    shutil.copytree(one_layer_llama, tmp_path / "two")
    for name in ("one", "two"):
        out = tmp_path / name
        export(ExportRequest(checkpoint=out, out=out, targets=("torch",), weights="reference", verify=name == "one"))
    for file in open_artifact(tmp_path / "one").manifest.engines["torch"].files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_parity_on_a_gpu(one_layer_llama: Path, tmp_path: Path, precision: str) -> None:
    """Packages that were compiled for it."""
    request = ExportRequest(checkpoint=one_layer_llama, out=tmp_path / "out", targets=("torch",), precision=precision)
    parity = export(request).parity
    assert parity is not None
    (report,) = [report for report in parity.reports if "AOTInductor" in report.runtime]
    assert report.passed, report
    assert "(cuda)" in report.runtime


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
@pytest.mark.parametrize("runtime", ["eager", "compiled"])
def test_pytorch_on_a_gpu(
    one_layer_llama: Path, tmp_path: Path, x_run: Callable[..., Any], runtime: str, precision: str
) -> None:
    """The same suite; compiled decode steps are CUDA graphs."""
    export(ExportRequest(checkpoint=one_layer_llama, out=tmp_path / "out", precision=precision, verify=False))
    ran = x_run("verify", tmp_path / "out", "--runtime", runtime, "--device", "cuda", "--json")
    assert ran.code == 0, ran.err
    (report,) = json.loads(ran.out)["reports"]
    assert "(cuda)" in report["runtime"]
