"""The runners on PyTorch: AOTInductor's packages against transformers, and what all three share."""

import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from runner_cases import (
    PROMPTS,
    WRONG_FEEDS,
    assert_only_the_next_slot_is_written,
    assert_rows_are_reordered,
    assert_wrong_rows_are_refused,
    forced_logits,
    valid_feeds,
)

from exporter import torch_runners
from exporter.torch_runners import open_compiled, open_eager
from runtimes import torch_package
from runtimes.artifact import Artifact, open_artifact
from runtimes.compiled_runner import CompiledRunner
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, EngineLoadError, FeedError, RuntimeMissingError
from runtimes.generation import generate
from runtimes.images import show_images
from runtimes.runner import Runner, open_runner
from runtimes.tokenizer import Tokenizer

ATOL = 2e-5  # logits are of order 10; both sides compute in float32


@pytest.fixture(scope="module")
def aoti(torch_artifact: Artifact) -> Iterator[Runner]:
    """The packages, loaded once."""
    with open_runner(torch_artifact, "aoti", device="cpu") as runner:
        yield runner


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes torch.compile return its module, and keeps what it was asked for: compiling takes a minute."""
    asked = []

    def same(module: Any, **options: Any) -> Any:
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", same)
    return asked


@pytest.fixture(scope="module")
def traced(torch_artifact: Artifact) -> dict[str, Any]:
    """What open_compiled hands to its runner: traced once."""
    with pytest.MonkeyPatch.context() as patch:
        handed: dict[str, Any] = {}
        patch.setattr(torch_runners, "CompiledRunner", lambda *modules, **options: handed.update(modules=modules))
        open_compiled(torch_artifact, "cpu")
    return handed


@pytest.fixture
def open_one(torch_artifact: Artifact, traced: dict[str, Any], uncompiled: Any) -> Callable[[str], Runner]:
    """Opens a runner by its name."""
    open_by_name: dict[str, Callable[[], Runner]] = {
        "aoti": lambda: open_runner(torch_artifact, "aoti", device="cpu"),
        "eager": lambda: open_eager(torch_artifact, "cpu"),
        "compiled": lambda: CompiledRunner(*traced["modules"]),
    }
    return lambda name: open_by_name[name]()


@pytest.fixture(params=["aoti", "eager", "compiled"])
def opened(request: pytest.FixtureRequest, open_one: Callable[[str], Runner]) -> Iterator[Runner]:
    """Each runner, new."""
    with open_one(request.param) as runner:
        yield runner


@torch.no_grad()
def transformers_logits(folder: Path, prompt: list[int], forced: np.ndarray) -> np.ndarray:
    """[1 + steps, V]: after the prompt and after each forced token, in one pass without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits: np.ndarray = model(torch.tensor([[*prompt, *forced.tolist()]])).logits[0].numpy()
    return logits[len(prompt) - 1 :]


def test_packages_equal_transformers(aoti: Runner, one_layer_llama: Path) -> None:
    """A ragged batch, and each row alone: prefill and 20 cached steps."""
    forced = np.random.default_rng(0).integers(3, 98, (len(PROMPTS), 20))
    together = forced_logits(aoti, PROMPTS, forced)
    for row, prompt in enumerate(PROMPTS):
        expected = transformers_logits(one_layer_llama, prompt, forced[row])
        np.testing.assert_allclose(together[row], expected, atol=ATOL)
        alone = forced_logits(aoti, [prompt], forced[row : row + 1])
        np.testing.assert_allclose(alone[0], expected, atol=ATOL)


def test_prefill_of_one_token_asks_no_other_logits(aoti: Runner) -> None:
    """One token a row goes through the decode package, whatever is in the cache: equal to the prefill package."""
    whole = Decoding(aoti).prefill([[1, 5, 9]])
    decoding = Decoding(aoti)
    decoding.prefill([[1]])
    decoding.decode(np.array([5]))
    np.testing.assert_allclose(decoding.decode(np.array([9])), whole, atol=ATOL)


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_modules_equal_the_packages(name: str, aoti: Runner, open_one: Callable[[str], Runner]) -> None:
    """The same steps through the other two."""
    forced = np.random.default_rng(1).integers(3, 98, (len(PROMPTS), 5))
    with open_one(name) as runner:
        found = forced_logits(runner, PROMPTS, forced)
    np.testing.assert_allclose(found, forced_logits(aoti, PROMPTS, forced), atol=ATOL)


def test_greedy_tokens_equal_onnx_runtimes(aoti: Runner, torch_artifact: Artifact) -> None:
    """To the last of them."""
    with open_runner(torch_artifact, device="cpu") as onnx:
        expected = generate(onnx, PROMPTS, max_new_tokens=24).token_ids
    assert generate(aoti, PROMPTS, max_new_tokens=24).token_ids == expected


