"""Golden tensors: what was verified when it was exported is verified again with no PyTorch and no checkpoint."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.pipeline import ExportRequest, export
from runtimes import golden as golden_file
from runtimes.artifact import GOLDEN_FILE, MANIFEST, Artifact, file_entry, open_artifact
from runtimes.errors import ArtifactError
from runtimes.golden import load_golden, save_golden
from runtimes.runner import open_runner
from runtimes.verification import artifact_targets, verify_golden

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def verified(tmp_path_factory: pytest.TempPathFactory, one_layer_llama: Path) -> Callable[[str, str], Artifact]:
    """Exports one layer in a precision and a layout, verified, once per session. Do not change it."""
    made: dict[tuple[str, str], Artifact] = {}

    def get(precision: str, layout: str = "portable") -> Artifact:
        if (precision, layout) not in made:
            out = tmp_path_factory.mktemp("golden") / "out"
            request = ExportRequest(checkpoint=one_layer_llama, out=out, precision=precision, layout=layout)
            parity = export(request).parity
            assert parity is not None
            assert parity.passed
            made[precision, layout] = open_artifact(out)
        return made[precision, layout]

    return get


CASES = [
    ("fp32", "portable"),
    ("fp16", "genai"),
    ("bf16", "portable"),
    ("int4:block=16", "dynamic"),
    ("int8", "portable"),
]


@pytest.mark.parametrize(("precision", "layout"), CASES)
def test_a_good_artifact_passes(verified: Callable[..., Artifact], precision: str, layout: str) -> None:
    """On the same targets, with the rungs and limits of the export, but for the operators', which need PyTorch."""
    artifact = verified(precision, layout)
    summary = verify_golden(artifact, artifact_targets(artifact, "cpu"))
    assert summary.passed
    from exporter.pipeline import read_parity

    then = read_parity(artifact)
    assert then is not None
    before = [report for report in then.reports if report.runtime != "stored weights"]
    assert [report.runtime for report in summary.reports] == [report.runtime for report in before]
    for now, old in zip(summary.reports, before, strict=True):
        olds = [rung for rung in old.rungs if not rung.name.startswith("operator ")]
        assert [rung.name for rung in now.rungs] == [rung.name for rung in olds]
        limits = [[rung.max_limit for rung in each if rung.name.endswith("logits")] for each in (now.rungs, olds)]
        np.testing.assert_allclose(*limits, rtol=0.01)


