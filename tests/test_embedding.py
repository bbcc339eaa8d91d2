"""Programs that embed an artifact give our own runner's ids, in every language; docs/embedding.md tells the truth."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from runtimes.artifact import Artifact, open_artifact
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DOC = (ROOT / "docs" / "embedding.md").read_text()
REQUIRE = "EXPORT_LLM_REQUIRE_CLIENTS"  # where it is set, what is not installed is an error
STORY = "stories15m-llama"
TEXTS = {  # of different lengths, and with ends at different steps
    "tiny_llama": ["27+58=", "reverse planet=", "sort 52914=", "9+9="],
    STORY: ["Once upon a time", "The little dog found a big bone in the garden and", "One day"],
}
NEW_TOKENS = 24
CASES = [("tiny_llama", "fp32"), ("tiny_llama", "fp16"), ("tiny_llama", "int4"), (STORY, "fp32"), (STORY, "int4")]

Program = Callable[..., subprocess.CompletedProcess[str]]


def absent(reason: str) -> NoReturn:
    """Skip the test, or fail it where everything must be there."""
    if os.environ.get(REQUIRE):
        pytest.fail(reason)
    pytest.skip(reason)


def program(*command: str | Path) -> Program:
    """Runs a command with more arguments, and returns what it did."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def cpp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, compiled now, with the headers that were fetched before."""
    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            absent(f"the C++ program needs {tool}")
    folder = EXAMPLES / "embed_cpp"
    for name in ("include/onnxruntime_cxx_api.h", "lib/libonnxruntime.so"):
        if not (folder / "build" / "onnxruntime" / name).is_file():
            absent(f"ONNX Runtime's {name} is not there: make -C examples/embed_cpp PYTHON={sys.executable} fetches it")
    build = tmp_path_factory.mktemp("embed_cpp")
    flags = [f"BUILD={build}", "ONNXRUNTIME=build/onnxruntime", "CXX=g++", "CXXFLAGS=-Werror -O1"]
    command = ["make", "-C", folder, f"PYTHON={sys.executable}", *flags]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return build / "embed"


@pytest.fixture(scope="session")
def cpp(cpp_path: Path) -> Program:
    return program(cpp_path)


@pytest.fixture(scope="session")
def js() -> Program:
    if shutil.which("node") is None:
        absent("the JavaScript program needs Node.js")
    if not (EXAMPLES / "embed_js" / "node_modules" / "onnxruntime-node").is_dir():
        absent("onnxruntime-node is not installed: npm ci --prefix examples/embed_js")
    return program("node", EXAMPLES / "embed_js" / "embed.mjs")


@pytest.fixture(scope="session")
def python() -> Program:
    """examples/embed.py, in a process where torch and the exporter's libraries cannot be imported."""
    blocked = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers")
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import runpy; sys.argv = sys.argv[1:]"
    return program(
        sys.executable, "-c", f"{block}; runpy.run_path(sys.argv[0], run_name='__main__')", "examples/embed.py"
    )


@pytest.fixture(scope="session")
def artifacts(
    tiny_artifacts: Callable[[str], Artifact],
    shared_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Artifact]:
    """An artifact by model and precision, exported once."""
    made: dict[str, Artifact] = {}

    def get(model: str, precision: str) -> Artifact:
        if model != STORY:
            return tiny_artifacts(precision)
        if precision not in made:
            from exporter.pipeline import ExportRequest, export

            out = tmp_path_factory.mktemp("story") / precision
            export(ExportRequest(checkpoint=shared_model(model), out=out, precision=precision, verify=False))
            made[precision] = open_artifact(out)
        return made[precision]

    return get


