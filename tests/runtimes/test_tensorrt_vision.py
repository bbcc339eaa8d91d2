"""The TensorRT runner of a model that sees: on a simulated GPU everywhere, on a real one where there is one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runner_cases import REORDERINGS
from simulation import Simulate, Simulation, export_for_this_gpu

from exporter.verify import verify
from graphs.checkpoint import open_checkpoint
from runtimes.artifact import Artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.generation import generate
from runtimes.images import ImageBatch, ImageProcessor
from runtimes.parity import ParityReport
from runtimes.runner import Runner, open_runner
from runtimes.tensorrt_api import FLAVORS
from runtimes.tensorrt_runner import TENSORRT_RUNNERS
from runtimes.tokenizer import Tokenizer

Image = pytest.importorskip("PIL.Image")
TARGETS = list(FLAVORS)
ATOL = 1e-4  # logits are around 10; the same graphs and kernels, over more masked slots
QUESTIONS = ["<|image|>how many circles?", "<|image|><|image|>which shape is red?", "how many circles?"]
SIZES = [[(60, 60)], [(40, 150), (200, 100)], []]


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


def asked(artifact: Artifact, rows: int = 3, seed: int = 0) -> tuple[list[list[int]], ImageBatch]:
    """Prompts, and random pictures for them: one, two, none."""
    rng = np.random.default_rng(seed)
    prompts = [Tokenizer(artifact.folder).encode(text) for text in QUESTIONS[:rows]]
    pictures = [
        [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
        for sizes in SIZES[:rows]
    ]
    images = ImageProcessor.of(artifact).batch(prompts, pictures)
    assert images is not None
    return prompts, images


def steps(runner: Runner, prompts: list[list[int]], images: ImageBatch | None, count: int = 6) -> np.ndarray:
    """[1 + count, B, V]: logits after the prompts, and after each of some tokens."""
    decoding = Decoding(runner)
    logits = [decoding.prefill(prompts, images)]
    logits += [decoding.decode(np.arange(len(prompts)) + 5 + step) for step in range(count)]
    return np.stack(logits)


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


@pytest.mark.parametrize("target", TARGETS)
def test_parity_with_eager_pytorch(simulation: Simulation, tiny_vision: Path, target: str) -> None:
    """The gate that an export runs, pictures included."""
    report = _parity(target, simulation.artifact, tiny_vision)
    assert "keys and values of images" in [rung.name for rung in report.rungs]
    assert report.passed, [rung for rung in report.rungs if not rung.passed]
    assert simulation.device.alive() == {}


def _parity(target: str, artifact: Artifact, checkpoint: Path) -> ParityReport:
    manifest = artifact.manifest
    return verify(
        lambda: TENSORRT_RUNNERS[target].open(artifact),
        open_checkpoint(checkpoint),
        layout=manifest.layout,
        signature=manifest.graphs["decoder"].signature,
        cache=manifest.cache,
        encoder=manifest.graphs["vision_encoder"].signature,
    )


def test_rows_are_reordered_with_their_pictures(
    runner: Runner, reference: Runner, tiny_vision_artifact: Artifact
) -> None:
    """As on ONNX Runtime, with rows that repeat, change places, or stay."""
    prompts, images = asked(tiny_vision_artifact)
    for order in REORDERINGS:
        found = []
        for each in (runner, reference):
            decoding = Decoding(each)
            decoding.prefill(prompts, images)
            decoding.reorder(np.array(order))
            found.append(decoding.decode(np.array([9, 10, 11])))
        np.testing.assert_allclose(found[0], found[1], atol=ATOL)


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


def test_keys_and_values_can_be_read_and_written(runner: Runner, tiny_vision_artifact: Artifact) -> None:
    """What is written is what is read."""
    prompts, images = asked(tiny_vision_artifact)
    Decoding(runner).prefill(prompts, images)
    array = runner.read_images(1)
    assert runner.vision_spec is not None
    assert array.shape == runner.vision_spec.array_shape(3, 2, images.pixel_values.shape[2])
    runner.write_images(1, array + 1)
    np.testing.assert_array_equal(runner.read_images(1), array + 1)
    assert not np.array_equal(runner.read_images(0), array + 1)


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


def test_more_pictures_than_the_engine_takes(runner: Runner, tiny_vision_artifact: Artifact) -> None:
    """Refused before anything runs."""
    prompts, images = asked(tiny_vision_artifact, rows=1)
    many = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    many = {name: np.repeat(array, 5, axis=2 if name == "cross_attention_mask" else 1) for name, array in many.items()}
    with pytest.raises(FeedError, match=r"num_images is 5, but this artifact takes 1 to 4 \(set by --max-images"):
        Decoding(runner).prefill(prompts, ImageBatch(**many))


# --- on a real GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_artifact(tiny_vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_for_this_gpu(tiny_vision, tmp_path_factory.mktemp("gpu") / "artifact")


@pytest.mark.cuda
def test_gpu_parity(gpu_artifact: Artifact, tiny_vision: Path) -> None:
    """The real engines against eager PyTorch, by the gate that an export runs."""
    target = next(iter(gpu_artifact.manifest.engines.values())).target
    report = _parity(target, gpu_artifact, tiny_vision)
    assert report.passed, [rung for rung in report.rungs if not rung.passed]


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