def damaged(artifact: Artifact, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Artifact:
    """A copy whose graph is changed, with a manifest that says nothing of it."""
    shutil.copytree(artifact.folder, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    edit(model)
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    files = {**artifact.manifest.files, "decoder.onnx": file_entry(folder / "decoder.onnx")}
    (folder / MANIFEST).write_text(dataclasses.replace(artifact.manifest, files=files).to_json())
    return open_artifact(folder)


def change_epsilon(model: onnx.ModelProto) -> None:
    """Twice what it was, in the last norm."""
    node = [node for node in model.graph.node if node.op_type == "RMSNormalization"][-1]
    (epsilon,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
    epsilon.f *= 2


def test_a_small_fault_fails(verified: Callable[..., Artifact], tmp_path: Path) -> None:
    """An epsilon of 2e-5 instead of 1e-5."""
    artifact = damaged(verified("fp32"), tmp_path / "bad", change_epsilon)
    summary = verify_golden(artifact, artifact_targets(artifact, "cpu"))
    assert not summary.passed
    failed = {rung.name for report in summary.reports for rung in report.rungs if not rung.passed}
    assert "prefill logits" in failed
    assert "written cache" not in failed  # the norm stands behind every layer


NO_TORCH = """
import sys

class Unimportable:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxscript", "transformers", "safetensors"):
            raise ModuleNotFoundError(name + " is not installed here", name=name)

sys.meta_path.insert(0, Unimportable())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "torch" else find(name)
from exporter.cli import main
main()
"""


def test_the_command_needs_no_pytorch(verified: Callable[..., Artifact], tmp_path: Path) -> None:
    """`verify` finds no torch, takes the golden tensors and says so; exit 1 for a fault."""
    good = verified("fp16", "genai").folder
    bad = damaged(verified("fp32"), tmp_path / "bad", change_epsilon).folder
    for folder, code, verdict in ((good, 0, "parity passed"), (bad, 1, "parity FAILED")):
        command = [sys.executable, "-c", NO_TORCH, "verify", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert verdict in done.stdout
        assert "reference: golden tensors of eager PyTorch float64" in done.stdout


def test_the_file_keeps_everything(verified: Callable[..., Artifact], tmp_path: Path) -> None:
    """Saved again, it is the same, byte for byte; and it names runtimes by what they compute in."""
    path = verified("int4:block=16", "dynamic").path(GOLDEN_FILE)
    golden = load_golden(path)
    assert save_golden(golden) == path.read_bytes()
    assert sorted(golden.yardsticks) == ["float32", "float32, activations in int8"]
    assert [len(prompt) for prompt in golden.case.prompts] == [27, 12, 1]
    assert sorted(load_golden(verified("bf16").path(GOLDEN_FILE)).yardsticks) == ["bfloat16", "float32"]


def test_pictures_are_part_of_it(tiny_vision_artifact: Artifact, tmp_path: Path) -> None:
    """Of a model that sees, keys and values of a part of its pictures' tokens are kept."""
    out = tmp_path / "out"
    checkpoint = ROOT / "examples" / "tiny_vision"
    export(ExportRequest(checkpoint=checkpoint, out=out))
    artifact = open_artifact(out)
    golden = load_golden(artifact.path(GOLDEN_FILE))
    assert golden.case.images is not None
    assert all(tensor.shape[1] <= golden_file.IMAGE_TOKENS for row in golden.truth.images for tensor in row)
    summary = verify_golden(artifact, artifact_targets(artifact, "cpu"))
    assert summary.passed
    assert summary.reports[0].rungs[0].name == "keys and values of images"


def test_a_runtime_without_a_yardstick(verified: Callable[..., Artifact]) -> None:
    """What nobody measured is not judged."""
    artifact = verified("fp32")
    golden = dataclasses.replace(load_golden(artifact.path(GOLDEN_FILE)), yardsticks={})
    with pytest.raises(ArtifactError, match=r"computes in float32: verify where PyTorch is installed"):
        golden_file.check_golden(lambda: open_runner(artifact, device="cpu"), golden, quantized=False)


def test_another_token_is_judged_where_it_was_chosen(verified: Callable[..., Artifact]) -> None:
    """A runtime that chooses another token at a tie goes another way from there, which nobody knows the truth of."""
    assert golden_file._steps_in_common([1, 2, 3], [1, 2, 3]) == 3
    assert golden_file._steps_in_common([1, 5, 3], [1, 2, 3]) == 2
    assert golden_file._steps_in_common([5, 2, 3], [1, 2, 3]) == 1
    artifact = verified("fp32")
    golden = load_golden(artifact.path(GOLDEN_FILE))
    other = [[tokens[0], tokens[1] + 1, *tokens[2:]] for tokens in golden.greedy]
    # the truth behind another token is not that of this runtime's: it must not be asked
    wrong = [np.concatenate([logits[:2], logits[2:][:, ::-1]]) for logits in golden.greedy_truth]
    golden = dataclasses.replace(golden, greedy=other, greedy_truth=wrong)
    assert golden_file.check_golden(lambda: open_runner(artifact, device="cpu"), golden, quantized=False).passed


def test_an_unverified_artifact_has_none(tiny_artifact: Artifact) -> None:
    """The message says why."""
    with pytest.raises(ArtifactError, match=f"holds no {GOLDEN_FILE}, for it was exported with --no-verify"):
        verify_golden(tiny_artifact, {})


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_a_damaged_file_is_no_crash(verified: Callable[..., Artifact], tmp_path: Path, at: int) -> None:
    """Cut short anywhere: one message."""
    data = verified("fp32").path(GOLDEN_FILE).read_bytes()
    path = tmp_path / GOLDEN_FILE
    path.write_bytes(data[:at])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_golden(path)


def test_a_changed_byte_in_any_file_is_caught(verified: Callable[..., Artifact], tmp_path: Path) -> None:
    """On opening, by the file's name: the manifest, weights, graph, tokenizer, the report and the golden tensors."""
    folder = tmp_path / "artifact"
    shutil.copytree(verified("fp32").folder, folder)
    chance = np.random.default_rng(0)
    names = sorted(path.name for path in folder.iterdir())
    assert {MANIFEST, GOLDEN_FILE, "parity.json", "model.safetensors", "decoder.onnx", "tokenizer.json"} <= {*names}
    for name in names:
        path = folder / name
        data = path.read_bytes()
        for at in [0, len(data) - 1, *chance.integers(0, len(data), 10).tolist()]:
            changed = bytearray(data)
            changed[at] ^= 1 << int(chance.integers(8))
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=name):
                open_artifact(folder)
        path.write_bytes(data)
    open_artifact(folder)