def test_an_artifact_may_be_moved(torch_artifact: Artifact, aoti: Runner, tmp_path: Path) -> None:
    """Packages find the weights beside them."""
    moved = open_artifact(shutil.copytree(torch_artifact.folder, tmp_path / "moved"))
    with open_runner(moved, "aoti") as runner:
        np.testing.assert_array_equal(Decoding(runner).prefill(PROMPTS), Decoding(aoti).prefill(PROMPTS))


def test_compiled_is_asked_for_once_per_step_kind(
    open_one: Callable[[str], Runner], uncompiled: list[dict[str, Any]]
) -> None:
    """Prefill and decode, both for any size; CUDA graphs are for GPUs."""
    open_one("compiled").close()
    assert uncompiled == [{"dynamic": True}, {"dynamic": True, "mode": "default"}]


def test_compiled_sees_few_lengths_of_the_mask(open_one: Callable[[str], Runner]) -> None:
    """Powers of two, up to the cache's length: each other one would be compiled or recorded anew."""
    seen = []
    with open_one("compiled") as runner:
        for name in ("_prefill", "_decode"):
            module = getattr(runner, name)
            setattr(runner, name, lambda inputs, module=module: seen.append(inputs[3].shape[1]) or module(inputs))
        decoding = Decoding(runner)
        decoding.prefill([[1] * 60])
        for token in range(68):
            decoding.decode(np.array([token]))
    assert sorted(set(seen)) == [64, 128]


# --- what every runner does -------------------------------------------------------------------------------------------


def test_only_the_next_slot_is_written(opened: Runner) -> None:
    """The rest of the cache keeps what it held."""
    assert_only_the_next_slot_is_written(opened)


def test_rows_are_reordered(opened: Runner) -> None:
    """Whole, and decoding goes on from them."""
    assert_rows_are_reordered(opened)


def test_wrong_rows_are_refused(opened: Runner) -> None:
    """Before anything is moved."""
    assert_wrong_rows_are_refused(opened)


@pytest.mark.parametrize(("feeds", "message"), WRONG_FEEDS)
def test_wrong_feeds_are_refused(aoti: Runner, feeds: dict[str, Any], message: str) -> None:
    """Packages themselves check nothing."""
    aoti.reset(1)
    with pytest.raises(FeedError, match=message):
        aoti.step(feeds)


def test_the_cache_can_be_written(opened: Runner) -> None:
    """What was read goes back, into another batch."""
    decoding = Decoding(opened)
    decoding.prefill([[1, 5, 9], [1, 7, 8]])
    held = [opened.read_cache(index) for index in range(2)]
    opened.reset(2)
    assert not opened.read_cache(0).any()
    for index, array in enumerate(held):
        opened.write_cache(index, array)
        np.testing.assert_array_equal(opened.read_cache(index), array)
    with pytest.raises(FeedError, match=r"past_key_values.0.key must be float32 \[2, 2, 128, 32\], got float32 \[1\]"):
        opened.write_cache(0, np.zeros(1, np.float32))


def test_nothing_works_before_reset(opened: Runner) -> None:
    """Each call says what to call first."""
    for call, message in (
        (lambda: opened.step(valid_feeds()), "before the first step"),
        (lambda: opened.read_cache(0), "before the cache is read"),
        (lambda: opened.write_cache(0, np.zeros(1, np.float32)), "before the cache is written"),
        (lambda: opened.fill_cache(0.0), "before the cache is filled"),
        (lambda: opened.read_images(0), "before images are read"),
        (lambda: opened.write_images(0, np.zeros(1, np.float32)), "before images are written"),
    ):
        with pytest.raises(FeedError, match=rf"reset\(batch_size\) must be called {message}"):
            call()


def test_nothing_works_after_close(opened: Runner) -> None:
    """Closing twice does."""
    opened.reset(1)
    opened.close()
    opened.close()
    for call in (
        lambda: opened.reset(1),
        lambda: opened.step(valid_feeds()),
        lambda: opened.encode_images({}),
        lambda: opened.read_cache(0),
        lambda: opened.write_cache(0, np.zeros(1, np.float32)),
        lambda: opened.fill_cache(0.0),
        lambda: opened.read_images(0),
        lambda: opened.write_images(0, np.zeros(1, np.float32)),
        lambda: opened.reorder_rows(np.array([0])),
    ):
        with pytest.raises(FeedError, match="this runner is closed"):
            call()


