"""`export-llm bench`: what is measured, in which order, and what is made of it. No figure decides anything here."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from exporter.bench import measure as measuring
from exporter.bench.contestants import Contestant, with_unique_names
from exporter.bench.measure import Measured, Run, measure
from exporter.bench.options import read_pythons
from exporter.bench.peers import PEERS
from exporter.bench.plan import Plan, make_plan
from exporter.bench.process import WorkerProcess
from exporter.bench.report import Report, make_report
from exporter.bench.spread import spread_of
from exporter.bench.traffic import weight_bytes
from exporter.errors import ExportError
from exporter.progress import Quiet
from runtimes.artifact import Artifact

SPREAD = {"median", "q1", "q3", "min", "max", "samples"}
AT_LENGTH = {
    "prompt_tokens": int,
    "warmup_s": float,
    "first_token_s": SPREAD,
    "prefill_tokens_per_s": SPREAD,
    "decode_tokens_per_s": SPREAD,
    "prefill_ratio": SPREAD,
    "decode_ratio": SPREAD,
    "bandwidth_share": float,
    "token_ids": list,
    "first_difference": int | None,
}
RESULT = {
    "name": str,
    "description": str,
    "precision": str,
    "weight_bytes": int,
    "cache_bytes_per_token": int,
    "load_s": SPREAD,
    "loaded_bytes": int,
    "peak_bytes": int,
    "lengths": list,
}
MACHINE = {
    "date": str,
    "cpu": str,
    "architecture": str,
    "cores": int,
    "threads": int,
    "memory_bytes": int,
    "system": str,
    "python": str,
    "load_average": float,
}
QUICK = ("--prompt-tokens", "8,3", "--new-tokens", "5", "--repeats", "2", "--threads", "1")


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter without any package."""
    path = tmp_path / "bare-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def one_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LOADS", 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_quartiles_are_numpys(count: int) -> None:
    samples = np.random.default_rng(count).gamma(2.0, size=count)
    spread = spread_of(samples.tolist())
    np.testing.assert_allclose((spread.q1, spread.median, spread.q3), np.percentile(samples, (25, 50, 75)), rtol=1e-12)
    assert (spread.min, spread.max, spread.samples) == (samples.min(), samples.max(), tuple(samples))


def contestant(name: str, precision: str = "fp32", **changes: Any) -> Contestant:
    made = Contestant(
        name=name, precision=precision, engine=("m", "C"), model=Path("m"), options={}, cache_bytes_per_token=100
    )
    return dataclasses.replace(made, **changes)


class FakeProcess:
    """Writes down what it is asked."""

    def __init__(self, name: str, asked: list[tuple[str, str]]) -> None:
        self.name, self._asked = name, asked

    def ask(self, do: str, **arguments: Any) -> Any:
        length = f" {len(arguments['prompts'][0])}" if do == "run" else ""
        self._asked.append((self.name, do + length))
        loaded = {"load_s": 0.1, "loaded_bytes": 1, "description": "", "weight_bytes": 2, "cache_number_bytes": None}
        ran = {"prefill_s": float(len(self._asked)), "decode_s": 1.0, "token_ids": [[1, 2]]}
        return {"load": loaded, "run": ran, "peak_bytes": 7, "read_memory": 1e9}[do]

    def close(self) -> None:
        self._asked.append((self.name, "close"))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LOADS", 2)
    monkeypatch.setattr(measuring, "SETTLE_S", 0)
    asked: list[tuple[str, str]] = []
    plan = Plan(prompt_tokens=(3, 5), new_tokens=2, batch_size=1, repeats=2, threads=1)
    measured, bandwidth = measure(
        [contestant("A"), contestant("B")],
        plan,
        vocab_size=10,
        start=lambda each: FakeProcess(each.name, asked),
        start_reader=lambda: FakeProcess("memory", asked),
        progress=Quiet(),
    )
    loads = [("A", "load"), ("A", "close"), ("B", "load"), ("B", "close"), ("A", "load"), ("B", "load")]
    rounds = []
    for length in ("3", "5"):
        turn = [("A", f"run {length}"), ("B", f"run {length}")]
        rounds += turn + 2 * [("memory", "read_memory"), *turn]
    ends = [("A", "peak_bytes"), ("B", "peak_bytes"), ("memory", "close"), ("B", "close"), ("A", "close")]
    assert asked == [*loads, *rounds, *ends]
    # Runs know their place in that order, so the warm-up's time can be told from the others'.
    assert measured[0].warmup_s == {3: 7 + 1, 5: 15 + 1}
    assert [run.prefill_s for run in measured[1].runs[3]] == [11, 14]
    assert [len(rates) for rates in bandwidth.values()] == [2, 2]


