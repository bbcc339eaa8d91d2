"""The TensorRT runner of a model that sees: on a simulated GPU everywhere, on a real one where there is one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from simulation import Simulate, Simulation, export_for_this_gpu
from vision_cases import asked, steps

from runtimes.artifact import Artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.generation import generate
from runtimes.images import ImageBatch
from runtimes.runner import Runner, open_runner
from runtimes.tensorrt_api import FLAVORS

TARGETS = list(FLAVORS)
ATOL = 1e-4  # logits are around 10; the same graphs and kernels, over more masked slots


@pytest.fixture
def simulation(simulate: Simulate, tiny_vision_artifact: Artifact) -> Simulation:
    """The device with both libraries and an artifact for them."""
    return simulate(tiny_vision_artifact)


@pytest.fixture
def runner(simulation: Simulation) -> Iterator[Runner]:
    """On the simulated TensorRT; whatever the test does, nothing may be left on the device."""
    with open_runner(simulation.artifact, "tensorrt") as opened:
        yield opened
    assert not simulation.device.alive().keys() - {"TensorRT objects"}


@pytest.fixture(scope="module")
def reference(tiny_vision_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_vision_artifact, device="cpu") as opened:
        yield opened


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_equals_onnxruntime(
    simulation: Simulation, reference: Runner, tiny_vision_artifact: Artifact, target: str, cuda_graphs: bool
) -> None:
    """Pictures, other pictures of other sizes, text alone, and pictures again; the encoder runs once for each batch."""
    batches = [asked(tiny_vision_artifact, rows, seed) for seed, rows in enumerate([3, 1, 3])]
    with open_runner(simulation.artifact, target, cuda_graphs=cuda_graphs) as runner:
        for number, (prompts, images) in enumerate(batches):
            expected = steps(reference, prompts, images)
            np.testing.assert_allclose(steps(runner, prompts, images), expected, atol=ATOL)
            text = [[1, 7, 9], [1, 12]]
            np.testing.assert_allclose(steps(runner, text, None), steps(reference, text, None), atol=ATOL)
            runs = [line for line in simulation.device.log if line == "engine, profile 0"]
            assert len(runs) == 3 * (number + 1)  # of each round, two prefills and the encoder
    assert simulation.device.alive() == {}


def test_keys_and_values_stay_on_the_device(
    simulation: Simulation, runner: Runner, tiny_vision_artifact: Artifact
) -> None:
    """Between the encoder and the last step, only logits are downloaded."""
    prompts, images = asked(tiny_vision_artifact)
    steps(runner, prompts, images, count=1)
    before = simulation.count("DeviceToHost")
    steps(runner, prompts, images, count=5)
    assert simulation.count("DeviceToHost") - before == 6


def test_decode_steps_are_replayed(simulation: Simulation, runner: Runner, tiny_vision_artifact: Artifact) -> None:
    """One graph serves all the steps of a batch."""
    prompts, images = asked(tiny_vision_artifact)
    steps(runner, prompts, images, count=6)
    assert simulation.count("graph engine, profile 1") >= 4


def test_generates_the_tokens_of_onnxruntime(runner: Runner, reference: Runner, tiny_vision_artifact: Artifact) -> None:
    """Greedily, and with beams."""
    prompts, images = asked(tiny_vision_artifact)
    found = [generate(each, prompts, 8, images=images).token_ids for each in (runner, reference)]
    assert found[0] == found[1]
    hypotheses = [
        beam_search(each, prompts[:2], 3, 6, images=_first(images, prompts, 2)) for each in (runner, reference)
    ]
    assert [[h.token_ids for h in row] for row in hypotheses[0].hypotheses] == [
        [h.token_ids for h in row] for row in hypotheses[1].hypotheses
    ]


def _first(images: ImageBatch, prompts: list[list[int]], rows: int) -> ImageBatch:
    cut = {field.name: getattr(images, field.name)[:rows] for field in dataclasses.fields(images)}
    longest = max(map(len, prompts[:rows]))
    return ImageBatch(**cut | {"cross_attention_mask": cut["cross_attention_mask"][:, :longest]})


def test_a_damaged_encoder(simulation: Simulation, tiny_vision_artifact: Artifact) -> None:
    """It is loaded when the first pictures come; text goes on without it."""
    engine = simulation.artifact.manifest.engines["tensorrt/vision_encoder"]
    simulation.artifact.path(engine.file).write_bytes(b"garbage")
    prompts, images = asked(tiny_vision_artifact)
    with open_runner(simulation.artifact, "tensorrt") as runner:
        steps(runner, [[1, 5]], None)
        with pytest.raises(ArtifactError, match=r"vision_encoder\.tensorrt\.engine cannot be loaded by tensorrt"):
            Decoding(runner).prefill(prompts, images)
        steps(runner, [[1, 5]], None)
    assert not simulation.device.alive().keys() - {"TensorRT objects"}


# --- on a real GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_artifact(tiny_vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_for_this_gpu(tiny_vision, tmp_path_factory.mktemp("gpu") / "artifact")


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_generates_the_tokens_of_onnxruntime(gpu_artifact: Artifact, device: str) -> None:
    """Greedily, from pictures; ONNX Runtime on the CPU and, where its provider is there, on CUDA."""
    prompts, images = asked(gpu_artifact)
    target = next(iter(gpu_artifact.manifest.engines.values())).target
    try:
        reference = open_runner(gpu_artifact, device=device)
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    with reference, open_runner(gpu_artifact, target) as runner:
        assert (
            generate(runner, prompts, 8, images=images).token_ids
            == generate(reference, prompts, 8, images=images).token_ids
        )
