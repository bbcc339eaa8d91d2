"""The first divergence: nothing is named in what is right, and in what is wrong the operator that is."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import diff_faults
import numpy as np
import pytest
import test_families
import torch
from diff_faults import GENAI, PORTABLE, Fault, break_graph

from exporter.diff import run as diff_run
from exporter.diff.errors import Errors
from exporter.diff.page import render
from exporter.diff.report import DiffReport, Row, layer_of
from exporter.diff.run import diff_artifact
from exporter.diff.svg import HEIGHT, LEFT, TOP, WIDTH
from exporter.diff.targets import Target, ways_to_run
from exporter.pipeline import ExportRequest, export
from graphs.checkpoint import open_checkpoint, read_header
from graphs.state import StepContext
from runtimes.artifact import Artifact, open_artifact


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str, str], Artifact]:
    """tiny_llama in a layout and precision, not verified; made once. Do not change it."""
    made: dict[tuple[str, str], Artifact] = {}

    def get(layout: str, precision: str) -> Artifact:
        if (layout, precision) not in made:
            out = tmp_path_factory.mktemp("diff") / "artifact"
            request = ExportRequest(checkpoint=tiny_llama, out=out, layout=layout, precision=precision, verify=False)
            export(request)
            made[layout, precision] = open_artifact(out)
        return made[layout, precision]

    return get


def _first(report: DiffReport) -> Row:
    assert report.first is not None
    return report.first


@pytest.mark.parametrize(("layout", "precision"), [("portable", "fp16"), ("dynamic", "fp32"), ("genai", "int4")])
def test_nothing_diverges_in_what_is_right(
    layout: str, precision: str, exported: Callable[[str, str], Artifact], tiny_llama: Path
) -> None:
    """Not even by the checkpoint's weights, which were rounded; every layer is looked at."""
    report = diff_artifact(exported(layout, precision), tiny_llama)
    assert report.passed, [comparison.sentence() for comparison in report.comparisons]
    for comparison in report.comparisons:
        assert {"layer 0", "layer 1", "layer 2"} <= {row.layer for row in comparison.rows}
    graph = report.comparisons[-1].rows
    assert {"RMSNormalization", "MatMul"} & {row.operator for row in graph}
    assert any("Attention" in row.operator for row in graph)


def _blamed(report: DiffReport) -> list[tuple[str, str, tuple[str, ...]]]:
    """What the most exact comparison of the graph blames, in order."""
    assert report.comparisons[0].first is None
    rows = report.comparisons[1].rows
    return [(row.module, row.node, row.weights) for row in rows if not row.passed and row.node]


@pytest.mark.parametrize(("layout", "precision", "faults"), [("portable", "fp32", PORTABLE), ("genai", "int4", GENAI)])
def test_faults_in_the_graph_are_named(
    layout: str, precision: str, faults: dict[str, Fault], exported: Callable[[str, str], Artifact], tmp_path: Path
) -> None:
    """All at once: each is blamed by itself, with module, node and weight; nothing is blamed for its inputs."""

    def change(model: diff_faults.onnx.ModelProto) -> None:
        for fault in faults.values():
            fault.change(model)

    blamed = _blamed(diff_artifact(break_graph(exported(layout, precision), tmp_path / "copy", change)))
    assert set(blamed) == {(fault.module, fault.node, fault.weights) for fault in faults.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PORTABLE, *GENAI])
def test_each_fault_alone_is_the_first_divergence(
    name: str, exported: Callable[[str, str], Artifact], tmp_path: Path
) -> None:
    """As the command reports it."""
    fault = (PORTABLE | GENAI)[name]
    artifact = exported("portable", "fp32") if name in PORTABLE else exported("genai", "int4")
    first = _first(diff_artifact(break_graph(artifact, tmp_path / "copy", fault.change)))
    assert (first.module, first.node, first.weights) == (fault.module, fault.node, fault.weights)


