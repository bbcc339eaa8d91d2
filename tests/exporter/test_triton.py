"""Model repositories for Triton: parsed by its protobuf, and served, as it would, to its own client."""

import dataclasses
import errno
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from exporter.packaging import triton as packager
from exporter.packaging.pbtxt import to_text
from exporter.packaging.request import Package, PackageRequest
from exporter.packaging.triton_config import cache_states
from exporter.pipeline import ExportRequest, export
from exporter.progress import Quiet
from runtimes.artifact import MANIFEST, Artifact, EngineEntry, engine_key, file_entry, open_artifact
from runtimes.generation import generate, read_stop_ids
from runtimes.images import show_images
from runtimes.runner import open_runner
from runtimes.signature import CacheSpec, GraphSignature, StateSpec, TensorSpec
from runtimes.tokenizer import Tokenizer

grpcclient = pytest.importorskip("tritonclient.grpc")
text_format = pytest.importorskip("google.protobuf.text_format")
from triton_server import LoadError, Request, RequestError, SimulatedModel, read_config, serve  # noqa: E402
from tritonclient.grpc import model_config_pb2  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("27+58=", "reverse planet=", "sort 52914=")


def pack(artifact: Artifact, repository: Path, **options: Any) -> Package:
    request = PackageRequest(artifact=artifact.folder, out=repository, **options)
    return packager.package(request, Quiet())


@pytest.fixture(scope="module")
def client_program() -> ModuleType:
    """examples/triton_client.py"""
    spec = importlib.util.spec_from_file_location("triton_client", ROOT / "examples" / "triton_client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_artifact: Artifact) -> Path:
    """One model, `tiny`. Do not change it."""
    out = tmp_path_factory.mktemp("triton") / "repository"
    pack(tiny_artifact, out, name="tiny")
    return out


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[tuple[str, SimulatedModel]]:
    with serve(repository) as (url, models):
        yield url, models["tiny"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Artifact]:
    """tiny_llama in other layouts; each is made once."""

    @functools.cache
    def make(layout: str) -> Artifact:
        out = tmp_path_factory.mktemp("layouts") / layout
        export(ExportRequest(checkpoint=tiny_llama, out=out, layout=layout, verify=False))
        return open_artifact(out)

    return make


def own_ids(artifact: Artifact, texts: tuple[str, ...], max_new_tokens: int = 32) -> list[list[int]]:
    """What our own runner generates, text by text."""
    tokenizer, stop_ids = Tokenizer(artifact.folder), read_stop_ids(artifact.folder)
    with open_runner(artifact, device="cpu") as runner:
        prompts = [tokenizer.encode(text) for text in texts]
        return [generate(runner, [ids], max_new_tokens, stop_ids=stop_ids).token_ids[0] for ids in prompts]


def client_ids(
    program: ModuleType, repository: Path, artifact: Artifact, texts: tuple[str, ...], max_new_tokens: int = 32
) -> list[list[int]]:
    """What Triton's own client receives from a server that knows the repository only."""
    tokenizer = Tokenizer(artifact.folder)
    with serve(repository) as (url, models), grpcclient.InferenceServerClient(url) as client:
        (name,) = models
        model = program.describe(client, name)
        made = [program.generate(client, model, tokenizer.encode(text), max_new_tokens) for text in texts]
        assert not models[name].sequences, "a text's cache is freed when it ends"
        return made


def test_config_says_what_the_graph_is(repository: Path, tiny_artifact: Artifact) -> None:
    """Against onnxruntime's own view of the file: every input and output once, dtypes, and dims without the batch."""
    config = read_config(repository / "tiny")
    session = ort.InferenceSession(repository / "tiny" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    states = config.sequence_batching.state
    listed = [tensor.name for tensor in config.input] + [state.input_name for state in states]
    assert sorted(listed) == sorted(value.name for value in session.get_inputs())
    listed = [tensor.name for tensor in config.output] + [state.output_name for state in states]
    assert sorted(listed) == sorted(value.name for value in session.get_outputs())
    assert len(states) == 2 * 3  # layers
    assert {tuple(state.dims) for state in states} == {(2, 128, 32)}  # key/value heads, max_len, head_dim
    assert all(state.use_same_buffer_for_input_output for state in states)
    (write_indices,) = (tensor for tensor in config.input if tensor.name == "write_indices")
    assert list(write_indices.dims) == [1]
    assert write_indices.HasField("reshape")
    assert list(write_indices.reshape.shape) == []
    assert config.max_batch_size == tiny_artifact.manifest.max_batch == 8
    assert config.sequence_batching.oldest.max_candidate_sequences == 8
    assert config.sequence_batching.max_sequence_idle_microseconds == 60_000_000
    assert config.version_policy.latest.num_versions == 1
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_AUTO)
    texts = {key: value.string_value for key, value in config.parameters.items()}
    assert texts == {
        "layout": "portable",
        "precision": "fp32",
        "max_len": "128",
        "vocab_size": "100",
        "stop_ids": "2",
        "cache_bytes_per_sequence": str(3 * 2 * 2 * 128 * 32 * 4),
        "empty_slots": "0",
    }


def test_float32_is_not_tf32(repository: Path, tmp_path: Path, tiny_artifacts: Callable[[str], Artifact]) -> None:
    """The CUDA provider is told so where the precision promises it, and nothing where it does not."""
    (cuda,) = read_config(repository / "tiny").optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})
    pack(tiny_artifacts("fp16"), tmp_path, name="half")
    config = read_config(tmp_path / "half")
    assert not config.HasField("optimization")
    assert {state.data_type for state in config.sequence_batching.state} == {model_config_pb2.TYPE_FP16}


