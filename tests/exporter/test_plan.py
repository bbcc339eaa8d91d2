"""The plan of an export against the export itself: what it says is true, and it says all that is wrong at once."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.pipeline import ExportRequest, export
from exporter.plan import ExportPlan, make_plan
from exporter.plan_report import in_units, plan_facts, plan_to_dict

Run = Callable[..., Any]
MB = 1_000_000
GRAPH_FACTOR = 1.3  # estimates of graphs and manifests are this near
PEAK_FACTOR = 1.6  # the estimate of peak memory is a bound, and no more than this above


def plan_of(checkpoint: Path, out: Path, **options: Any) -> ExportPlan:
    return make_plan(ExportRequest(checkpoint=checkpoint, out=out, **options))


def sizes_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(x_one_layer: Callable[..., Path]) -> Callable[[str], Path]:
    """A checkpoint of one layer; in two shards, or in bfloat16 and without tied head."""

    def make(kind: str) -> Path:
        folder = x_one_layer(kind)
        if kind == "plain":
            return folder
        tensors = load_file(folder / "model.safetensors")
        if kind == "bf16":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


CASES = [
    ("plain", {}),
    ("plain", {"precision": "fp16"}),
    ("plain", {"precision": "int4"}),
    ("plain", {"precision": "nvfp4"}),
    ("plain", {"precision": "int8", "layout": "dynamic"}),
    ("plain", {"precision": "int4:lm_head=fp16,embed=fp32", "layout": "genai", "max_len": 64}),
    ("plain", {"precision": "int4", "quantizer": "awq"}),
    ("plain", {"precision": "fp16", "layout": "dynamic", "client": "transformers-js"}),
    ("plain", {"weights": "reference"}),
    ("bf16", {"layout": "genai", "precision": "fp32"}),
    ("sharded", {}),
    ("sharded", {"weights": "reference"}),
    ("sharded", {"precision": "bf16"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_files_and_bytes_are_those_of_the_export(
    kind: str, options: dict[str, Any], narrow: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every file, by name; every size to the byte, but for those that are said to be estimates."""
    checkpoint = narrow(kind)
    out = checkpoint if options.get("weights") == "reference" else tmp_path / "out"
    check_files(checkpoint, out, **options)


def test_files_of_both_graphs(tiny_vision: Path, tmp_path: Path) -> None:
    """A vision encoder has its own file, and its weights are among the decoder's."""
    check_files(tiny_vision, tmp_path / "out", precision="int8")


def check_files(checkpoint: Path, out: Path, **options: Any) -> None:
    before = sizes_in(out) if out == checkpoint else {}
    request = ExportRequest(checkpoint=checkpoint, out=out, verify=False, **options)
    plan = make_plan(request)
    assert plan.problems == ()
    assert plan.sizes is not None
    assert plan.shapes is not None
    if out != checkpoint:
        assert not out.exists()
    result = export(request)
    found = sizes_in(out)
    planned = {file.name: file for file in plan.sizes.files}
    assert planned.keys() == found.keys()
    for name, file in planned.items():
        if file.about:
            assert found[name] / GRAPH_FACTOR < file.bytes < found[name] * GRAPH_FACTOR, name
        else:
            assert file.bytes == found[name], name
        assert file.written == (name not in before), name
    about = {name for name, file in planned.items() if file.about}
    assert all(name.endswith(".onnx") or name == "manifest.json" for name in about)
    assert plan.sizes.written_bytes == sum(file.bytes for file in planned.values() if file.written)
    assert plan.shapes.cache == result.manifest.cache
    assert plan.shapes.vision == result.manifest.vision
    assert dict(plan.shapes.signatures) == {name: each.signature for name, each in result.manifest.graphs.items()}


def test_verified_export_has_two_files_more(tiny_llama: Path, tmp_path: Path) -> None:
    """The verdict, and the golden tensors, whose size is near."""
    request = ExportRequest(checkpoint=tiny_llama, out=tmp_path / "out")
    plan = make_plan(request)
    assert plan.sizes is not None
    export(request)
    found, planned = sizes_in(tmp_path / "out"), {file.name: file for file in plan.sizes.files}
    assert planned.keys() == found.keys()
    assert found["parity.golden"] / 2 < planned["parity.golden"].bytes < found["parity.golden"] * 2


