"""Some hostile input for every reader, as `python -m tests.torture` makes it; and each bug that it found."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image
from safetensors.torch import save_file

from exporter.bench.engines.onnxruntime_genai import graph_of
from exporter.clients import Renaming
from exporter.compare import compare_artifacts
from exporter.errors import ExportError
from exporter.genai_config import _special_tokens
from exporter.packaging.triton import _external_files
from exporter.pipeline import ExportRequest, export
from exporter.quality import read_tasks
from exporter.source import read_source, small_files
from graphs import files as graph_files
from graphs.checkpoint import SINGLE_FILE, open_checkpoint
from graphs.errors import CheckpointError
from runtimes import errors as runtime_errors
from runtimes import files as runtime_files
from runtimes.artifact import foreign_files, is_artifact, open_artifact
from runtimes.errors import ArtifactError, FeedError
from runtimes.golden import check_golden, load_golden
from runtimes.image_config import read_image_keys
from runtimes.images import FORMATS, ImageProcessor
from runtimes.onnxruntime_session import OnnxRuntime
from runtimes.parity import ParitySummary
from runtimes.prefix_file import load_prefix
from runtimes.quality import QualityReport
from runtimes.runner import open_runner
from runtimes.stopping import read_stop_ids
from runtimes.tokenizer import Tokenizer
from runtimes.torch_package import read_facts
from runtimes.widen import expand_float4, external_file
from tests.torture.guard import Guard
from tests.torture.readers import READERS
from tests.torture.run import BUGS, bugs, run
from tests.torture.seeds import LLAMA, seal, weights, write_package

CASES = 40  # of each reader; `make torture` does 10,000
DEEP = "[" * 100_000 + "]" * 100_000


def test_every_reader_accepts_or_refuses(seeds: Path, tmp_path: Path) -> None:
    """Cases of another seed than `make torture` begins with, so that the two together see more."""
    tallies = run(list(READERS), range(CASES), 20_260, seeds, tmp_path, 1)
    assert not bugs(tallies, 20_260)
    for name, tally in tallies.items():
        assert tally.counts.total() == CASES, name
        assert not any(tally.counts[verdict] for verdict in BUGS), name
        assert tally.counts["refused"], f"{name}: nothing was hostile"


def test_a_crash_a_hang_and_an_escape_are_seen(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies, one that is silent, and one that reads /etc: none is taken for a refusal."""
    from tests.torture import run as module

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time, os\n"
        "job = json.loads(sys.stdin.readline())\n"
        "first = job['first']\n"
        "print(json.dumps({'begins': first}), flush=True)\n"
        "if first == 0: os.abort()\n"
        "if first == 1: time.sleep(60)\n"
        "print(json.dumps({'ends': first, 'verdict': 'escaped', 'text': 'open /etc'}), flush=True)\n"
        "print(json.dumps({'done': True}), flush=True)\n"
    )
    worker = module.Worker(seeds, tmp_path)
    worker._command = [sys.executable, str(script)]
    monkeypatch.setattr(module, "HANG_S", 2.0)
    tally = module.Tally()
    worker.run("config.json", 0, range(3), tally)
    worker.close()
    assert [(case, verdict) for case, verdict, _ in tally.bugs] == [(0, "crashed"), (1, "hung"), (2, "escaped")]


GUARD_CASES: dict[str, Callable[[Path], object]] = {
    "reads outside": lambda folder: (folder.parent / "secret").read_bytes(),
    "reads by a link": lambda folder: (folder / "link").read_bytes(),
    "reads /etc": lambda folder: Path("/etc/hostname").exists() and Path("/etc/passwd").read_bytes(),
    "writes outside": lambda folder: (folder.parent / "new").write_bytes(b""),
    "removes outside": lambda folder: (folder.parent / "secret").unlink(),
    "starts a program": lambda folder: subprocess.run(["true"], check=True),
}


@pytest.mark.parametrize("what", GUARD_CASES)
def test_the_guard_sees_what_leaves_the_folder(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "inside").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "secret")
    guard = Guard()
    with guard.watching(folder):
        (folder / "inside").read_bytes()
        (folder / "made").write_bytes(b"")
    assert not guard.problems
    with guard.watching(folder):
        GUARD_CASES[what](folder)
    assert guard.problems


# What the fuzzers found, one by one.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_no_checkpoint(name: str, copy: Callable[[str], Path]) -> None:
    """Opening one would wait for a writer for ever."""
    folder = copy("sharded" if "index" in name else "checkpoint")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"a pipe, socket or device, expected a plain file|holds neither"):
        open_checkpoint(folder)