def test_options_reach_the_config(x_run: Callable[..., Any], tmp_path: Path, tiny_artifact: Artifact) -> None:
    """The command's; and its two ways to tell what it wrote."""
    options = ("--device", "cpu", "--threads", 3, "--max-sequences", 20, "--idle-timeout", 1.5, "--name", "other")
    ran = x_run("package", tiny_artifact.folder, "-o", tmp_path, *options, "--quiet", "--json")
    assert ran.code == 0, ran.err
    config = read_config(tmp_path / "other")
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert config.sequence_batching.oldest.max_candidate_sequences == 20
    assert config.sequence_batching.max_sequence_idle_microseconds == 1_500_000
    (model,) = json.loads(ran.out)["models"]
    assert (model["name"], model["states"]) == ("other", 6)
    assert model["files"] == {
        str(path.relative_to(tmp_path / "other")): path.stat().st_size
        for path in (tmp_path / "other").rglob("*")
        if path.is_file()
    }
    ran = x_run("package", tiny_artifact.folder, "-o", tmp_path, "--quiet")
    assert "kept by the server   6 tensors, zero at first" in ran.out
    assert tiny_artifact.folder.name in ran.out


def test_the_simulated_server_refuses_what_triton_would(repository: Path, tmp_path: Path) -> None:
    """What the other tests rest on: each mistake in a config.pbtxt is seen at load, as it would be there."""
    good = (repository / "tiny" / "config.pbtxt").read_text()
    folder = tmp_path / "tiny"
    (folder / "1").mkdir(parents=True)
    for file in (repository / "tiny" / "1").iterdir():
        (folder / "1" / file.name).write_bytes(file.read_bytes())
    for old, new, problem in (
        ('name: "tiny"', 'name: "large"', "directory name"),
        ('"onnxruntime_onnx"', '"tensorrt_plan"', "pair"),
        ('input { name: "logit_indices" data_type: TYPE_INT64 dims: [-1] }', "", "number of inputs"),
        ("data_type: TYPE_FP32 dims: [-1, 100]", "data_type: TYPE_FP16 dims: [-1, 100]", "not TYPE_FP16"),
        ("dims: [-1, 100]", "dims: [1, 100]", "expects shape"),
        (" reshape { shape: [] }", "", "expects shape"),
        ("      dims: [2, 128, 32]\n", "      dims: [2, -1, 32]\n", "variable dimensions"),
        ("      zero_data: true\n", "", "state_data"),
    ):
        assert old in good
        (folder / "config.pbtxt").write_text(good.replace(old, new))
        with pytest.raises(LoadError, match=problem):
            SimulatedModel(folder)
    (folder / "config.pbtxt").write_text(good)
    model = SimulatedModel(folder)
    arrays = {name: np.zeros((1, 1), np.int64) for name in ("input_ids", "position_ids", "write_indices")}
    arrays |= {"attention_mask": np.ones((1, 1), np.int64), "logit_indices": np.zeros((1, 1), np.int64)}
    with pytest.raises(RequestError, match="START flag"):
        model.infer(Request(inputs=arrays, sequence_id=7))
    with pytest.raises(RequestError, match="correlation ID"):
        model.infer(Request(inputs=arrays, start=True))