def test_engines_are_among_the_files(tiny_llama: Path, tmp_path: Path, x_has_rtx: bool) -> None:
    """An engine holds the weights in their precision; packages of PyTorch's compiler hold none."""
    targets = ("tensorrt-rtx", "torch") if x_has_rtx else ("torch",)
    plan = plan_of(tiny_llama, tmp_path / "out", targets=targets, precision="fp16", verify=False)
    if any("C++ compiler" in problem for problem in plan.problems):
        pytest.skip("needs a C++ compiler")
    assert plan.sizes is not None
    planned = {file.name: file for file in plan.sizes.files}
    assert {"decoder.prefill.pt2", "decoder.decode.pt2"} <= planned.keys()
    assert plan.sizes.weight_bytes == 2 * 456_064
    if x_has_rtx:
        engine = planned["decoder.tensorrt-rtx.engine"]
        assert engine.about
        assert engine.bytes > plan.sizes.weight_bytes


# --- sizes against a known model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes checkpoints of Llama 3.1's shapes, whose weights are holes of their files."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "sparse_checkpoint.py"
    spec = importlib.util.spec_from_file_location("sparse_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(shape: str) -> Path:
        folder = tmp_path_factory.mktemp("sparse") / shape
        folder.mkdir()
        module.write_sparse_checkpoint(folder, shape)
        return folder

    return make


def test_llama_70b(sparse: Callable[[str], Path]) -> None:
    """By hand: 80 layers of 8 heads, 128 wide, a key and a value of 2 bytes each; 70.55 billion numbers of 2 bytes."""
    checkpoint = sparse("70b")
    plan = make_plan(
        ExportRequest(checkpoint=checkpoint, out=checkpoint, weights="reference", max_len=8192, max_batch=4),
        checks_out=True,
    )
    assert plan.problems == ()
    facts = plan_to_dict(plan)
    per_token = 80 * 2 * 8 * 128 * 2
    assert facts["model"] == {"model_type": "llama", "layers": 80, "parameters": 70_553_706_496}
    assert facts["cache"]["bytes_per_token"] == per_token == 327_680
    assert facts["cache"]["bytes"] == 4 * 8192 * per_token
    assert facts["weight_bytes"] == 2 * 70_553_706_496
    assert facts["about"]["gpu_memory"]["weights"] == 2 * 70_553_706_496
    shards = [file for file in facts["files"] if file["name"].startswith("model-")]
    assert len(shards) == 30
    assert not any(file["written"] for file in shards)
    assert facts["written_bytes"] < 100 * MB + 80 * 200_000  # logits of parity.golden, and graphs


def test_int4_of_a_70b(sparse: Callable[[str], Path], tmp_path: Path) -> None:
    """Half a byte a weight and a 16-bit scale for each 32; the output projection in a byte, the embedding in two."""
    plan = plan_of(sparse("70b"), tmp_path / "out", precision="int4:block=32", verify=False)
    (problem,) = plan.problems or ("",)
    assert "are free" in problem or problem == ""  # where there is room for 42 GB
    assert plan.sizes is not None
    table, norms = 128_256 * 8192, (2 * 80 + 1) * 8192
    layers = 70_553_706_496 - 2 * table - norms
    codes = layers // 2 + layers // 32 * 2
    head = table + 128_256 * 2  # int8 without blocks: one scale for each output
    assert plan.sizes.weight_bytes == codes + 2 * table + head + 2 * norms


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--no-verify",), ("--precision", "int4")])
def test_peak_memory_is_a_bound_near_the_real_one(
    options: tuple[str, ...], tiny_llama: Path, tmp_path: Path, x_root: Path
) -> None:
    """Of a small model, it is the program; what comes with size was measured (docs/performance.md)."""
    code = """
import re, sys
from pathlib import Path
from exporter.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
peak_kb = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)
print("peak", 1024 * int(peak_kb))
"""
    command = ["export", tiny_llama, "-o", tmp_path / "out", "--quiet", *options]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], cwd=x_root, capture_output=True, text=True, check=True
    )
    measured = int(re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)[0])
    wanted = {"verify": False} if options == ("--no-verify",) else {"precision": "int4"}
    plan = plan_of(tiny_llama, tmp_path / "other", **wanted)
    assert plan.sizes is not None
    assert measured <= plan.sizes.peak_memory.total <= PEAK_FACTOR * measured


