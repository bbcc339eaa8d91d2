"""The suite for every runner (runner_table.py) of a model that sees: what it does with pictures."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from runner_cases import REORDERINGS
from runner_table import SEEING, Subject, opened_subject
from vision_cases import asked, steps

from exporter.torch_runners import open_eager
from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.runner import Runner

ATOL = 1e-3  # logits are around 10; other kernels round otherwise


@pytest.fixture(scope="module", params=SEEING)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each runner in turn."""
    with opened_subject(request, tmp_path_factory) as opened:
        yield opened


@pytest.fixture(scope="module")
def runner(subject: Subject) -> Iterator[Runner]:
    """It is opened once: every test begins with a reset, whatever was before."""
    with subject.open() as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_vision_artifact: Artifact) -> Iterator[Runner]:
    """Eager PyTorch on the same weights."""
    with open_eager(tiny_vision_artifact, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def shown(tiny_vision_artifact: Artifact) -> tuple[list[list[int]], ImageBatch]:
    """Three prompts: with one picture, with two, with none."""
    return asked(tiny_vision_artifact)


def all_images(runner: Runner) -> list[np.ndarray]:
    """Keys and values of the pictures."""
    assert runner.vision_spec is not None
    return [runner.read_images(index) for index in range(len(runner.vision_spec.names()))]


def test_pictures_of_all_sizes_and_text_alone(
    runner: Runner, reference: Runner, tiny_vision_artifact: Artifact
) -> None:
    """One after another: of the pictures before, nothing is left."""
    for seed, rows in enumerate((3, 1, 2, 3)):
        prompts, images = asked(tiny_vision_artifact, rows, seed)
        np.testing.assert_allclose(steps(runner, prompts, images), steps(reference, prompts, images), atol=ATOL)
        text = [[1, 7, 9], [1, 12]]
        np.testing.assert_allclose(steps(runner, text, None), steps(reference, text, None), atol=ATOL)


def test_pictures_move_with_their_rows(
    runner: Runner, reference: Runner, shown: tuple[list[list[int]], ImageBatch]
) -> None:
    """Rows repeat, change places, or stay."""
    for order in REORDERINGS:
        found = []
        for each in (runner, reference):
            decoding = Decoding(each)
            decoding.prefill(*shown)
            decoding.reorder(np.array(order))
            found.append(decoding.decode(np.array([9, 10, 11])))
        np.testing.assert_allclose(found[0], found[1], atol=ATOL)


def test_keys_and_values_are_read_and_written(
    runner: Runner, reference: Runner, shown: tuple[list[list[int]], ImageBatch]
) -> None:
    """What is written is what is read and seen; what was handed out or in stays the caller's own."""
    decoding = Decoding(runner)
    decoding.prefill(*shown)
    Decoding(reference).prefill(*shown)
    made, expected = all_images(runner), all_images(reference)
    shape = runner.vision_spec.array_shape(3, 2, shown[1].pixel_values.shape[2]) if runner.vision_spec else None
    for array, other in zip(made, expected, strict=True):
        assert array.dtype == np.float32
        assert array.shape == shape
        np.testing.assert_allclose(array, other, atol=ATOL)
    tokens = np.array([9, 10, 11])
    logits = decoding.decode(tokens)
    kept = [array.copy() for array in made]
    for index, array in enumerate(made):
        runner.write_images(index, array + 1)
    for array, was, now in zip(made, kept, all_images(runner), strict=True):
        np.testing.assert_array_equal(array, was)
        np.testing.assert_array_equal(now, was + 1)
    decoding.rewind(decoding.lengths - 1)
    assert np.abs(decoding.decode(tokens) - logits)[:2].max() > 100 * ATOL  # the third row sees none
    for index, was in enumerate(kept):
        given = was.copy()
        runner.write_images(index, given)
        given[...] = -1
    decoding.rewind(decoding.lengths - 1)
    np.testing.assert_array_equal(decoding.decode(tokens), logits)


def test_pictures_stay_the_callers_own(runner: Runner, shown: tuple[list[list[int]], ImageBatch]) -> None:
    """They may be changed as soon as they were shown."""
    prompts, images = shown
    expected = steps(runner, prompts, images)
    copy = ImageBatch(**{f.name: getattr(images, f.name).copy() for f in dataclasses.fields(images)})
    decoding = Decoding(runner)
    found = [decoding.prefill(prompts, copy)]
    for array in copy.encoder_feeds().values():
        array[...] = 0
    found += [decoding.decode(np.arange(3) + 5 + step) for step in range(6)]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_wrong_pictures(runner: Runner, shown: tuple[list[list[int]], ImageBatch]) -> None:
    """They are refused before anything is done: the rows go on seeing what they saw."""
    prompts, images = shown
    expected = steps(runner, prompts, images)
    decoding = Decoding(runner)
    found = [decoding.prefill(prompts, images)]
    feeds = images.encoder_feeds()
    many = {name: np.repeat(array, 5, axis=1) for name, array in feeds.items()}
    wrong = [
        (many, r"num_images is 10, but this artifact takes 1 to 4 \(set by --max-images"),
        (feeds | {"pixel_values": feeds["pixel_values"].astype(np.float64)}, "pixel_values must be float32, got float"),
        ({"pixel_values": feeds["pixel_values"]}, "missing inputs: aspect_ratio_ids, aspect_ratio_mask"),
        (feeds | {"tiles": feeds["pixel_values"]}, "unknown input 'tiles'"),
        (feeds | {"aspect_ratio_mask": feeds["aspect_ratio_mask"] * 0}, "aspect_ratio_mask must be 1 for a tile"),
        ({name: array[:1] for name, array in feeds.items()}, "batch_size is 1, but reset made a cache for 3"),
    ]
    for given, message in wrong:
        with pytest.raises(FeedError, match=message):
            runner.encode_images(given)
    found += [decoding.decode(np.arange(3) + 5 + step) for step in range(6)]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_wrong_keys_and_values(runner: Runner, shown: tuple[list[list[int]], ImageBatch]) -> None:
    """An index that there is not, another shape, another dtype."""
    Decoding(runner).prefill(*shown)
    assert runner.vision_spec is not None
    names, made = runner.vision_spec.names(), runner.read_images(0)
    for index in (-1, len(names)):
        with pytest.raises(FeedError, match=rf"there is no tensor {index}: they are {names[0]} \(0\) to"):
            runner.read_images(index)
        with pytest.raises(FeedError, match=rf"there is no tensor {index}: they are {names[0]} \(0\) to"):
            runner.write_images(index, made)
    for array in (made[:1], made.astype(np.float64)):
        with pytest.raises(FeedError, match=rf"{names[0]} must be float32 \[3, .*\], got "):
            runner.write_images(0, array)


def test_steps_that_speak_of_other_pictures(runner: Runner, shown: tuple[list[list[int]], ImageBatch]) -> None:
    """Than the rows were shown."""
    prompts, images = shown
    Decoding(runner).prefill(prompts, images)
    tiles = images.pixel_values.shape[2]
    feeds = {
        "input_ids": np.full((3, 1), 5),
        "position_ids": np.full((3, 1), 40),
        "write_indices": np.full(3, 40),
        "attention_mask": np.ones((3, 41), np.int64),
        "logit_indices": np.zeros((3, 1), np.int64),
    }
    with pytest.raises(FeedError, match="missing inputs: cross_attention_mask"):
        runner.step(feeds)
    with pytest.raises(FeedError, match=rf"speaks of 1 images with {tiles} tiles, but the rows were shown 2 with"):
        runner.step(feeds | {"cross_attention_mask": np.zeros((3, 1, 1, tiles), np.int64)})
    with pytest.raises(FeedError, match="cross_attention_mask holds 3, expected one of -1, 0, 1"):
        runner.step(feeds | {"cross_attention_mask": np.full((3, 1, 2, tiles), 3)})


def test_before_the_first_reset_and_after_close(subject: Subject, shown: tuple[list[list[int]], ImageBatch]) -> None:
    """Instead of a crash inside the library."""
    runner, array = subject.open(), np.zeros(1, np.float32)
    uses = [
        lambda: runner.encode_images(shown[1].encoder_feeds()),
        lambda: runner.read_images(0),
        lambda: runner.write_images(0, array),
    ]
    for use in uses:
        with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called before images are"):
            use()
    runner.reset(3)
    runner.close()
    for use in uses:
        with pytest.raises(FeedError, match="this runner is closed"):
            use()