def ours(artifact: Artifact, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Prompt ids, our own runner's greedy ids without stop ids, and the stop ids."""
    tokenizer, stop_ids = Tokenizer(artifact.folder), read_stop_ids(artifact.folder)
    prompts = [tokenizer.encode(text) for text in texts]
    with open_runner(artifact, device="cpu") as runner:
        found = generate(runner, prompts, NEW_TOKENS, stop_ids=stop_ids).token_ids
    return prompts, [[token for token in ids if token not in stop_ids] for ids in found], stop_ids


def join(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it printed, having done well and in silence: ONNX Runtime warns when the cache is copied."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(("model", "precision"), CASES)
@pytest.mark.parametrize("rows", [1, None])
def test_cpp_gives_our_ids(
    model: str, precision: str, rows: int | None, cpp: Program, artifacts: Callable[[str, str], Artifact]
) -> None:
    """A prompt alone, and rows of different lengths."""
    artifact = artifacts(model, precision)
    prompts, expected, stop_ids = ours(artifact, TEXTS[model][:rows])
    options = ["--stop-ids", join(stop_ids), "--max-new-tokens", str(NEW_TOKENS)]
    assert lines(cpp(artifact.folder, *map(join, prompts), *options)) == [join(ids) for ids in expected]


@pytest.mark.parametrize(("model", "precision"), CASES)
@pytest.mark.parametrize("rows", [1, None])
def test_javascript_gives_our_ids(
    model: str, precision: str, rows: int | None, js: Program, artifacts: Callable[[str, str], Artifact]
) -> None:
    """The same from text, which it tokenizes itself."""
    artifact, texts = artifacts(model, precision), TEXTS[model][:rows]
    _, expected, _ = ours(artifact, texts)
    options = ["--ids", "--max-new-tokens", str(NEW_TOKENS)]
    assert lines(js(artifact.folder, *texts, *options)) == [join(ids) for ids in expected]


@pytest.mark.parametrize("language", ["python", "js"])
def test_programs_print_text(
    language: str, request: pytest.FixtureRequest, artifacts: Callable[[str, str], Artifact]
) -> None:
    """Of a model whose words begin with spaces, and as transformers continued it."""
    run: Program = request.getfixturevalue(language)
    artifact = artifacts(STORY, "fp32")
    assert lines(run(artifact.folder, "Once upon a time", "--max-new-tokens", "21")) == [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine."
    ]


def test_cpp_gives_the_ids_of_transformers(
    cpp: Program, artifacts: Callable[[str, str], Artifact], shared_model: Callable[[str], Path]
) -> None:
    """Those that lie beside the shared model."""
    reference = json.loads((shared_model(STORY) / "expected.json").read_text())
    expected = reference["greedy_ids"]
    prompt, count = join(reference["input_ids"]), str(len(expected))
    assert lines(cpp(artifacts(STORY, "fp32").folder, prompt, "--max-new-tokens", count)) == [join(expected)]


def test_cpp_fills_the_cache(cpp: Program, tiny_artifact: Artifact) -> None:
    """To its last slot, with a row beside it that is shorter."""
    prompts = [Tokenizer(tiny_artifact.folder).encode(text) for text in ("9+9=", "2")]
    with open_runner(tiny_artifact, device="cpu") as runner:
        count = runner.cache_spec.max_len - len(prompts[0]) + 1
        expected = generate(runner, prompts, count).token_ids
    done = cpp(tiny_artifact.folder, *map(join, prompts), "--max-new-tokens", str(count))
    assert lines(done) == [join(ids) for ids in expected]
    assert len(expected[0]) == count


MISTAKES: list[tuple[str, list[str], str]] = [
    ("python", ["ARTIFACT"], "the following arguments are required: text"),
    ("python", ["NOWHERE", "9+9="], "nowhere does not exist: pass the folder that `export-llm export` wrote"),
    ("python", ["ARTIFACT", "9+9=", "--max-new-tokens", "500"], "this artifact holds 128: ask for at most 124"),
    ("cpp", ["ARTIFACT"], "usage: embed ARTIFACT IDS..."),
    ("cpp", ["ARTIFACT", "1,x"], "expected a whole number, or several as in 1,21,26, got 'x'"),
    ("cpp", ["ARTIFACT", "1,100"], "token id 100 is outside the vocabulary: ids are below 100"),
    ("cpp", ["ARTIFACT", "1,28", "--max-new-tokens", "500"], "cache holds 128 tokens: 2 of the longest prompt and 500"),
    ("cpp", ["NOWHERE", "1"], "nowhere/decoder.onnx failed. File doesn't exist"),
    ("cpp", ["VISION", "1"], "takes cross_attention_mask, which is no static key/value cache"),
    ("cpp", ["BF16", "1"], "Could not find an implementation for MatMul"),
    ("cpp", ["BF16", "1"], "on the CPU, export without bf16 or nvfp4"),
    ("js", ["ARTIFACT"], "usage: node embed.mjs ARTIFACT TEXT..."),
    ("js", ["ARTIFACT", "9+9=", "--max-new-tokens", "x"], "usage: node embed.mjs ARTIFACT TEXT..."),
    ("js", ["ARTIFACT", "9+9=", "--max-new-tokens", "500"], "cache holds 128 tokens: 5 of the longest prompt and 500"),
    ("js", ["NOWHERE", "9+9="], "nowhere/decoder.onnx failed. File doesn't exist"),
    ("js", ["VISION", "9+9="], "takes cross_attention_mask, which is no static key/value cache"),
    ("js", ["BF16", "9+9="], "on the CPU, export without bf16 or nvfp4"),
]


@pytest.mark.parametrize(("language", "arguments", "message"), MISTAKES)
def test_mistakes_get_one_message(
    language: str,
    arguments: list[str],
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_artifacts: Callable[[str], Artifact],
) -> None:
    """Exit code 2, and no traceback."""
    run: Program = request.getfixturevalue(language)
    folders: dict[str, Callable[[], Path]] = {
        "ARTIFACT": lambda: tiny_artifacts("fp32").folder,
        "BF16": lambda: tiny_artifacts("bf16").folder,
        "VISION": lambda: request.getfixturevalue("tiny_vision_artifact").folder,
        "NOWHERE": lambda: tmp_path / "nowhere",
    }
    done = run(*(str(folders[word]()) if word in folders else word for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("embed")]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "expected an artifact, a text and its pictures"), (["nowhere", "x"], "nowhere does not exist")],
)
def test_mistakes_with_pictures(arguments: list[str], message: str) -> None:
    done = program(sys.executable, "examples/embed_vision.py")(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("embed: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_python_program_imports_no_exporter() -> None:
    """It is made of runtimes, numpy and the standard library."""
    tree = ast.parse((EXAMPLES / "embed.py").read_text())
    found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    others = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert others == {"numpy", "runtimes"}


def test_packages_are_pinned() -> None:
    """Exact versions, and a lock file that says what each must hash to but not where it was downloaded."""
    folder = EXAMPLES / "embed_js"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert locked[""]["dependencies"] == wanted
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in entry and "resolved" not in entry for path, entry in locked.items() if path)
    assert re.search(
        r"HEADERS := \S+==\S+ --hash=sha256:[0-9a-f]{64}\n", (EXAMPLES / "embed_cpp" / "Makefile").read_text()
    )


# -- docs/embedding.md

SETUP = ("make -C", "npm ci")  # how the fixtures' programs came to be where they are


def sessions() -> list[tuple[str, str]]:
    """(command, what the page shows of its output), in order."""
    found = []
    for block in re.findall(r"```text\n(.*?)```", DOC, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "output"), [pair for pair in sessions() if not pair[0].startswith(SETUP)])