def test_a_model_without_eyes_is_shown_nothing(opened: Runner) -> None:
    """The message says so."""
    opened.reset(1)
    for call in (
        lambda: opened.encode_images({}),
        lambda: opened.read_images(0),
        lambda: opened.write_images(0, np.zeros(1, np.float32)),
    ):
        with pytest.raises(FeedError, match="this model reads text only"):
            call()


def test_eager_sees_what_onnx_runtime_sees(tiny_vision_artifact: Artifact, tiny_vision: Path) -> None:
    """A picture, and a decode step after it; keys and values of images can be read and written."""
    prompt = Tokenizer(tiny_vision_artifact.folder).encode("<|image|>where is the triangle?")
    images = show_images(tiny_vision_artifact, [prompt], [[tiny_vision / "picture.png"]])
    found = []
    for runner in (open_runner(tiny_vision_artifact, device="cpu"), open_eager(tiny_vision_artifact, "cpu")):
        with runner:
            decoding = Decoding(runner)
            found.append((decoding.prefill([prompt], images), decoding.decode(np.array([5]))))
            held = runner.read_images(0)
            runner.write_images(0, held + 1)
            np.testing.assert_array_equal(runner.read_images(0), held + 1)
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


# --- packages that cannot be run --------------------------------------------------------------------------------------


def broken(artifact: Artifact, folder: Path) -> Artifact:
    """A copy to damage; hashes are not checked again."""
    shutil.copytree(artifact.folder, folder)
    return dataclasses.replace(artifact, folder=folder)


def test_a_package_that_is_missing_or_damaged(torch_artifact: Artifact, tmp_path: Path) -> None:
    """Both are the artifact's fault, and say which file."""
    artifact = broken(torch_artifact, tmp_path / "copy")
    decode = artifact.path("decoder.decode.pt2")
    decode.write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match=r"decoder\.decode\.pt2 is damaged, or no package that export-llm wrote"):
        open_runner(artifact, "aoti")
    decode.unlink()
    with pytest.raises(ArtifactError, match=r"decoder\.decode\.pt2 is missing: export again with --target torch"):
        open_runner(artifact, "aoti")


def test_weights_that_are_missing_or_short(torch_artifact: Artifact, tmp_path: Path) -> None:
    """They lie in another file than the package."""
    artifact = broken(torch_artifact, tmp_path / "copy")
    weights = artifact.path("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"model\.safetensors, which holds the weights, cannot be read"):
        open_runner(artifact, "aoti")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors, which holds the weights, cannot be read"):
        open_runner(artifact, "aoti")


def test_another_pytorch(torch_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of one release may call what another has not."""
    made_by = re.escape(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    with pytest.raises(
        EngineLoadError, match=rf"was compiled by PyTorch {made_by}, and this is 2\.99\.1: install that"
    ):
        open_runner(torch_artifact, "aoti")


def test_another_processor(torch_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions that it lacks would end the process."""
    known = torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known | {"sse2": False, "architecture": "riscv64"})
    message = rf"was compiled for a processor with sse2, {known['architecture']}, which this one lacks"
    with pytest.raises(EngineLoadError, match=message):
        open_runner(torch_artifact, "aoti")


def test_packages_for_a_gpu(torch_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, with another one, and where the CPU was asked for."""
    read = torch_package.read_facts

    def read_cuda(path: Path) -> Any:
        facts, metadata = read(path)
        return dataclasses.replace(facts, device="cuda"), {**metadata, "AOTI_COMPUTE_CAPABILITY": "9.0"}

    for module in ("runtimes.torch_package", "runtimes.aoti_runner"):
        monkeypatch.setattr(importlib.import_module(module), "read_facts", read_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeMissingError, match="was compiled for a CUDA GPU, and PyTorch finds none here"):
        open_runner(torch_artifact, "aoti")
    with pytest.raises(RuntimeMissingError, match="these packages were compiled for cuda, not for cpu"):
        open_runner(torch_artifact, "aoti", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(EngineLoadError, match="was compiled for compute capability 90, and this GPU has 89"):
        open_runner(torch_artifact, "aoti")


def test_pytorch_is_not_installed(torch_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeMissingError, match=r"PyTorch is not installed .*: pip install torch"):
        open_runner(torch_artifact, "aoti")


def test_devices_that_are_not_there(torch_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the runners that are given modules."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeMissingError, match="unknown device 'tpu'; known: cpu, cuda"):
        open_eager(torch_artifact, "tpu")
    with pytest.raises(RuntimeMissingError, match="device 'cuda' needs a GPU and a PyTorch built for CUDA"):
        open_eager(torch_artifact, "cuda")