def test_greedy_ids_are_our_runners(repository: Path, client_program: ModuleType, tiny_artifact: Artifact) -> None:
    """The cache goes through the server as its implicit state; the ids are those of our own runner, token for token."""
    expected = own_ids(tiny_artifact, TEXTS)
    assert client_ids(client_program, repository, tiny_artifact, TEXTS) == expected
    tokenizer = Tokenizer(tiny_artifact.folder)
    assert [tokenizer.decode(ids) for ids in expected] == ["85", "tenalp", "12459"]


def test_the_cache_is_filled_to_its_end(
    repository: Path, client_program: ModuleType, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    """As many tokens as there is room for, beyond which the client does not go."""
    name = "endless"
    pack(tiny_artifact, tmp_path, name=name)
    config = tmp_path / name / "config.pbtxt"
    config.write_text(
        config.read_text().replace('"stop_ids" value { string_value: "2" }', '"stop_ids" value { string_value: "" }')
    )
    tokenizer = Tokenizer(tiny_artifact.folder)
    (made,) = client_ids(client_program, tmp_path, tiny_artifact, TEXTS[:1], 1000)
    prompt = tokenizer.encode(TEXTS[0])
    assert len(made) == 128 - len(prompt) + 1
    with open_runner(tiny_artifact, device="cpu") as runner:
        assert made == generate(runner, [prompt]).token_ids[0]
    with serve(tmp_path) as (url, _), grpcclient.InferenceServerClient(url) as client:
        model = client_program.describe(client, name)
        with pytest.raises(SystemExit, match="the prompt has 129 tokens; endless holds 1 to 128"):
            client_program.generate(client, model, [5] * 129)


def test_texts_in_one_batch_do_not_disturb_each_other(
    repository: Path, client_program: ModuleType, tiny_artifact: Artifact
) -> None:
    """Two sequences in work at once, batched by the server whenever their requests have equal shapes."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    texts = ("27+58=", "11+12=", "reverse planet=")
    prompts = [tokenizer.encode(text) for text in texts]
    assert len(prompts[0]) == len(prompts[1]) != len(prompts[2])
    server = SimulatedModel(repository / "tiny")
    config = server.config
    fields = {key: value.string_value for key, value in config.parameters.items()}
    model = client_program.Model(
        name="tiny",
        inputs=tuple(tensor.name for tensor in config.input),
        max_len=int(fields["max_len"]),
        stop_ids=frozenset(),
        empty_slots=0,
        mask_step=client_program.MASK_STEP,
    )
    lengths, tokens, made = [0, 0, 0], prompts, [[], [], []]
    for step in range(3):
        arrays = [client_program.step_arrays(model, tokens[row], lengths[row]) for row in range(3)]
        asked = [Request(inputs=arrays[row], sequence_id=row + 1, start=step == 0) for row in range(3)]
        # Prompts of another length cannot be batched; afterwards, masks are of equal length, so all three can.
        batches = (asked[:2], asked[2:]) if step == 0 else (asked,)
        results = [result for batch in batches for result in server.infer_batch(batch)]
        lengths = [length + len(each) for length, each in zip(lengths, tokens, strict=True)]
        tokens = [[int(result["logits"][0, -1].argmax())] for result in results]
        made = [[*ids, *new] for ids, new in zip(made, tokens, strict=True)]
    assert server.batch_sizes == [2, 1, 3, 3]
    with open_runner(tiny_artifact, device="cpu") as runner:
        assert made == [generate(runner, [prompt], 3).token_ids[0] for prompt in prompts]


def test_a_trained_model(shared_model: Callable[[str], Path], tmp_path: Path, client_program: ModuleType) -> None:
    """stories15m: 64 tokens."""
    export(ExportRequest(checkpoint=shared_model("stories15m-llama"), out=tmp_path / "artifact", verify=False))
    artifact = open_artifact(tmp_path / "artifact")
    pack(artifact, tmp_path / "repository", name="stories")
    texts = ("Once upon a time", "The little dog")
    made = client_ids(client_program, tmp_path / "repository", artifact, texts, 64)
    assert [len(ids) for ids in made] == [64, 64]
    assert made == own_ids(artifact, texts, 64)


def test_half_precision(tmp_path: Path, client_program: ModuleType, tiny_artifacts: Callable[[str], Artifact]) -> None:
    """float16 states."""
    artifact = tiny_artifacts("fp16")
    pack(artifact, tmp_path, name="half")
    assert client_ids(client_program, tmp_path, artifact, TEXTS) == own_ids(artifact, TEXTS)


def test_the_example_program(served: tuple[str, SimulatedModel], tiny_artifact: Artifact) -> None:
    """As a reader starts it."""
    url, _ = served
    program = ROOT / "examples" / "triton_client.py"
    command = [sys.executable, program, tiny_artifact.folder, *TEXTS[:2], "--model", "tiny", "--url", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "27+58=85\nreverse planet=tenalp\n"


@pytest.mark.parametrize("layout", ["dynamic", "genai"])
def test_other_layouts(
    layout: str, layouts: Callable[[str], Artifact], tmp_path: Path, client_program: ModuleType
) -> None:
    """A cache that grows begins with a slot that holds nothing, which the client masks; a fused one has one size."""
    artifact = layouts(layout)
    pack(artifact, tmp_path, name="tiny")
    config = read_config(tmp_path / "tiny")
    grows = layout == "dynamic"
    for state in config.sequence_batching.state:
        assert list(state.dims) == [2, -1 if grows else 128, 32]
        assert list(state.initial_state[0].dims) == [2, 1 if grows else 128, 32]
        assert state.use_same_buffer_for_input_output != grows
    assert config.parameters["empty_slots"].string_value == ("1" if grows else "0")
    assert client_ids(client_program, tmp_path, artifact, TEXTS) == own_ids(artifact, TEXTS)


def test_an_empty_slot_that_is_not_masked_is_seen(
    layouts: Callable[[str], Artifact], tmp_path: Path, client_program: ModuleType
) -> None:
    """What `empty_slots` is for: without it, the logits are others."""
    pack(layouts("dynamic"), tmp_path, name="tiny")
    server = SimulatedModel(tmp_path / "tiny")
    inputs = tuple(tensor.name for tensor in server.config.input)
    common = {"name": "tiny", "inputs": inputs, "max_len": 128, "stop_ids": frozenset(), "mask_step": 1}
    arrays = client_program.step_arrays(client_program.Model(empty_slots=1, **common), [5, 6, 7], 0)
    masked = server.infer(Request(inputs=arrays, sequence_id=1, start=True, end=True))["logits"]
    arrays["attention_mask"] = np.ones_like(arrays["attention_mask"])
    seen = server.infer(Request(inputs=arrays, sequence_id=1, start=True, end=True))["logits"]
    assert np.abs(masked - seen).max() > 0.01


def test_pictures(
    tiny_vision: Path, tiny_vision_artifact: Artifact, tmp_path: Path, client_program: ModuleType
) -> None:
    """Two models: the encoder keeps nothing, and the decoder takes its keys and values as inputs in every request."""
    made = pack(tiny_vision_artifact, tmp_path, name="seer")
    assert [model.name for model in made.models] == ["seer", "seer_vision_encoder"]
    decoder, encoder = SimulatedModel(tmp_path / "seer"), SimulatedModel(tmp_path / "seer_vision_encoder")
    assert not encoder.config.HasField("sequence_batching")
    fields = {key: value.string_value for key, value in decoder.config.parameters.items()}
    assert fields["vision_encoder"] == "seer_vision_encoder"
    assert int(fields["bytes_per_image"]) == tiny_vision_artifact.manifest.vision.bytes_per_image

    tokenizer = Tokenizer(tiny_vision_artifact.folder)
    prompt = tokenizer.encode("<|image|>where is the triangle?")
    images = show_images(tiny_vision_artifact, [prompt], [[tiny_vision / "picture.png"]])
    assert images is not None
    stop_ids = read_stop_ids(tiny_vision_artifact.folder)
    with open_runner(tiny_vision_artifact, device="cpu") as runner:
        expected = generate(runner, [prompt], 8, images=images, stop_ids=stop_ids).token_ids[0]
    assert tokenizer.decode(expected) == "bottom right"

    seen = encoder.infer(Request(inputs=images.encoder_feeds()))
    names = tuple(tensor.name for tensor in decoder.config.input)
    text_inputs = tuple(name for name in names if not name.startswith("cross_"))
    model = client_program.Model(
        name="seer", inputs=text_inputs, max_len=int(fields["max_len"]), stop_ids=(), empty_slots=0, mask_step=1
    )
    tokens, length, ids = prompt, 0, []
    sight = images.cross_attention_mask
    while len(ids) < 8:
        arrays = client_program.step_arrays(model, tokens, length) | seen | {"cross_attention_mask": sight}
        logits = decoder.infer(Request(inputs=arrays, sequence_id=3, start=length == 0))["logits"]
        length += len(tokens)
        tokens, sight = [int(logits[0, -1].argmax())], images.last_mask([len(prompt)])
        ids += tokens
        if tokens[0] in stop_ids:
            break
    assert ids == expected
    with pytest.raises(
        SystemExit, match=r"seer takes cross_attention_mask, .*: this client is for models that read text"
    ):
        client_program.step_arrays(dataclasses.replace(model, inputs=names), [5], 0)


def test_weights_of_a_checkpoint_in_place(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """A graph that points into the checkpoint's own files takes along what it points into, and nothing else."""
    checkpoint = x_one_layer()
    export(ExportRequest(checkpoint=checkpoint, out=checkpoint, weights="reference", verify=False))
    pack(open_artifact(checkpoint), tmp_path / "repository", name="here")
    version = tmp_path / "repository" / "here" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["model.onnx", "model.safetensors"]
    assert (version / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    SimulatedModel(version.parent)


def test_quantized_weights_load(tmp_path: Path, tiny_artifacts: Callable[[str], Artifact]) -> None:
    """int4 and its scales come along."""
    pack(tiny_artifacts("int4"), tmp_path, name="small")
    SimulatedModel(tmp_path / "small")


def with_engines(artifact: Artifact, folder: Path, target: str) -> Path:
    """A copy of the artifact that lists engines of a library, whose files are stand-ins: packaging only copies them."""
    folder.mkdir()
    for name in artifact.manifest.files:
        (folder / name).write_bytes(artifact.path(name).read_bytes())
    engines, files = {}, dict(artifact.manifest.files)
    for graph in artifact.manifest.graphs:
        file = f"{graph}.{target}.engine"
        (folder / file).write_bytes(f"an engine of {graph}".encode())
        files[file] = file_entry(folder / file)
        entry = EngineEntry(file=file, graph=graph, target=target, library_version="11.0", gpu_archs=())
        engines[engine_key(target, graph)] = entry
    manifest = dataclasses.replace(artifact.manifest, engines=engines, files=files)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def test_engines(tmp_path: Path, tiny_vision_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """Plans of both graphs, with the profiles that they were built with, on GPUs only; and what to expect of them."""
    folder = with_engines(tiny_vision_artifact, tmp_path / "artifact", "tensorrt")
    ran = x_run("package", folder, "-o", tmp_path / "repository", "--runtime", "tensorrt", "--name", "seer", "--quiet")
    assert ran.code == 0, ran.err
    assert "warning: the decoder's engine updates its cache in place" in ran.err
    assert "--runtime onnxruntime has no such condition" in ran.err
    for name, graph, profiles in (("seer", "decoder", ["0", "1"]), ("seer_vision_encoder", "vision_encoder", [])):
        plan = tmp_path / "repository" / name / "1" / "model.plan"
        assert plan.read_text() == f"an engine of {graph}"
        assert [path.name for path in plan.parent.iterdir()] == ["model.plan"]
        config = read_config(plan.parent.parent)
        assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
        (group,) = config.instance_group
        assert (group.kind, list(group.profile)) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, profiles)
        assert not config.HasField("optimization")
        signature = tiny_vision_artifact.manifest.graphs[graph].signature
        listed = [tensor.name for tensor in config.input]
        listed += [state.input_name for state in config.sequence_batching.state]
        assert sorted(listed) == sorted(spec.name for spec in signature.inputs)


def test_engines_that_are_not_there(tmp_path: Path, tiny_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """None, or of the library that Triton does not have."""
    ran = x_run("package", tiny_artifact.folder, "-o", tmp_path / "out", "--runtime", "tensorrt", "--quiet")
    ran.refused("holds no engine for --runtime tensorrt (engines: none)", "export it with --target tensorrt")
    folder = with_engines(tiny_artifact, tmp_path / "artifact", "tensorrt-rtx")
    ran = x_run("package", folder, "-o", tmp_path / "out", "--runtime", "tensorrt", "--quiet")
    ran.refused("(engines: tensorrt-rtx)")
    ran = x_run("package", folder, "-o", tmp_path / "out", "--runtime", "tensorrt-rtx", "--quiet")
    ran.refused("loads engines of TensorRT, not of TensorRT-RTX", "--runtime onnxruntime")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "vllm"), ("unknown --format 'vllm'", "triton")),
        (("--runtime", "openvino"), ("unknown --runtime 'openvino'", "onnxruntime, tensorrt")),
        (("--device", "tpu"), ("--device must be cpu or cuda", "'tpu'")),
        (("--runtime", "tensorrt", "--device", "cpu"), ("--device must be cuda for --runtime tensorrt",)),
        (("--runtime", "tensorrt", "--threads", "2"), ("--threads 2 is for --runtime onnxruntime",)),
        (("--threads", "0"), ("--threads must be at least 1, got 0",)),
        (("--max-sequences", "0"), ("--max-sequences must be at least 1, got 0",)),
        (("--idle-timeout", "0"), ("--idle-timeout must be above 0 seconds",)),
        (("--name", "a/b"), ("'a/b' cannot be a Triton model's name", "--name")),
        (("--name", ".hidden"), ("cannot be a Triton model's name",)),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, tiny_artifact: Artifact, x_run: Callable[..., Any]
) -> None:
    """Each is named, with what would do; nothing is written."""
    x_run("package", tiny_artifact.folder, "-o", tmp_path / "out", *options, "--quiet").refused(*words)
    assert not (tmp_path / "out").exists()