def test_a_pipe_is_no_picture_no_prefix_and_no_gguf(seeds: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(FeedError, match="a pipe, socket or device, expected a plain file: give the path of an image"):
        ImageProcessor(seeds / "images").open(pipe)
    with pytest.raises(ArtifactError, match=r"the prefix .* cannot be read: a pipe, socket or device"):
        load_prefix(pipe, open_artifact(seeds / "portable").manifest)
    with pytest.raises(CheckpointError, match="cannot be read: a pipe, socket or device"):
        open_checkpoint(pipe)


SMALL = ("config.json", "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize("name", SMALL)
def test_small_files_are_not_read_by_links_out_of_the_checkpoint(name: str, copy: Callable[[str], Path]) -> None:
    """A checkpoint from elsewhere could have a private file copied into what its victim publishes."""
    folder = copy("checkpoint")
    secret = folder.parent / "secret"
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out .* to {secret}: put the file itself"):
        small_files(read_source(folder, None))


def test_a_link_within_the_checkpoint_and_the_hubs_cache_are_followed(copy: Callable[[str], Path]) -> None:
    folder = copy("checkpoint")
    cache = folder.parent / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "revision")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cache / "blobs" / f"{number:040x}")
        path.symlink_to(Path("../../blobs") / f"{number:040x}")
    assert set(SMALL) <= small_files(read_source(snapshot, None)).keys()
    Tokenizer(snapshot).encode("1")
    secret = cache.parent / "secret"
    (cache / "blobs" / f"{0:040x}").rename(secret)
    (cache / "blobs" / f"{0:040x}").symlink_to(secret)  # a blob that is a link itself
    first = sorted(snapshot.iterdir())[0]
    assert graph_files.leads_out(first)
    assert runtime_files.leads_out(first, snapshot)


def test_an_artifact_is_not_read_by_links_out_of_it(copy: Callable[[str], Path]) -> None:
    for name in ("tokenizer.json", "model.safetensors", "manifest.json"):
        folder = copy("portable")
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with pytest.raises(ArtifactError, match=rf"{name} is a link that leads out of"):
            open_artifact(folder)
        shutil.rmtree(folder)


def test_an_artifact_in_the_hubs_cache_opens(copy: Callable[[str], Path]) -> None:
    folder = copy("portable")
    (folder.parent / "snapshots").mkdir()
    (folder.parent / "blobs").mkdir()
    snapshot = folder.rename(folder.parent / "snapshots" / "revision")
    for path in list(snapshot.iterdir()):
        path.rename(snapshot.parent.parent / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert open_artifact(snapshot).manifest.files


LEAVING = ("../outside.bin", "/etc/passwd", "..", "", "a/../../b", "a/b")


@pytest.mark.parametrize("location", LEAVING)
def test_external_data_lies_beside_its_graph(location: str, copy: Callable[[str], Path]) -> None:
    """Packaging for a server would have copied any file of the machine into the repository."""
    folder = copy("portable")
    graph = folder / "decoder.onnx"
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())
    (folder.parent / "outside.bin").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"has weights in \".*\", expected the name of a file beside it"):
        _external_files(graph)
    with pytest.raises(ArtifactError, match="cannot be loaded by onnxruntime"):
        OnnxRuntime("float32", device="cpu").load(graph)


def test_external_data_is_no_link_out_of_the_artifact(copy: Callable[[str], Path]) -> None:
    folder = copy("portable")
    outside = folder.parent / "outside.bin"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is a link that leads out of its folder"):
        external_file(folder / "decoder.onnx", "model.safetensors")
    with pytest.raises(ArtifactError, match="cannot be loaded by onnxruntime"):
        OnnxRuntime("float32", device="cpu").load(folder / "decoder.onnx")


@pytest.mark.parametrize("name", LEAVING)
def test_genai_config_names_a_file_of_its_folder(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("genai")
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["filename"] = name
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"model\.decoder\.filename must be a plain file name, found \""):
        graph_of(folder)


def package_with(folder: Path, **changes: Any) -> Path:
    """A package whose only constant lies elsewhere."""
    path = folder / "decoder.pt2"
    with zipfile.ZipFile(path) as file:
        (name,) = (each for each in file.namelist() if each.endswith("_metadata.json"))
        metadata = json.loads(file.read(name))
    facts = json.loads(metadata["export_llm"])
    facts["places"]["weight"] |= changes
    metadata["export_llm"] = json.dumps(facts)
    write_package(path, json.dumps(metadata).encode())
    return path