def test_the_commands_shown_are_real(
    command: str, output: str, request: pytest.FixtureRequest, tiny_artifact: Artifact, tiny_vision_artifact: Artifact
) -> None:
    """Every one prints what the page says."""
    if "embed_js" in command:
        request.getfixturevalue("js")
    if "embed_cpp" in command:
        command = command.replace("examples/embed_cpp/build/embed", str(request.getfixturevalue("cpp_path")))
    command = command.replace("demo-out", str(tiny_artifact.folder))
    command = command.replace("demo-vision", str(tiny_vision_artifact.folder))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", output)


def test_the_hash_check_sees_a_changed_file(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """The command that the page gives fails, and names the file."""
    (command,) = (command for command, _ in sessions() if "sha256sum" in command)
    shutil.copytree(tiny_artifact.folder, tmp_path / "demo-out")
    with (tmp_path / "demo-out" / "config.json").open("a") as file:
        file.write(" ")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "config.json: FAILED" in done.stdout


def calls(first: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, inputs) of each row of the table whose first call is named so."""
    (table,) = (table for table in re.findall(r"(?:^\|.*\n)+", DOC, re.MULTILINE) if f"\n| {first} |" in table)
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [(row[0], dict(zip(header[1:], map(json.loads, row[1:]), strict=True))) for row in rows]


@pytest.fixture
def call(tiny_artifact: Artifact) -> Callable[..., np.ndarray]:
    """The page's own Python, with a new cache."""
    (block,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("demo-out", str(tiny_artifact.folder)), names)
    return names["call"]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Callable[[list[int]], np.ndarray]:
    """Logits after these ids, by transformers."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].numpy()

    return logits


def test_the_calls_shown_compute_the_model(
    call: Callable[..., np.ndarray], reference: Callable[[list[int]], np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    """A ragged prefill, and steps of rows of which one ends, give transformers' logits of each row alone."""
    prefill, decode, after_end = calls("prefill")
    rows = [[1, 28, 14, 27], [1, 21]]
    assert_close(call(**prefill[1])[:, 0], [reference(row) for row in rows])
    rows = [[*rows[0], 32], [*rows[1], 26]]
    assert_close(call(**decode[1])[:, 0], [reference(row) for row in rows])
    assert_close(call(**after_end[1])[:1, 0], [reference([*rows[0], 20])])
    assert "in-place" not in capfd.readouterr().err


def test_the_chunks_shown_compute_the_model(
    call: Callable[..., np.ndarray], reference: Callable[[list[int]], np.ndarray]
) -> None:
    """The first chunk holds the end of the second row, the second that of the first."""
    first, second = calls("chunk 1")
    assert_close(call(**first[1])[1:, 0], [reference([1, 21])])
    assert_close(call(**second[1])[:1, 0], [reference([1, 28, 14, 27])])


def assert_close(logits: np.ndarray, expected: Sequence[np.ndarray]) -> None:
    """Within float32 rounding of logits of about 10."""
    np.testing.assert_allclose(logits, np.stack(expected), atol=2e-4, rtol=0)