def test_bfloat16_states(tmp_path: Path, tiny_artifacts: Callable[[str], Artifact], x_run: Callable[..., Any]) -> None:
    """Triton's ONNX Runtime backend passes none on."""
    ran = x_run("package", tiny_artifacts("bf16").folder, "-o", tmp_path / "out", "--quiet")
    ran.refused("passes no bfloat16 tensors on", "(bf16)", "--precision fp16 or fp32")


def test_what_is_there_is_kept(
    tmp_path: Path, tiny_artifact: Artifact, x_run: Callable[..., Any], x_snapshot: Callable[[Path], Any]
) -> None:
    """A model of that name is replaced with --force only, and only when packaging made it; others are never touched."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.pbtxt").write_text("the user's own")
    command = ("package", tiny_artifact.folder, "-o", tmp_path, "--name", "tiny", "--quiet")
    assert x_run(*command).code == 0
    before = x_snapshot(tmp_path)
    x_run(*command).refused("exists: pass --force to replace that model")
    assert x_snapshot(tmp_path) == before
    assert x_run(*command, "--force", "--threads", 2).code == 0
    after = x_snapshot(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"tiny/config.pbtxt"}
    assert before.keys() == after.keys()
    (tmp_path / "tiny" / "2").mkdir()
    x_run(*command, "--force").refused("is left alone, because no packaging made it (it holds 2)")
    (tmp_path / "file").write_text("")
    x_run(*command[:-2], "file", "--force").refused("exists and is no folder")
    x_run("package", tiny_artifact.folder, "-o", tmp_path / "file").refused(
        "is no folder: -o names the model repository"
    )
    out = tiny_artifact.folder / "repository"
    x_run("package", tiny_artifact.folder, "-o", out).refused("lies in the artifact itself")


def test_whole_or_not_at_all(
    tmp_path: Path, tiny_vision_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, x_snapshot: Callable[[Path], Any]
) -> None:
    """The disk is full at the second model's weights: neither appears."""
    (tmp_path / "other").mkdir()
    before = x_snapshot(tmp_path)
    copied = []

    def copy(source: Path, target: Path, progress: Any) -> None:
        copied.append(target)
        if len(copied) == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(packager, "copy_file", copy)
    with pytest.raises(OSError, match="No space left"):
        pack(tiny_vision_artifact, tmp_path, name="seer")
    assert len(copied) == 4
    assert x_snapshot(tmp_path) == before