@pytest.mark.parametrize("name", LEAVING)
def test_a_package_maps_files_of_its_own_folder_only(name: str, copy: Callable[[str], Path]) -> None:
    with pytest.raises(ArtifactError, match=r"a constant lies in \".*\", expected a plain file name"):
        read_facts(package_with(copy("package"), file=name))


@pytest.mark.parametrize("change", [{"dtype": "F64"}, {"shape": [-1, 4]}, {"shape": [2**63]}, {"offset": -4}])
def test_a_package_maps_what_can_be(change: dict[str, Any], copy: Callable[[str], Path]) -> None:
    with pytest.raises(ArtifactError, match=r"is damaged, or no package that export-llm wrote \(a constant is "):
        read_facts(package_with(copy("package"), **change))


def test_files_that_a_manifest_lists_outside_are_never_looked_at(copy: Callable[[str], Path]) -> None:
    """--force would have listed the folder above, to see what else lies in OUT."""
    folder = copy("portable")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"]["config.json"]
    seal(folder, manifest)
    assert not is_artifact(folder)
    assert "secret" not in "".join(foreign_files(folder))
    with pytest.raises(ArtifactError, match=r"lists '\.\./secret', which is not a plain file name"):
        open_artifact(folder)


def test_names_too_long_for_a_file_are_missing(copy: Callable[[str], Path]) -> None:
    folder = copy("portable")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["x" * 300] = manifest["files"]["config.json"]
    seal(folder, manifest)
    with pytest.raises(ArtifactError, match="xxx is missing"):
        open_artifact(folder)


def test_deep_nesting_is_refused_everywhere(copy: Callable[[str], Path]) -> None:
    """json raises RecursionError, which is no ValueError."""
    checkpoint, images, genai = copy("checkpoint"), copy("images"), copy("genai")
    for path in (
        checkpoint / "generation_config.json",
        images / "preprocessor_config.json",
        genai / "genai_config.json",
    ):
        path.write_text(DEEP)
    with pytest.raises(ArtifactError, match=r"generation_config\.json cannot be read: maximum recursion"):
        read_stop_ids(checkpoint)
    with pytest.raises(ArtifactError, match=r"cannot be read: maximum recursion.*copy it from the checkpoint again"):
        read_image_keys(images)
    with pytest.raises(ArtifactError, match="cannot be read: maximum recursion"):
        graph_of(genai)
    save_file(weights(LLAMA), checkpoint / SINGLE_FILE, metadata={"export_llm.quantization": DEEP})
    with pytest.raises(CheckpointError, match=r"export_llm\.quantization in its header is damaged"):
        open_checkpoint(checkpoint)


def test_text_in_another_encoding_is_refused(copy: Callable[[str], Path]) -> None:
    checkpoint, text = copy("checkpoint"), copy("text")
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja cannot be read: 'utf-8' codec"):
        Renaming(files={}, config={}, template_in="tokenizer_config.json").json_files(checkpoint)
    (text / "tasks.jsonl").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"tasks\.jsonl cannot be read: 'utf-8' codec"):
        read_tasks(text)


def test_tasks_are_few_and_short(copy: Callable[[str], Path]) -> None:
    """All of them become one table, as wide as the longest: a small file must not ask for a large one."""
    path = copy("text") / "tasks.jsonl"
    line = '{"task": "a", "prompt": "b", "answer": "c"}\n'
    path.write_text(line + line.replace('"b"', '"' + "b" * 5000 + '"'))
    with pytest.raises(ExportError, match="line 2: expected at most 4096 lines of 4096 characters"):
        read_tasks(path.parent)
    path.write_text(line * 4097)
    with pytest.raises(ExportError, match="line 4097: expected at most"):
        read_tasks(path.parent)


@pytest.mark.parametrize("tokens", [{"pad_token_id": "x"}, {"eos_token_id": []}, {"bos_token_id": 1.5}])
def test_special_tokens_are_ids(tokens: dict[str, Any], copy: Callable[[str], Path]) -> None:
    folder = copy("checkpoint")
    (folder / "generation_config.json").write_text(json.dumps(tokens))
    (key,) = tokens
    with pytest.raises(ExportError, match=rf"{key} must be a token id, found .*: check generation_config\.json"):
        _special_tokens(read_source(folder, None))


