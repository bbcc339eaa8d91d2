"""One suite for every runner (runner_table.py): what they refuse, and how they say so."""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner_cases import PROMPTS, WRONG_FEEDS, WRONG_ROWS, valid_feeds, whole_cache
from runner_table import PARAMS, Subject, opened_subject

from exporter.torch_runners import open_eager
from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.images import ImageBatch
from runtimes.runner import Runner, open_runner


@pytest.fixture(scope="module", params=PARAMS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each runner in turn."""
    with opened_subject(request, tmp_path_factory) as opened:
        yield opened


@pytest.fixture(scope="module")
def runner(subject: Subject) -> Iterator[Runner]:
    """It is opened once: every test begins with a reset, whatever was before."""
    with subject.open() as opened:
        yield opened


# Everything that reads or writes what a reset makes
USES: dict[str, Callable[[Runner], Any]] = {
    "step": lambda runner: runner.step(valid_feeds()),
    "read_cache": lambda runner: runner.read_cache(0),
    "write_cache": lambda runner: runner.write_cache(0, np.zeros(1, np.float32)),
    "fill_cache": lambda runner: runner.fill_cache(0.0),
    "reorder_rows": lambda runner: runner.reorder_rows(np.array([0])),
    "read_images": lambda runner: runner.read_images(0),
    "write_images": lambda runner: runner.write_images(0, np.zeros(1, np.float32)),
}


def test_before_the_first_reset_and_after_close(subject: Subject) -> None:
    """Every method says what is wrong, instead of a crash inside the library; closing twice is closing."""
    runner = subject.open()
    for use in USES.values():
        with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called before"):
            use(runner)
    runner.reset(2)
    runner.close()
    runner.close()
    after = {"reset": lambda runner: runner.reset(1), "encode_images": lambda runner: runner.encode_images({})}
    for use in (USES | after).values():
        with pytest.raises(FeedError, match="this runner is closed"):
            use(runner)


def test_a_with_block_closes_whatever_happens(subject: Subject) -> None:
    """The block's own error comes through."""
    runners = []

    def fail() -> None:
        with subject.open() as runner:
            runners.append(runner)
            runner.reset(1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    with pytest.raises(FeedError, match="this runner is closed"):
        runners[0].reset(1)


@pytest.mark.parametrize(("wrong", "message"), WRONG_FEEDS)
def test_wrong_feeds(runner: Runner, wrong: dict[str, np.ndarray], message: str) -> None:
    """What was expected and what was found; nothing was done, and the runner goes on."""
    runner.reset(1)
    expected = runner.step(valid_feeds())
    runner.reset(1)
    with pytest.raises(FeedError, match=message):
        runner.step(wrong)
    assert not any(tensor.any() for tensor in whole_cache(runner))
    np.testing.assert_array_equal(runner.step(valid_feeds()), expected)


@pytest.mark.parametrize("rows", [0, 9])
def test_batches_that_the_artifact_does_not_take(runner: Runner, rows: int) -> None:
    """The cache of the batch before stays."""
    runner.reset(1)
    with pytest.raises(FeedError, match=f"batch_size {rows}: this artifact takes 1 to 8 rows"):
        runner.reset(rows)
    runner.step(valid_feeds())


def test_prompts_that_are_too_long(runner: Runner) -> None:
    """Before anything is computed."""
    longest = runner.cache_spec.max_len
    with pytest.raises(FeedError, match=rf"a prompt has {longest + 1} tokens, this artifact holds {longest}"):
        Decoding(runner).prefill([*PROMPTS[:1], [1] * (longest + 1)])


@pytest.mark.parametrize(("rows", "message"), WRONG_ROWS)
def test_wrong_rows(runner: Runner, rows: np.ndarray, message: str) -> None:
    """Before anything is moved."""
    runner.reset(2)
    runner.fill_cache(3.0)
    with pytest.raises(FeedError, match=message):
        runner.reorder_rows(rows)
    assert all((tensor == 3.0).all() for tensor in whole_cache(runner))


def test_wrong_caches(runner: Runner) -> None:
    """An index that there is not, another shape, another dtype."""
    runner.reset(2)
    shape = runner.cache_spec.tensors[0].array_shape(2)
    name, last = runner.cache_spec.past_names()[0], len(runner.cache_spec.tensors) - 1
    for index in (-1, last + 1):
        there_are = rf"there is no tensor {index}: they are {name} \(0\) to .*\({last}\)"
        with pytest.raises(FeedError, match=there_are):
            runner.read_cache(index)
        with pytest.raises(FeedError, match=there_are):
            runner.write_cache(index, np.zeros(shape, np.float32))
    with pytest.raises(FeedError, match=rf"{name} must be float32 .*{shape[-1]}\], got float64 \["):
        runner.write_cache(0, np.zeros(shape))
    with pytest.raises(FeedError, match=rf"{name} must be float32 \[2, .*\], got float32 \[1, "):
        runner.write_cache(0, np.zeros((1, *shape[1:]), np.float32))


def test_images_for_a_model_that_reads_text_only(runner: Runner) -> None:
    """Whichever way they come."""
    nothing = np.zeros((1, 1, 1, 3, 8, 8), np.float32)
    ones = np.ones((1, 1, 1), np.int64)
    images = ImageBatch(
        pixel_values=nothing,
        aspect_ratio_ids=ones[0],
        aspect_ratio_mask=ones,
        cross_attention_mask=np.ones((1, 2, 1, 1), np.int64),
    )
    runner.reset(1)
    uses: list[Callable[[], Any]] = [
        lambda: Decoding(runner).prefill([[1, 5]], images),
        lambda: runner.encode_images(images.encoder_feeds()),
        lambda: runner.read_images(0),
        lambda: runner.write_images(0, nothing),
    ]
    for use in uses:
        with pytest.raises(FeedError, match="this model reads text only"):
            use()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"garbage" * 100)])
def test_a_file_that_is_missing_or_damaged(subject: Subject, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """It is named; opening an artifact checks its files, but they may go or change afterwards."""
    copy = dataclasses.replace(subject.artifact, folder=tmp_path / "copy")
    shutil.copytree(subject.artifact.folder, copy.folder)
    damage(copy.path(subject.entry.file))
    with pytest.raises(ArtifactError, match=subject.entry.file.replace(".", r"\.")):
        subject.open(copy).close()


def test_a_missing_library(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install. A None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, subject.entry.library, None)
    with pytest.raises(RuntimeMissingError, match="pip install"):
        subject.open()


def test_a_device_that_is_not_there(subject: Subject) -> None:
    """The user's mistake."""
    (device,) = subject.entry.wrong_device.values()
    with pytest.raises(RuntimeMissingError, match=f"{device}"):
        subject.open(**subject.entry.wrong_device)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx", "aoti"])
def test_a_layout_that_a_runtime_cannot_run(tiny_in_layout: Callable[[str], Artifact], runtime: str) -> None:
    """Which one it runs."""
    with pytest.raises(ArtifactError, match=r"holds no .* \(engines: none\): export with --target .*portable"):
        open_runner(tiny_in_layout("dynamic"), runtime)


def test_a_layout_that_pytorch_cannot_run(tiny_in_layout: Callable[[str], Artifact]) -> None:
    """Which one it runs."""
    with pytest.raises(ArtifactError, match="has the layout genai, and PyTorch's runners take portable"):
        open_eager(tiny_in_layout("genai"))