def test_everyone_is_asked_the_same() -> None:
    plan = Plan(prompt_tokens=(4, 9), new_tokens=2, batch_size=3, repeats=1, threads=1)
    short, long = plan.prompts(4, 50), plan.prompts(9, 50)
    assert plan.prompts(9, 50) == long
    assert [row[:4] for row in long] == short
    assert len({tuple(row) for row in long}) == 3
    assert {token for row in long for token in row} <= set(range(50))


def report_of(measured: Sequence[Measured], plan: Plan, weights: Sequence[int]) -> Report:
    bandwidth = {length: [1e6, 1e6] for length in plan.prompt_tokens}
    return make_report(measured, bandwidth, plan, machine={}, not_run={}, weight_bytes=weights, number_bytes=4)


def measured_of(who: Contestant, runs: list[Run], cache_number_bytes: int | None = None) -> Measured:
    return Measured(
        contestant=who,
        description="",
        weight_bytes=None,
        cache_number_bytes=cache_number_bytes,
        load_s=[1.0],
        loaded_bytes=1,
        peak_bytes=2,
        warmup_s={10: 9.0},
        runs={10: runs},
    )


def test_rates_by_hand() -> None:
    """Two rows of 10 tokens, 5 new ones each, the first of them from the prefill."""
    plan = Plan(prompt_tokens=(10,), new_tokens=5, batch_size=2, repeats=2, threads=1)
    ids = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    other = [[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]]
    ours = [Run(prefill_s=2.0, decode_s=4.0, token_ids=ids), Run(prefill_s=4.0, decode_s=8.0, token_ids=ids)]
    theirs = [Run(prefill_s=1.0, decode_s=8.0, token_ids=other), Run(prefill_s=8.0, decode_s=8.0, token_ids=other)]
    measured = [
        measured_of(contestant("ours"), ours),
        measured_of(contestant("theirs"), theirs, cache_number_bytes=2),
        measured_of(contestant("same"), ours),
        measured_of(contestant("int4", "int4"), theirs),
        measured_of(contestant("gpu", on_gpu=True), theirs),
    ]
    report = report_of(measured, plan, [1000, 1000, 1000, 500, 500])
    (first,), (second,), (third,), (fourth,), (fifth,) = (each.lengths for each in report.results)
    assert first.prefill_tokens_per_s.samples == (10.0, 5.0)
    assert first.decode_tokens_per_s.samples == (2.0, 1.0)  # 2 rows, 4 steps
    assert first.first_token_s.median == 3.0
    assert first.warmup_s == 9.0
    assert second.prefill_ratio.samples == (2.0, 0.5)  # round by round, not of the medians
    assert second.decode_ratio.samples == (0.5, 1.0)
    assert first.decode_ratio.samples == (1.0, 1.0)
    # 1.5 s a step, in which memory delivers 1.5e6 bytes: weights once, 100 bytes of 10 + 5 / 2 tokens for each row
    assert first.bandwidth_share == pytest.approx((1000 + 2 * 100 * 12.5) / 1.5e6)
    assert second.bandwidth_share == pytest.approx((1000 + 2 * 50 * 12.5) / 2e6)
    assert fifth.bandwidth_share is None
    assert [each.first_difference for each in (first, second, third, fourth)] == [None, 2, -1, None]


def test_bytes_that_a_graph_reads(tmp_path: Path) -> None:
    """A table of embeddings costs a row; one that is the output projection as well is read as a whole."""

    def graph(tied: bool) -> Path:
        data = {"table": ((10, 4), TensorProto.FLOAT), "codes": ((4, 5), TensorProto.INT4)}
        data |= {"scales": ((2, 5), TensorProto.FLOAT16), "axis": ((1,), TensorProto.INT64)}
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["x"]),
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=2),
            helper.make_node("Squeeze", ["x", "axis"], ["y"]),
        ]
        if tied:
            nodes.append(helper.make_node("Transpose", ["table"], ["head"]))
        tensors = []
        for name, (shape, kind) in data.items():
            tensor = TensorProto(name=name, dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="weights-that-nobody-opens")
            tensors.append(tensor)
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        path = tmp_path / f"{tied}.onnx"
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [out], tensors)), path)
        return path

    assert weight_bytes(graph(tied=False)) == 10 + 20 + 8
    assert weight_bytes(graph(tied=True)) == 10 + 20 + 8 + 160