@pytest.mark.parametrize("quality", [[], {"kl_mean": "x"}, {"worst_layers": 1}, {"tasks": {"sum": None}}])
def test_quality_reports_hold_numbers(quality: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("parity")
    path = folder / "parity.json"
    report = json.loads(path.read_text())
    report["quality"] = quality if isinstance(quality, list) else report["quality"] | quality
    path.write_text(json.dumps(report))
    seal(folder, json.loads((folder / "manifest.json").read_text()))
    with pytest.raises(ExportError, match=r"parity\.json is damaged: "):
        compare_artifacts([folder])


def test_a_quality_that_is_not_finite_comes_back(copy: Callable[[str], Path]) -> None:
    """It is written as null; printing it raised TypeError."""
    report = json.loads((copy("parity") / "parity.json").read_text())["quality"]
    assert f"{QualityReport.from_dict(report | {'perplexity_stored': None}).perplexity_stored:.3g}" == "nan"


@pytest.mark.parametrize("method", [[], {}, 1, True, None])
def test_quant_method_is_a_name(method: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config\.quant_method .* is not supported"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tiles", [1025, 10**9, 10**30])
def test_images_are_cut_into_few_tiles(tiles: int, copy: Callable[[str], Path]) -> None:
    """All grids of so many tiles are listed before anything is compared with the encoder's."""
    folder = copy("images")
    keys = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(keys | {"max_image_tiles": tiles}))
    with pytest.raises(ArtifactError, match=r"max_image_tiles must be a whole number from 1 to 1024, found 1"):
        ImageProcessor(folder)


def test_tokenizer_json_does_not_fill_up_nor_cut_prompts(copy: Callable[[str], Path]) -> None:
    """Padding to 2 ** 40 tokens would end the process, for want of memory."""
    folder = copy("checkpoint")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    expected = Tokenizer(folder).encode("1+2=")
    padding = {"strategy": {"Fixed": 2**20}, "direction": "Right", "pad_to_multiple_of": None}
    tokenizer["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    tokenizer["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer(folder).encode("1+2=") == expected


def test_pictures_that_start_programs_are_not_opened(copy: Callable[[str], Path]) -> None:
    """Pillow hands EPS to Ghostscript."""
    folder = copy("images")
    Image.new("RGB", (9, 9)).save(folder / "picture.eps")
    with pytest.raises(FeedError, match=r"picture\.eps is not an image that Pillow knows: expected PNG, JPEG, WEBP"):
        ImageProcessor(folder).open(folder / "picture.eps")
    assert not {"EPS", "WMF", "MPEG", "GRIB", "BUFR", "HDF5"} & set(FORMATS)


def test_json_of_any_size_is_not_read(copy: Callable[[str], Path]) -> None:
    folder, artifact = copy("checkpoint"), copy("portable")
    for path in (folder / "config.json", artifact / "manifest.json"):
        os.truncate(path, graph_files.MAX_JSON_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match=r"config\.json has 33,554,433 bytes, expected at most 33,554,432"):
        open_checkpoint(folder)
    with pytest.raises(ArtifactError, match=r"manifest\.json has 33,554,433 bytes, expected at most 33,554,432"):
        open_artifact(artifact)


@pytest.mark.parametrize(
    "error", [CheckpointError, ExportError, ArtifactError, FeedError, runtime_errors.EngineLoadError]
)
def test_messages_end_and_are_plain_text(error: type[Exception]) -> None:
    """Names from a file may be endless, and may hold what moves a terminal's cursor."""
    message = str(error("\x1b[2J\ud800\x00\n" + "é" * 10**6))
    assert message.startswith("\\x1b[2J\\ud800\\x00\né")
    assert message.endswith("characters more")
    assert len(message) < 21_000


def test_a_header_that_lies_about_its_length(copy: Callable[[str], Path]) -> None:
    folder = copy("checkpoint")
    path = folder / SINGLE_FILE
    for length in (2**63, 2**64 - 1, 10**9):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
            open_checkpoint(folder)


def test_export_in_place_writes_to_no_link_that_a_checkpoint_brings(copy: Callable[[str], Path]) -> None:
    """--weights reference writes into the checkpoint's own folder: hidden links would lead the writing elsewhere."""
    folder = copy("checkpoint")
    precious = folder.parent / "precious"
    precious.write_text("mine")
    for name in (".decoder.onnx.partial", ".manifest.json.partial", ".export-llm.journal.new"):
        (folder / name).symlink_to(precious)
    stages = {"graph": {"files": {"../precious": {}, str(precious): {}}, "result": None}}
    (folder / ".export-llm.journal").write_text(json.dumps({"key": "x", "stages": stages}))
    export(ExportRequest(checkpoint=folder, out=folder, weights="reference", verify=False))
    assert precious.read_text() == "mine"
    assert open_artifact(folder).manifest.files


def test_the_lock_of_an_export_is_no_link(copy: Callable[[str], Path]) -> None:
    folder = copy("checkpoint")
    (folder / ".export-llm.lock").symlink_to(folder.parent / "made")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        export(ExportRequest(checkpoint=folder, out=folder, weights="reference", verify=False))
    assert not (folder.parent / "made").exists()


def test_a_manifest_does_not_ask_for_endless_memory(copy: Callable[[str], Path]) -> None:
    """A runner makes the cache that it describes before anything is run."""
    folder = copy("portable")
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text.replace(": 64,", f": {2**31 - 1},").replace(" 64,\n", f" {2**31 - 1},\n"))
    for tensor in manifest["cache"]["tensors"]:
        tensor["shape"] = [2**20, manifest["cache"]["max_len"], 2**10]
    seal(folder, manifest)
    with pytest.raises(
        ArtifactError, match=r"damaged: ValueError: the decoding state of a row would have [\d,]+ bytes"
    ):
        open_artifact(folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 4096}, {"model_type": "mixtral", "num_local_experts": 4096, "head_dim": 16}]
)
def test_a_config_of_many_layers_is_refused_before_they_are_made(
    changes: dict[str, Any], copy: Callable[[str], Path]
) -> None:
    """Each layer and each expert takes a millisecond; the weights' header has no room for so many."""
    folder = copy("checkpoint")
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(CheckpointError, match=r"describes at least [\d,]+ tensors, but the checkpoint holds \d+"):
        read_source(folder, None)