def test_a_fault_that_half_precision_hides_is_named(tiny_artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    """In float16 itself it is within the rounding; computed in float32 it is not."""
    fault = PORTABLE["scale off by 0.1 %"]
    report = diff_artifact(break_graph(tiny_artifacts("fp16"), tmp_path / "copy", fault.change))
    assert _blamed(report) == [(fault.module, fault.node, fault.weights)]
    assert [comparison.first is None for comparison in report.comparisons] == [True, False, True]


def test_faults_of_both_graphs_of_a_model_that_sees_are_named(tiny_vision_artifact: Artifact, tmp_path: Path) -> None:
    """The encoder runs first; what it does to the decoder is not blamed on the decoder."""
    in_encoder, in_decoder = "vision_model.transformer.layers.1.self_attn/Attention", "layers.3.attn/Attention"
    change = diff_faults.set_number(in_encoder, "scale", 1.01)
    broken = break_graph(tiny_vision_artifact, tmp_path / "one", change, "vision_encoder")
    broken = break_graph(broken, tmp_path / "both", diff_faults.set_number(in_decoder, "scale", 1.01))
    report = diff_artifact(broken)
    blamed = [(row.graph, row.node) for row in report.comparisons[1].rows if not row.passed and row.node]
    assert blamed == [("vision_encoder", in_encoder), ("decoder", in_decoder)]
    assert "of the vision encoder" in report.comparisons[1].sentence()


def test_a_fault_in_one_expert_is_named(tmp_path: Path) -> None:
    """Experts are one operator of the model, and many nodes of the graph."""
    test_families.CASES["mixtral"].make_model().save_pretrained(tmp_path / "checkpoint")
    export(ExportRequest(checkpoint=tmp_path / "checkpoint", out=tmp_path / "out", verify=False))
    artifact = open_artifact(tmp_path / "out")
    graph = diff_faults.onnx.load(artifact.path("decoder.onnx"), load_external_data=False)
    (turned,) = (
        node for node in graph.graph.node if "model.layers.1" in node.input[0] and "experts.2.w3" in node.input[0]
    )
    wrong = turned.input[0].replace("experts.2", "experts.1")
    first = _first(diff_artifact(break_graph(artifact, tmp_path / "copy", diff_faults.rewire(turned.name, 0, wrong))))
    assert (first.module, first.computes) == ("layers.1.mlp", "experts")
    assert turned.name in first.behind


def test_a_weight_that_is_not_the_checkpoints_is_named(
    tiny_artifact: Artifact, tiny_llama: Path, tmp_path: Path
) -> None:
    """By the checkpoint's weights, or another artifact's; the artifact's own say nothing of it."""
    shutil.copytree(tiny_artifact.folder, tmp_path / "copy")
    name = "model.layers.1.self_attn.o_proj.weight"
    stored = open_checkpoint(tmp_path / "copy").tensors[name]
    weights = np.memmap(stored.path, np.float32, "r+", stored.offset, (stored.nbytes // 4,))
    weights[5] += 0.01
    weights.flush()
    changed = Artifact(folder=tmp_path / "copy", manifest=tiny_artifact.manifest)
    assert diff_artifact(changed).passed
    for against in (tiny_llama, tiny_artifact.folder):
        first = _first(diff_artifact(changed, against))
        assert (first.node, first.weights) == ("layers.1.attn.output_proj/MatMul", (name,))


def test_a_block_of_a_quantized_weight_is_named(
    exported: Callable[[str, str], Artifact], tiny_llama: Path, tmp_path: Path
) -> None:
    """One scale of many is half too large: no product is far off, but the weight is not what rounding makes of it."""
    artifact = exported("genai", "int4")
    shutil.copytree(artifact.folder, tmp_path / "copy")
    name = "model.layers.2.mlp.down_proj.weight"
    stored = read_header(tmp_path / "copy" / "model.safetensors")[f"{name}_scale"]
    np.memmap(stored.path, np.float32, "r+", stored.offset, (1,))[0] *= 1.5
    report = diff_artifact(Artifact(folder=tmp_path / "copy", manifest=artifact.manifest), tiny_llama)
    first = _first(report)
    assert report.comparisons[0].first is first
    assert (first.module, first.operator, first.weights) == ("layers.2.mlp.w2", "weight", (name,))
    assert report.comparisons[0].sentence().startswith("first divergence on the stored weights: layers.2.mlp.w2")


def test_artifacts_of_two_layouts_and_precisions(exported: Callable[[str, str], Artifact], tmp_path: Path) -> None:
    """They agree up to their rounding, and where one has a fault it is found."""
    growing, fused, portable = exported("dynamic", "fp32"), exported("genai", "int4"), exported("portable", "int4")
    report = diff_artifact(fused, growing.folder)
    assert report.passed, report.comparisons[0].sentence()
    assert {"layer 0", "layer 1", "layer 2"} <= {row.layer for row in report.comparisons[0].rows}
    broken = break_graph(fused, tmp_path / "copy", GENAI["scale of fused attention"].change)
    assert _first(diff_artifact(broken, portable.folder)).node == "layers.2.attn.output_proj/MatMulNBits"


def test_a_mistake_of_the_traced_program_is_named(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the graph as well as in its program; eager PyTorch, row by row, does not share it."""
    causal = StepContext.mask_B1ST.fget
    assert causal is not None
    one_more = property(lambda context: causal(context).roll(1, dims=-1) | causal(context))
    monkeypatch.setattr(StepContext, "mask_B1ST", one_more)
    report = diff_artifact(tiny_artifact)
    first = _first(report)
    assert report.comparisons[0].first is first
    assert (first.module, first.operator) == ("layers.0.attn", "module")
    assert report.comparisons[0].sentence().startswith("first divergence on the traced program: layers.0.attn")


def test_a_fault_that_shows_only_where_nothing_is_shown(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a runtime fuses operators wrongly: it is said that no single operator is to blame."""
    broken = break_graph(tiny_artifact, tmp_path / "copy", PORTABLE["keys and values swapped"].change)

    def ways(artifact: Artifact, runtime: str, device: str | None) -> dict[str, Callable[[str, Iterable[str]], Target]]:
        (whole,), (fused,) = (ways_to_run(each, runtime, device).values() for each in (artifact, broken))
        return {"onnxruntime": lambda graph, wanted: (whole if wanted else fused)(graph, wanted)}

    monkeypatch.setattr(diff_run, "ways_to_run", ways)
    comparison = diff_artifact(tiny_artifact).comparisons[1]
    assert comparison.first is comparison.rows[-1]
    assert "the whole graph" in comparison.sentence()
    assert "only while no inner value is shown" in comparison.sentence()


def test_the_command(x_run: Callable[..., SimpleNamespace], tiny_artifact: Artifact, tmp_path: Path) -> None:
    """Exit code 0 and a line for each layer; the page stands by itself."""
    ran = x_run("diff", tiny_artifact.folder, "--html", tmp_path / "page.html", "--quiet")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    for words in ("layer 2", "no divergence", "reference: eager PyTorch float64"):
        assert words in ran.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "layers.2.attn/Attention" in page
    pictures = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 2
    for dot in ElementTree.fromstring(pictures[1]).iter("circle"):
        assert LEFT <= float(dot.attrib["cx"]) <= WIDTH
        assert TOP <= float(dot.attrib["cy"]) <= HEIGHT
    assert not re.search(r"https?:|<script|<link|src=", page)


def test_the_command_finds_a_divergence(
    x_run: Callable[..., SimpleNamespace], tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1; the sentence names module, operator, node and weight, and what should have been read."""
    fault = PORTABLE["another layer's norm"]
    broken = break_graph(tiny_artifact, tmp_path / "copy", fault.change)
    monkeypatch.setattr("runtimes.artifact.open_artifact", lambda folder: broken)
    ran = x_run("diff", broken.folder, "--json", "--html", tmp_path / "page.html")
    assert ran.code == 1
    found = json.loads(ran.out)["comparisons"][1]
    assert found["first"]["node"] == fault.node
    words = ("layers.2.sa_norm, operator RMSNormalization", fault.node, *fault.weights)
    for word in (*words, "it should read model.layers.2.input_layernorm.weight"):
        assert word in found["sentence"]
    assert 'class="bad"' in (tmp_path / "page.html").read_text(encoding="utf-8")
    plain = x_run("diff", broken.folder, "--quiet")
    assert plain.code == 1
    assert "DIVERGES it should read" in plain.out


def test_wrong_input_is_refused(
    x_run: Callable[..., SimpleNamespace],
    tiny_artifact: Artifact,
    tiny_vision: Path,
    tmp_path: Path,
    exported: Callable[[str, str], Artifact],
) -> None:
    """With exit code 2 and what to do, before anything is computed."""
    folder = tiny_artifact.folder
    x_run("diff", folder, "--runtime", "eager").refused("shows no inner values", "onnxruntime, tensorrt, tensorrt-rtx")
    x_run("diff", folder, "--html", tmp_path).refused("is a folder", "such as diff.html")
    x_run("diff", folder, "--html", tmp_path / "no" / "page.html").refused("is no folder; make it first")
    x_run("diff", folder, "--against", tiny_vision).refused("is another model", "pass the checkpoint")
    genai = exported("genai", "int4").folder
    x_run("diff", genai, "--runtime", "tensorrt-rtx").refused("layout genai", "use --runtime onnxruntime")


def test_errors_by_hand() -> None:
    """Limits are those of the tolerances; what is not finite is an error, and poison is not large."""
    exact = torch.tensor([1.0, 2.0, 64.0])
    good, bad = Errors(), Errors()
    good.add(exact + 5e-8, exact, exact + 2e-8, ignored=64.0)
    assert good.exact.largest == 2.0
    assert good.within("float32")
    bad.add(torch.tensor([1.0, float("nan"), 64.0]), exact, exact, ignored=64.0)
    assert bad.ours.largest == float("inf")
    assert not bad.within("float32")
    hidden = torch.tensor([float("-inf"), 1.0])
    masked = Errors()
    masked.add(hidden, hidden, hidden, ignored=None)
    assert masked.within("float32")
    unanswered = Errors()
    unanswered.add(torch.tensor([0.5, 1.0]), torch.tensor([float("nan"), 1.0]), torch.tensor([0.1, 1.0]), ignored=None)
    assert unanswered.within("float32")
    overflowing = Errors()
    overflowing.add(exact * 2, exact, exact * float("inf"), ignored=None)
    assert not overflowing.within("float16")


def test_layers_by_their_modules() -> None:
    """As the table calls them."""
    assert layer_of("layers.3.attn.q_proj") == "layer 3"
    assert layer_of("vision_model.transformer.layers.1.mlp") == "vision_model.transformer layer 1"
    assert layer_of("norm") == "norm"
    assert layer_of("") == ""


def test_a_page_of_nothing() -> None:
    """Of an artifact whose name is no HTML."""
    page = render(DiffReport(artifact="a/<b>", comparisons=()))
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_a_node_that_does_not_run_is_named(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """Shapes that it cannot have: here, keys of all slots beside values of the active ones."""
    change = diff_faults.rewire("layers.2.attn/Attention", 1, "present.2.key")
    first = _first(diff_artifact(break_graph(tiny_artifact, tmp_path / "copy", change)))
    assert (first.layer, first.node) == ("layer 2", "layers.2.attn/Attention")
    assert "it does not run" in first.note
