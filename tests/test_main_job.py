"""The main job on real, trained models: export, verify, generate; and what a user of the Python API sees."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, open_artifact
from runtimes.beam_search import beam_search
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer

STORIES = ["stories260k-llama", "stories15m-llama"]


@pytest.fixture(scope="module")
def exported(shared_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    """Exports a shared model as fp32 with verification, once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("stories") / name
            result = export(ExportRequest(checkpoint=shared_model(name), out=out, precision="fp32"))
            assert result.parity is not None
            assert result.parity.passed
            made[name] = out
        return made[name]

    return get


@pytest.mark.parametrize("name", STORIES)
def test_greedy_ids_are_those_of_transformers(
    name: str, shared_model: Callable[[str], Path], exported: Callable[[str], Path]
) -> None:
    """expected.json holds one greedy run of transformers in float32."""
    expected = json.loads((shared_model(name) / "expected.json").read_text())
    artifact = open_artifact(exported(name))
    prompt_ids = Tokenizer(artifact.folder).encode(expected["prompt"])
    assert prompt_ids == expected["input_ids"]
    with open_runner(artifact, device="cpu") as runner:
        result = generate(runner, [prompt_ids], 48, stop_ids=read_stop_ids(artifact.folder))
    assert result.token_ids == [expected["greedy_ids"]]


@pytest.mark.parametrize("name", STORIES)
def test_a_ragged_batch_gives_the_same_ids(
    name: str, shared_model: Callable[[str], Path], exported: Callable[[str], Path]
) -> None:
    """The expected row among others, and every row equal to transformers' own greedy run of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    expected = json.loads((shared_model(name) / "expected.json").read_text())
    artifact = open_artifact(exported(name))
    tokenizer = Tokenizer(artifact.folder)
    texts = ["The dog", expected["prompt"], "One day, a little girl named Lily found a needle in her room. She"]
    prompts = [tokenizer.encode(text) for text in texts]
    assert len({len(prompt) for prompt in prompts}) == 3
    with open_runner(artifact, device="cpu") as runner:
        result = generate(runner, prompts, 48)
    assert result.token_ids[1] == expected["greedy_ids"]
    model = transformers.LlamaForCausalLM.from_pretrained(shared_model(name), dtype=torch.float32).eval()
    for prompt, ids in zip(prompts, result.token_ids, strict=True):
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens[0, len(prompt) :].tolist() == ids


def test_beam_search_finds_what_transformers_finds(
    shared_model: Callable[[str], Path], exported: Callable[[str], Path]
) -> None:
    """Two prompts of different lengths in one batch, against transformers' beam search of each."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = "stories260k-llama"
    artifact = open_artifact(exported(name))
    tokenizer = Tokenizer(artifact.folder)
    prompts = [tokenizer.encode(text) for text in ("The dog", "One day, a little girl named Lily found")]
    with open_runner(artifact, device="cpu") as runner:
        result = beam_search(runner, prompts, 4, 24)
    model = transformers.LlamaForCausalLM.from_pretrained(shared_model(name), dtype=torch.float32).eval()
    for prompt, hypotheses in zip(prompts, result.hypotheses, strict=True):
        tokens = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            num_beams=4,
            early_stopping="never",
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens[0, len(prompt) :].tolist() == hypotheses[0].token_ids


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_graph_builds_in_tensorrt_rtx_without_a_gpu(
    precision: str, shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both shared models: a head size of 8, and one of 48."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for name in STORIES:
        out = tmp_path / name
        request = ExportRequest(
            checkpoint=shared_model(name), out=out, precision=precision, targets=("tensorrt-rtx",), verify=False
        )
        engine = export(request).manifest.engines["tensorrt-rtx"]
        assert (out / engine.file).stat().st_size > 100_000


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_tiny_model_still_answers_right(
    precision: str,
    tiny_llama: Path,
    tiny_artifacts: Callable[[str], Artifact],
    load_tasks: Callable[[Path], ModuleType],
) -> None:
    """Exact-match scores through ONNX Runtime, on held-out problems: at least 97 % of each task."""
    tasks = load_tasks(tiny_llama)
    artifact = tiny_artifacts(precision)
    tokenizer = Tokenizer(artifact.folder)
    stop_ids = read_stop_ids(artifact.folder)

    def answer(prompts: list[str]) -> list[str]:
        answers = []
        for start in range(0, len(prompts), 8):
            rows = [tokenizer.encode(prompt) for prompt in prompts[start : start + 8]]
            result = generate(runner, rows, tasks.MAX_ANSWER_CHARS + 1, stop_ids=stop_ids)
            answers += [tokenizer.decode(ids) for ids in result.token_ids]
        return answers

    with open_runner(artifact, device="cpu") as runner:
        scores = tasks.score(answer, count=200)
    assert scores.keys() == {"add", "sort", "reverse"}
    assert all(score >= 0.97 for score in scores.values()), scores


def test_the_shipped_model_is_small(tiny_llama: Path) -> None:
    """At most 2 MB in all."""
    assert sum(path.stat().st_size for path in tiny_llama.iterdir() if path.is_file()) <= 2_000_000