def test_a_tokenizer_does_not_make_a_letter_a_terabyte(copy: Callable[[str], Path]) -> None:
    folder = copy("checkpoint")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tenfold = {"type": "Replace", "pattern": {"String": "1"}, "content": "1" * 10}
    for part, name in (("normalizer", "normalizers"), ("decoder", "decoders")):
        for count, allowed in ((3, True), (12, False)):
            made = tokenizer | {part: {"type": "Sequence", name: [tenfold] * count}}
            (folder / "tokenizer.json").write_text(json.dumps(made))
            if allowed:
                Tokenizer(folder).encode("1")
                continue
            with pytest.raises(ArtifactError, match=r"its replacements would make a text [\d,]+ times as long"):
                Tokenizer(folder)


def test_a_graph_whose_nodes_have_no_outputs_is_damaged(copy: Callable[[str], Path]) -> None:
    folder = copy("portable")
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    del model.graph.node[0].output[:]
    with pytest.raises(ArtifactError, match=r"the graph in .* is damaged \(IndexError: .*\): export again"):
        expand_float4(model, folder)


def test_tensors_of_a_manifest_have_names(copy: Callable[[str], Path]) -> None:
    folder = copy("portable")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"]["decoder"]["signature"]["outputs"].append({"name": None, "dtype": "float32", "shape": [1]})
    seal(folder, manifest)
    with pytest.raises(ArtifactError, match="damaged: ValueError: a tensor is called None"):
        open_artifact(folder)


def test_a_warning_of_unknown_keys_is_plain_text(copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copy("checkpoint")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"\x1b[2J": 1}))
    read_source(folder, None)
    assert "unknown keys are ignored: \\x1b[2J" in caplog.text


def test_a_golden_case_beyond_the_cache_is_refused(seeds: Path, tmp_path: Path) -> None:
    """A slot of 10^15 would ask for a mask of as many."""
    artifact = open_artifact(seeds / "portable")
    golden = load_golden(seeds / "golden" / "parity.golden")
    chunks = dataclasses.replace(golden.case.chunks, slots=golden.case.chunks.slots + 10**15)
    golden = dataclasses.replace(golden, case=dataclasses.replace(golden.case, chunks=chunks))
    with pytest.raises(ArtifactError, match="do not fit this artifact: slots from"):
        check_golden(lambda: open_runner(artifact, device="cpu"), golden, quantized=False)


def test_a_report_of_infinitely_many_problems_is_damaged(seeds: Path, tmp_path: Path) -> None:
    """JSON's Infinity is a float that is no count."""
    text = (seeds / "parity" / "parity.json").read_text().replace('"problems": 1', '"problems": Infinity')
    with pytest.raises(ArtifactError, match="is damaged: OverflowError"):
        ParitySummary.from_json(text)