def test_memory_grows_with_what_it_is_said_to(sparse: Callable[[str], Path], tmp_path: Path) -> None:
    """Copying is streamed; quantizing holds a matrix, verifying the weights, building them more than twice."""
    checkpoint = sparse("8b")

    def stages(**options: Any) -> dict[str, int]:
        plan = plan_of(checkpoint, tmp_path / "out", **options)
        assert plan.sizes is not None
        return dict(plan.sizes.peak_memory.stages)

    assert stages(verify=False)["write weights"] < 100 * MB
    largest = 128_256 * 4096  # numbers of the output projection
    assert 4 * largest < stages(precision="int4", verify=False)["write weights"] < 16 * largest
    assert stages()["verify"] > 2 * 8_030_261_248
    plain, sampled = stages(precision="int4", verify=False), stages(precision="int4", verify=False, quantizer="gptq")
    assert sampled["calibrate"] > plain["write weights"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(x_run: Run, x_copy: Callable[..., Path], tmp_path: Path) -> None:
    """Options, keys of config.json and the destination, each with its own reason; exit code 2; nothing is written."""
    folder = x_copy(hidden_act="swash", sliding_window=12, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    options = ("--layout", "cube", "--max-batch", "0", "--quantizer", "guess", "--target", "abacus")
    ran = x_run("plan", folder, "-o", tmp_path / "out", *options)
    assert ran.code == 2
    for words in (
        "this export would be refused, for 8 reasons",
        "layout 'cube' is not supported; supported: portable, dynamic, genai",
        "--max-batch must be at least 1 and at most 65536, got 0",
        "--quantizer 'guess' is not supported",
        "target 'abacus' is not supported",
        'hidden_act must be one of "silu"',
        "sliding_window = 12 changes the maths",
        'rope type "spiral" is not supported',
        "exists and is not an artifact, so it is left alone",
    ):
        assert words in ran.err, words
    assert "Traceback" not in ran.err
    assert sizes_in(tmp_path / "out") == {"mine.txt": 4}


def test_a_key_that_must_be_there_ends_the_reading(x_run: Run, x_copy: Callable[..., Path]) -> None:
    """What follows cannot be known, and that is said."""
    ran = x_run("plan", x_copy(num_attention_heads="many"))
    ran_error = ran.refused("num_attention_heads must be an integer", "config.json was not read to its end")
    assert "for 2 reasons" in ran_error


@pytest.mark.parametrize("target", ["tensorrt-rtx", "torch"])
def test_a_target_of_another_layout(x_run: Run, tiny_llama: Path, target: str) -> None:
    """Targets are checked one by one."""
    ran = x_run("plan", tiny_llama, "--layout", "genai", "--target", target, "--client", "transformers-js")
    assert ran.code == 2
    assert f"target {target} needs --layout portable, got genai" in ran.err
    assert "--client transformers-js needs --layout dynamic, got genai" in ran.err


def test_missing_and_unexpected_tensors_are_counted(x_run: Run, x_copy: Callable[..., Path]) -> None:
    """How many, and the first of them; the model and the cache are told although files are not."""
    folder = x_copy()
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if ".layers.1." in name]
    assert len(gone) == 9
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    kept["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    kept["model.norm.weight"] = torch.ones(3)
    save_file(kept, folder / "model.safetensors")
    ran = x_run("plan", folder, "--json")
    assert ran.code == 2
    facts = json.loads(ran.out)
    assert facts["tensors"]["missing"]["count"] == 9
    assert facts["tensors"]["missing"]["first"][0].startswith("model.layers.1.input_layernorm.weight")
    assert facts["tensors"]["unexpected"] == {"count": 1, "first": ["model.layers.0.self_attn.q_norm.weight [4]"]}
    assert facts["tensors"]["wrong shape"]["count"] == 1
    assert len(facts["refused"]) == 3
    assert "missing, 9 tensors: model.layers.1.input_layernorm.weight" in facts["refused"][0]
    assert facts["refused"][0].endswith(" and 4 more")
    assert facts["cache"]["bytes_per_token"] == 1536
    assert facts["files"] is None
    assert facts["written_bytes"] is None


def test_no_room_is_said_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the disk of the nearest folder that is there."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    plan = plan_of(tiny_llama, tmp_path / "new" / "out")
    (problem,) = plan.problems
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}: needs 2\.\d MB, 0\.0 MB are free", problem)
    assert make_plan(plan.request, checks_out=False).problems == ()


def test_a_cast_in_place_is_refused(tiny_llama: Path) -> None:
    """As the export refuses it."""
    plan = plan_of(tiny_llama, tiny_llama, weights="reference", precision="fp16")
    (problem,) = plan.problems
    assert problem.startswith("--weights reference cannot cast: precision fp16 needs F16")


def test_plan_and_export_refuse_alike(x_run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever stops an export is among the plan's reasons."""
    for options in (
        ("--max-len", "0"),
        ("--max-images", "2"),
        ("--precision", "int5"),
        ("--precision", "int4:nothing.*=int8"),
        ("--requantize",),
        ("--weights", "move"),
        ("--weights", "reference"),
        ("--gpu-arch", "89"),
        ("--client", "transformers-js", "--layout", "dynamic", "--precision", "bf16"),
    ):
        refused = x_run("export", tiny_llama, "-o", tmp_path / "out", "--no-verify", *options).refused()
        reason = refused.removeprefix("error: ").strip().splitlines()[0]
        assert reason in x_run("plan", tiny_llama, "-o", tmp_path / "out", "--no-verify", *options).err, options


def test_an_artifact_that_is_there(x_run: Run, x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """Whether it is this very export cannot be told from headers: a warning, and none with --force."""
    checkpoint = x_one_layer()
    out = tmp_path / "out"
    export(ExportRequest(checkpoint=checkpoint, out=out, verify=False))
    ran = x_run("plan", checkpoint, "-o", out, "--no-verify")
    assert ran.code == 0
    assert f"warning: {out} holds an artifact already: if this export made it, nothing will be done" in ran.err
    assert x_run("plan", checkpoint, "-o", out, "--no-verify", "--force").err == ""


# --- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_is_the_plan_and_writes_nothing(x_run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """Both commands, as text and as JSON."""
    for options in ((), ("--json",), ("--precision", "int4", "--max-len", "64")):
        arguments = (tiny_llama, "-o", tmp_path / "out", *options)
        planned = x_run("plan", *arguments)
        assert planned.code == 0
        assert x_run("export", *arguments, "--dry-run").out == planned.out
    assert list(tmp_path.iterdir()) == []


def test_text(x_run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """Exact sizes to the byte, estimates with `about`."""
    ran = x_run("plan", tiny_llama, "-o", tmp_path / "out", "--max-batch", "2")
    lines = {line[:25].strip(): line[25:].strip() for line in ran.out.splitlines()}
    assert lines["model"] == "llama, 3 layers, 456,064 parameters"
    assert lines["layout"] == "portable, fp32"
    assert lines["cache"] == "1,536 bytes a token of each row; 197 kB a row of 128 tokens, 393 kB for 2 rows"
    assert lines["model.safetensors"] == f"{(tiny_llama / 'model.safetensors').stat().st_size:,} bytes"
    assert re.fullmatch(r"about \d\d\.\d kB", lines["decoder.onnx"])
    assert lines["to be written"].startswith("about 2.0")
    assert re.fullmatch(r"about \d{3} MB", lines["memory to export"])
    assert "weights 1.82 MB, cache 393 kB, activations" in lines["GPU memory to run"]


def test_pictures(tiny_vision: Path, tmp_path: Path) -> None:
    """What one takes is told, of a model that sees."""
    plan = plan_of(tiny_vision, tmp_path / "out", max_images=2)
    assert plan.shapes is not None
    assert plan.shapes.vision is not None
    expected = in_units(plan.shapes.vision.bytes_per_image)
    assert plan_facts(plan)["images"] == f"{expected} each, 2 at most in a row"


def test_no_weight_is_read(x_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every weight zeroed the plan is the same, and nothing of them is mapped."""
    folder = x_copy()
    plan = plan_of(folder, tmp_path / "out", precision="int4")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(len(data) - start))

    def refuse(*args: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("graphs.checkpoint.map_tensor", refuse)
    monkeypatch.setattr("exporter.weights.copy_file", refuse)
    assert plan_to_dict(plan_of(folder, tmp_path / "out", precision="int4")) == plan_to_dict(plan)


def test_what_only_numbers_tell_is_no_part_of_a_plan(x_copy: Callable[..., Path], tmp_path: Path) -> None:
    """A stored output projection is not compared with the embedding it is tied to; the export does that."""
    folder = x_copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    assert plan_of(folder, tmp_path / "out").problems == ()


def test_torchs_compiler_is_not_imported(x_root: Path, tiny_llama: Path) -> None:
    """It takes longer than all the rest: half a second of the two that a plan may take."""
    code = f"""
import sys
from exporter.cli import cli
cli.main(["plan", {str(tiny_llama)!r}], standalone_mode=False)
print(sorted(set(sys.modules) & {{"torch._dynamo", "torch._inductor.compile_fx", "transformers"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=x_root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 bytes"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (123_456_789, "123 MB"), (42 * 10**9, "42.0 GB")],
)
def test_units(count: int, shown: str) -> None:
    """Three digits."""
    assert in_units(count) == shown


def test_the_cache_is_the_specs_own(tiny_llama: Path, tmp_path: Path) -> None:
    """Bytes for a batch are what the runners allocate."""
    plan = plan_of(tiny_llama, tmp_path / "out", precision="fp16", max_len=77, max_batch=5)
    assert plan.shapes is not None
    facts = plan_to_dict(plan)["cache"]
    assert facts["bytes_per_token"] == 3 * 2 * 2 * 32 * 2  # layers, key and value, heads, width, bytes
    assert facts["bytes_per_row"] == 77 * facts["bytes_per_token"]
    assert facts["bytes"] == 5 * facts["bytes_per_row"] == plan.shapes.cache.nbytes(5)