def check_schema(data: dict[str, Any], schema: dict[str, Any]) -> None:
    assert data.keys() == schema.keys()
    for key, kind in schema.items():
        if kind is SPREAD:
            spread = data[key]
            assert spread.keys() == SPREAD
            assert spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["max"]
            assert spread["min"] > 0
        else:
            assert isinstance(data[key], kind), (key, data[key])


def test_a_real_run(x_run: Callable[..., Any], tiny_artifact: Artifact, tiny_llama: Path, tmp_path: Path) -> None:
    """transformers, in a process of its own, chooses the same tokens; JSON is as documented; the picture shows both."""
    json_file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    ran = x_run(
        "bench", tiny_artifact.folder, "--against", "transformers", *QUICK, "--json", "-o", json_file, "-o", picture
    )
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report == json.loads(json_file.read_text())
    assert report.keys() == {
        "schema_version", "machine", "plan", "bandwidth_bytes_per_s", "results", "not_run",
    }  # fmt: skip
    assert report["plan"] == {
        "prompt_tokens": [3, 8], "new_tokens": 5, "batch_size": 1, "repeats": 2, "threads": 1, "seed": 0,
    }  # fmt: skip
    check_schema(report["machine"], MACHINE)
    ours, theirs = report["results"]
    for result in (ours, theirs):
        check_schema(result, RESULT)
        for each in result["lengths"]:
            check_schema(each, AT_LENGTH)
            assert len(each["decode_tokens_per_s"]["samples"]) == 2
        assert result["weight_bytes"] == pytest.approx(4 * 456_064, rel=0.01)  # its parameters, with a tied head
    assert (ours["name"], theirs["name"]) == ("fp32@onnxruntime", "transformers")
    assert [each["first_difference"] for each in theirs["lengths"]] == [-1, -1]
    assert [each["token_ids"] for each in ours["lengths"]] == [each["token_ids"] for each in theirs["lengths"]]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


def test_tables(x_run: Callable[..., Any], tiny_artifacts: Callable[[str], Artifact]) -> None:
    """Another artifact of the model, of another precision: its tokens are its own business."""
    fp32, int4 = tiny_artifacts("fp32").folder, tiny_artifacts("int4").folder
    ran = x_run("bench", fp32, "--against", f"{int4}@onnxruntime", *QUICK, "--batch-size", "2", "--quiet")
    assert ran.code == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    rows = [line for line in lines if line and "@onnxruntime" in line[0]]
    assert [line[:2] for line in rows[:4]] == [
        ["fp32@onnxruntime", "3"], ["fp32@onnxruntime", "8"], ["int4@onnxruntime", "3"], ["int4@onnxruntime", "8"],
    ]  # fmt: skip
    assert [line[:2] for line in rows[4:]] == [["fp32@onnxruntime", "fp32"], ["int4@onnxruntime", "int4"]]
    assert "rows: 2" in ran.out
    assert "GB/s" in ran.out


@pytest.mark.parametrize("layout", ["portable", "genai"])
def test_onnxruntime_genai(x_run: Callable[..., Any], x_tiny: Path, tmp_path: Path, layout: str) -> None:
    """Its builder's model of the same checkpoint, and our own artifact where it can load it: the same tokens."""
    if any(importlib.util.find_spec(name) is None for name in PEERS["onnxruntime-genai"].modules):
        pytest.skip("onnxruntime-genai is not installed here")
    from exporter.pipeline import ExportRequest, export

    export(ExportRequest(checkpoint=x_tiny, out=tmp_path / "artifact", layout=layout, verify=False))
    client = {"portable": ("--against", "onnxruntime-genai"), "genai": ("--runtime", "onnxruntime-genai")}[layout]
    ran = x_run("bench", tmp_path / "artifact", "--runtime", "onnxruntime", *client, *QUICK, "--json")
    assert ran.code == 0, ran.err
    _, theirs = json.loads(ran.out)["results"]
    assert theirs["description"].startswith("onnxruntime-genai ")
    assert [each["first_difference"] for each in theirs["lengths"]] == [-1, -1]