def test_a_damaged_artifact(tmp_path: Path, tiny_artifact: Artifact, x_run: Callable[..., Any]) -> None:
    """Hashes are checked before anything is copied."""
    folder = Path(shutil.copytree(tiny_artifact.folder, tmp_path / "artifact"))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    x_run("package", folder, "-o", tmp_path / "out", "--quiet").refused("model.safetensors has changed")
    assert not (tmp_path / "out").exists()


def test_parity_that_failed_is_not_kept_back(
    tmp_path: Path, tiny_artifact: Artifact, x_run: Callable[..., Any]
) -> None:
    """Packaging does not judge, but says so."""
    folder = with_engines(tiny_artifact, tmp_path / "artifact", "tensorrt")
    manifest = open_artifact(folder).manifest
    failed = dataclasses.replace(manifest, parity={"passed": False, "runtimes": [], "not_run": {}})
    (folder / MANIFEST).write_text(failed.to_json())
    ran = x_run("package", folder, "-o", tmp_path / "out", "--quiet")
    assert ran.code == 0
    assert "warning: this artifact failed parity" in ran.err


def test_sums_are_states_of_their_own() -> None:
    """What a layer carries without slots: read after it is written, so past and present need two buffers."""
    shapes = {"key": (2, 8, 4), "sum": (2, 4)}
    tensors = tuple(
        StateSpec(layer=0, name=name, dtype="float32", shape=shape, slot_axis=1 if name == "key" else None)
        for name, shape in shapes.items()
    )
    cache = CacheSpec(max_len=8, dtype="float16", tensors=tensors)
    past, present = (
        tuple(
            TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.symbolic_shape())
            for name, tensor in zip(names, tensors, strict=True)
        )
        for names in (cache.past_names(), cache.present_names())
    )
    aliases = {"present.0.key": "past_key_values.0.key"}
    signature = GraphSignature(inputs=past, outputs=present, dims={}, aliases=aliases, limits={})
    key, total = cache_states(signature, cache)
    assert (key["dims"], key.get("use_same_buffer_for_input_output")) == ([2, 8, 4], True)
    assert (total["dims"], total.get("use_same_buffer_for_input_output")) == ([2, 4], None)
    assert total["initial_state"]["dims"] == [2, 4]
    assert (total["input_name"], total["output_name"]) == ("past_key_values.0.sum", "present.0.sum")


def test_text_format_survives_odd_strings() -> None:
    """Read back by the real parser."""
    odd = 'quotes " and \\ and é, 日本, a tab\t, a line\n and \x01'
    config = text_format.Parse(to_text({"name": odd, "metric_tags": []}), model_config_pb2.ModelConfig())
    assert config.name == odd