@pytest.mark.slow
def test_torch_compile(x_run: Callable[..., Any], tiny_artifact: Artifact) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler: there is no g++ here")
    options = ["--prompt-tokens", "8", "--new-tokens", "5", "--repeats", "1", "--threads", "1"]
    ran = x_run("bench", tiny_artifact.folder, "--against", "torch.compile", *options, "--json")
    assert ran.code == 0, ran.err
    _, theirs = json.loads(ran.out)["results"]
    assert "torch.compile" in theirs["description"]
    assert [each["first_difference"] for each in theirs["lengths"]] == [-1]


def test_all_peers_that_are_there(
    x_run: Callable[..., Any], tiny_artifact: Artifact, bare_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPORT_LLM_PEER_PYTHON", str(bare_python))
    options = ["--against", "all", *QUICK]
    ran = x_run("bench", tiny_artifact.folder, *options, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert [each["name"] for each in report["results"]] == ["fp32@onnxruntime"]
    assert report["not_run"].keys() == PEERS.keys()
    for peer, reason in report["not_run"].items():
        assert f"pip install {PEERS[peer].install}" in reason
    assert "not run: llama-cpp-python: " in x_run("bench", tiny_artifact.folder, *options).out


def test_a_peer_that_is_missing(x_run: Callable[..., Any], tiny_artifact: Artifact, bare_python: Path) -> None:
    for peer in PEERS:
        ran = x_run(
            "bench", tiny_artifact.folder, "--against", peer, "--peer-python", f"{peer}={bare_python}", "--quiet"
        )
        needs = ", ".join(PEERS[peer].modules)
        ran.refused(f"{peer} needs {needs}, which {bare_python} does not have", f"pip install {PEERS[peer].install}")


def test_what_cannot_be_measured(
    x_run: Callable[..., Any],
    tiny_artifacts: Callable[[str], Artifact],
    tiny_vision_artifact: Artifact,
    x_one_layer_export: Path,
    x_tiny: Path,
    tmp_path: Path,
) -> None:
    tiny, int4 = tiny_artifacts("fp32").folder, tiny_artifacts("int4").folder

    def bench(*arguments: object) -> Any:
        return x_run("bench", *arguments, "--quiet")

    bench(tmp_path / "nowhere").refused("does not exist")
    bench(x_tiny).refused("is not an artifact")
    bench(tiny, "--prompt-tokens", "120", "--new-tokens", "9").refused("make 129 tokens", "holds 128", "--max-len")
    bench(tiny, "--new-tokens", "128").refused("make 129 tokens")
    bench(tiny, "--prompt-tokens", "8,x").refused("--prompt-tokens", "'8,x'")
    bench(tiny, "--prompt-tokens", "0").refused("--prompt-tokens must be at least 1, got 0")
    bench(tiny, "--new-tokens", "1").refused("--new-tokens must be at least 2, got 1")
    bench(tiny, "--threads", "0").refused("--threads must be at least 1, got 0")
    bench(tiny, "--batch-size", "9").refused("--batch-size is 9", "takes 8 rows", "--max-batch")
    bench(tiny, "--runtime", "abacus").refused("unknown runtime 'abacus'", "onnxruntime-genai")
    bench(tiny, "--runtime", "onnxruntime-genai").refused("layout 'portable'", "--layout genai")
    bench(tiny, "--against", "abacus").refused("neither a peer", "llama-cpp-python", "nor the folder")
    bench(tiny, "--against", x_tiny).refused("is not an artifact")
    bench(tiny, "--against", tiny).refused("takes part twice")
    bench(tiny, "--against", x_one_layer_export).refused("is another model", "num_hidden_layers")
    bench(int4, "--against", "transformers").refused("fp32, fp16, bf16", "this artifact is int4")
    bench(int4, "--against", "onnxruntime-genai").refused("weights are rounded", "give --checkpoint")
    bench(tiny, "--against", "transformers", "--checkpoint", x_one_layer_export).refused("num_hidden_layers")
    bench(tiny, "--against", "transformers", "--checkpoint", tiny / "config.json").refused("needs a folder")
    bench(tiny, "--against", "llama-cpp-python", "--batch-size", "2").refused("takes 1 row at most")
    bench(tiny, "--against", "transformers", "--peer-python", tmp_path / "no-python").refused("cannot be started")
    bench(tiny, "--peer-python", "abacus=python").refused("'abacus' is no peer")
    bench(tiny, "-o", tmp_path / "nowhere" / "x.json").refused("is no folder")
    bench(tiny_vision_artifact.folder).refused("read text only")


def test_the_default_lengths_fit() -> None:
    assert make_plan(max_len=4096, max_batch=1).prompt_tokens == (128, 512, 2048)
    assert make_plan(max_len=600, max_batch=1).prompt_tokens == (128, 512)
    assert make_plan(max_len=128, max_batch=1, new_tokens=16).prompt_tokens == (112,)
    assert make_plan(max_len=4096, max_batch=1).threads == len(os.sched_getaffinity(0))


def test_interpreters() -> None:
    assert read_pythons([]) == {}
    assert read_pythons(["transformers=/a", "/b"]) == dict.fromkeys(PEERS, "/b") | {"transformers": "/a"}


def test_names_are_told_apart() -> None:
    pair = [contestant("x@onnxruntime", model=Path("a/x")), contestant("x@onnxruntime", model=Path("b/x"))]
    assert [each.name for each in with_unique_names(pair)] == ["a/x@onnxruntime", "b/x@onnxruntime"]


def test_a_worker_that_fails(tmp_path: Path) -> None:
    with WorkerProcess("loser", tmp_path, threads=1) as worker:
        options = {"threads": 1, "runtime": "onnxruntime"}
        with pytest.raises(ExportError, match=r"^loser: .*nowhere does not exist"):
            worker.ask("load", engine=("artifact", "ArtifactEngine"), model=str(tmp_path / "nowhere"), options=options)
        with pytest.raises(ExportError, match="loser could not run: AttributeError"):
            worker.ask("run", prompts=[[1]], new_tokens=2)
        assert worker.ask("missing", modules=["json", "no_such_module"]) == ["no_such_module"]
        os.kill(worker.process_id, signal.SIGKILL)
        with pytest.raises(ExportError, match="loser ended with status -9 when asked to peak_bytes"):
            worker.ask("peak_bytes")


def test_memory_is_that_of_the_worker_alone(tmp_path: Path) -> None:
    with WorkerProcess("reader", tmp_path, threads=1) as reader, WorkerProcess("idle", tmp_path, threads=1) as idle:
        assert reader.ask("read_memory", threads=1) > 1e8
        assert reader.ask("peak_bytes") > 512 << 20
        assert idle.ask("peak_bytes") < 100 << 20
    assert {path.name for path in (tmp_path / "packages").iterdir()} == {"exporter", "graphs", "runtimes"}


def test_gguf_as_its_own_converter_writes_it(tiny_llama: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf_cases import convert, read_folder

    from exporter.bench.llama_gguf import write_gguf

    for kind in ("F32", "Q8_0"):
        write_gguf(tiny_llama, kind, tmp_path / "ours.gguf")
        convert(tmp_path / "theirs.gguf", *read_folder(tiny_llama), type_of=lambda _: GGMLQuantizationType[kind])  # noqa: B023
        ours, theirs = (
            {tensor.name: tensor for tensor in GGUFReader(tmp_path / f"{who}.gguf").tensors}
            for who in ("ours", "theirs")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.tensor_type == theirs[name].tensor_type
            np.testing.assert_array_equal(tensor.data, theirs[name].data)


def test_gguf_of_another_family(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    from exporter.bench.llama_gguf import write_gguf

    scaling = {"rope_type": "linear", "factor": 2.0}
    folder = x_one_layer(rope_scaling=scaling)
    with pytest.raises(ExportError, match=r"llama with rope type linear: leave llama.cpp out"):
        write_gguf(folder, "F32", tmp_path / "x.gguf")


def test_the_picture_needs_matplotlib(
    x_run: Callable[..., Any], tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x_run("bench", tiny_artifact.folder, "-o", tmp_path / "x.png", "--quiet").refused("export-llm[plot]")
