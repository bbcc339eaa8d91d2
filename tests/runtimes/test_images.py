"""Images: transformers' Pillow processor and its two mask functions, bit for bit; by hand where they cannot go."""

import functools
import json
import random
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtimes.errors import ArtifactError, FeedError
from runtimes.image_config import FILTERS
from runtimes.images import (
    ImageProcessor,
    best_grid,
    fitted_size,
    tile_grids,
    visible_spans,
)

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]
TOKEN = 9  # the image token in all prompts here
repeatable = settings(deadline=None, derandomize=True, max_examples=150, database=None)


def _processor(folder: Path, **keys: Any) -> ImageProcessor:
    """A processor for tiles of 16 pixels, unless `keys` say otherwise."""
    keys = {"size": {"height": 16, "width": 16}, **keys}
    (folder / "preprocessor_config.json").write_text(json.dumps(keys))
    (folder / "config.json").write_text(json.dumps({"image_token_index": TOKEN}))
    return ImageProcessor(folder)


@pytest.fixture
def processor(tmp_path: Path) -> ImageProcessor:
    return _processor(tmp_path)


def _noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Any:
    """Random pixels, in any of Pillow's modes; of RGBA and the like every band is random."""
    rng = np.random.default_rng([width, height, seed])
    if mode in ("I;16", "I", "F"):
        values = rng.integers(0, 70_000 if mode == "I" else 65_536, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    bands = len(Image.new(mode, (1, 1)).getbands()) if mode not in ("P", "PA", "1") else 1
    if mode == "P":
        image = Image.frombytes("P", (width, height), rng.bytes(width * height))
        image.putpalette(rng.bytes(768))
        return image
    if mode == "PA":
        return _noise(width, height, "P").convert("PA")
    if mode == "1":
        return _noise(width, height, "L").convert("1")
    return Image.frombytes(mode, (width, height), rng.bytes(width * height * bands))


def _transformers(images: Any, **keys: Any) -> dict[str, Any]:
    """What transformers makes of images [B][any number], as numpy."""
    truth = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    processor = truth.MllamaImageProcessorPil(**{"size": {"height": 16, "width": 16}, **keys})
    return dict(processor(images, return_tensors="np"))


def _assert_same(processor: ImageProcessor, image: Any, truth_image: Any = None, **keys: Any) -> None:
    """`processor.tiles` of an image is transformers' result with `keys`, and its padding tiles are zeros."""
    truth = _transformers([[image if truth_image is None else truth_image]], **keys)
    tiles, aspect_ratio_id = processor.tiles(image)
    assert tiles.dtype == truth["pixel_values"].dtype == np.float32
    assert [[len(tiles)]] == truth["num_tiles"]
    np.testing.assert_array_equal(tiles, truth["pixel_values"][0, 0, : len(tiles)])
    assert not truth["pixel_values"][0, 0, len(tiles) :].any()
    assert aspect_ratio_id == truth["aspect_ratio_ids"][0, 0]


# --- pixels -----------------------------------------------------------------------------------------------------------

SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (15, 16),
    (16, 16),
    (17, 16),
    (16, 17),
    (32, 32),
    (33, 31),
    (64, 16),
    (16, 64),
    (65, 16),
]
SIZES += [
    (97, 13),
    (13, 97),
    (211, 199),
    (48, 16),
    (100, 100),
    (1, 10_000),
    (10_000, 1),
    (3, 2_000),
    (640, 480),
    (31, 5),
]


@pytest.mark.parametrize("max_image_tiles", [1, 2, 3, 4, 6])
def test_sizes(tmp_path: Path, max_image_tiles: int) -> None:
    """One pixel, tiles, primes, lines, and more than a canvas holds."""
    processor = _processor(tmp_path, max_image_tiles=max_image_tiles)
    for width, height in SIZES:
        _assert_same(processor, _noise(width, height), max_image_tiles=max_image_tiles)


@repeatable
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 9), st.sampled_from([1, 7, 14, 16, 28, 56, 448, 560]))
def test_grids_and_sizes(height: int, width: int, max_image_tiles: int, tile_size: int) -> None:
    """Transformers' choice of the canvas and of the size within it."""
    truth = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    grids = tile_grids(max_image_tiles)
    assert grids == truth.get_all_supported_aspect_ratios(max_image_tiles)
    grid = best_grid(height, width, grids, tile_size)
    canvas = tuple(side * tile_size for side in grid)
    assert canvas == truth.get_optimal_tiled_canvas(height, width, max_image_tiles, tile_size)
    expected = truth.get_image_size_fit_to_canvas(height, width, *canvas, tile_size)
    assert fitted_size(height, width, grid, tile_size) == expected


def test_grids_by_hand() -> None:
    """Wide, tall, and larger than any canvas, with four tiles of 10 pixels."""
    grids = tile_grids(4)
    assert grids == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    shapes = [(10, 10), (10, 20), (20, 10), (11, 11), (5, 35), (1000, 1000), (1, 1)]
    assert [best_grid(*shape, grids, 10) for shape in shapes] == [
        (1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (2, 2), (1, 1),
    ]  # fmt: skip
    assert fitted_size(1, 1, (1, 1), 10) == (10, 10)  # enlarged to a tile
    assert fitted_size(11, 11, (2, 2), 10) == (11, 11)  # and no further
    assert fitted_size(40, 80, (1, 2), 10) == (10, 20)
    assert fitted_size(1, 1000, (1, 4), 10) == (1, 40)


def test_tiles_by_hand(tmp_path: Path) -> None:
    """A white image of two tiles' width and half their height: row by row, black below, (x / 255 - 0.5) / 0.5."""
    tiles, aspect_ratio_id = _processor(tmp_path, size={"height": 2, "width": 2}).tiles(
        Image.new("RGB", (4, 1), "white")
    )
    assert tiles.shape == (2, 3, 2, 2)
    assert aspect_ratio_id == 2  # one row, two columns
    np.testing.assert_array_equal(tiles, np.tile([[1.0, 1.0], [-1.0, -1.0]], (2, 3, 1, 1)))


@pytest.mark.parametrize("tile_size", [14, 28, 56, 560])
def test_tile_sizes(tmp_path: Path, tile_size: int) -> None:
    size = {"height": tile_size, "width": tile_size}
    for width, height in [(640, 480)] if tile_size == 560 else [(5, 3), (57, 113), (640, 480), (90, 300)]:
        _assert_same(_processor(tmp_path, size=size), _noise(width, height), size=size)


@pytest.mark.parametrize("number", range(len(FILTERS)), ids=FILTERS)
def test_filters(tmp_path: Path, number: int) -> None:
    """Enlarged and reduced, by each of Pillow's filters; the names are Pillow's."""
    assert Image.Resampling(number).name.lower() == FILTERS[number]
    processor = _processor(tmp_path, resample=number)
    for width, height in [(5, 7), (41, 23), (131, 127)]:
        _assert_same(processor, _noise(width, height), resample=number)


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # Llama 3.2 Vision's


@pytest.mark.parametrize(
    "keys",
    [
        {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        {"image_mean": 0.3, "image_std": 0.7},
        {"image_mean": [0, 1, 0.1], "image_std": [1, 3, 0.3]},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        {"rescale_factor": 1, "do_normalize": False},
        {"do_convert_rgb": False},
    ],
    ids=str,
)
def test_rescaling_and_normalising(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Every byte value in every colour."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1) + np.array([0, 85, 170], np.uint8)
    processor = _processor(tmp_path, **keys)
    for image in (Image.fromarray(every), _noise(50, 30)):
        _assert_same(processor, image, **keys)


def test_absent_keys_have_transformers_defaults(tmp_path: Path) -> None:
    """From empty files: 224 pixels, four tiles, bilinear, mean and deviation 0.5, image token 128256."""
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    processor = ImageProcessor(tmp_path)
    assert (processor.tile_size, processor.max_image_tiles, processor.image_token_id) == (224, 4, 128256)
    _assert_same(processor, _noise(300, 100), size={"height": 224, "width": 224})


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Its save_pretrained, with values of its own; and nested in a processor_config.json, which goes first."""
    truth = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    config = pytest.importorskip("transformers.models.mllama.configuration_mllama")
    keys = {"size": {"height": 28, "width": 28}, "max_image_tiles": 3, "resample": 3, "image_mean": CLIP_MEAN}
    truth.MllamaImageProcessorPil(**keys).save_pretrained(tmp_path)
    config.MllamaConfig(image_token_index=77).save_pretrained(tmp_path)
    processor = ImageProcessor(tmp_path)
    assert (processor.tile_size, processor.max_image_tiles, processor.image_token_id) == (28, 3, 77)
    _assert_same(processor, _noise(50, 91), **keys)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_image_tiles": 2}}))
    assert ImageProcessor(tmp_path).max_image_tiles == 2
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "MllamaProcessor"}))
    assert ImageProcessor(tmp_path).max_image_tiles == 3


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_both_names_of_the_image_token(tmp_path: Path, name: str) -> None:
    _processor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: 0}))
    assert ImageProcessor(tmp_path).image_token_id == 0


# --- modes and files --------------------------------------------------------------------------------------------------

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_modes(processor: ImageProcessor, mode: str) -> None:
    """Transparency of any degree over white; 16 bits as Pillow makes bytes of them."""
    image = _noise(37, 21, mode)
    assert image.mode == mode
    _assert_same(processor, image)


@pytest.mark.parametrize(("mode", "transparency"), [("P", 7), ("P", bytes(range(256))), ("L", 3), ("RGB", (9, 9, 9))])
def test_transparency_beside_the_pixels(processor: ImageProcessor, mode: str, transparency: Any) -> None:
    """One colour of a palette, degrees for a palette, or one colour."""
    image = _noise(37, 21, mode)
    image.paste(image.getpixel((0, 0)), (0, 0, 9, 9))
    image.info["transparency"] = transparency
    _assert_same(processor, image)


def test_transparency_stays_where_nothing_is_converted(tmp_path: Path) -> None:
    """With do_convert_rgb off, a transparent colour is a colour."""
    image = Image.new("RGB", (20, 20), (9, 9, 9))
    image.info["transparency"] = (9, 9, 9)
    _assert_same(_processor(tmp_path, do_convert_rgb=False), image, do_convert_rgb=False)


def _save(mode: str, path: Path) -> None:
    _noise(33, 57, mode).save(path)


def _gif(path: Path) -> None:
    """Two frames, of which the first has a transparent colour."""
    first, second = _noise(40, 30, "P"), _noise(40, 30, "P", seed=1)
    first.save(path, save_all=True, append_images=[second], transparency=5)


def _jpeg_turned(path: Path, mode: str = "RGB") -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    _noise(50, 20, mode).save(path, exif=exif)


FILES: dict[str, Callable[[Path], None]] = {
    "turned.jpg": _jpeg_turned,
    "turned_cmyk.jpg": lambda path: _jpeg_turned(path, "CMYK"),
    "animated.gif": _gif,
    **{f"{mode}.png": functools.partial(_save, mode) for mode in ("RGB", "RGBA", "LA", "1", "P")},
    "sixteen.png": functools.partial(_save, "I;16"),
    "transparent.png": lambda path: _noise(33, 57, "P").save(path, transparency=bytes(range(256))),
    "lossless.webp": lambda path: _noise(33, 57, "RGBA").save(path, lossless=True),
    "float.tiff": functools.partial(_save, "F"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_files(processor: ImageProcessor, tmp_path: Path, name: str) -> None:
    """A path is what transformers makes of a path; an image opened by Pillow what it makes of an image."""
    path = tmp_path / name
    FILES[name](path)
    _assert_same(processor, processor.open(path), truth_image=str(path))
    _assert_same(processor, processor.open(str(path)), truth_image=str(path))
    with Image.open(path) as image, Image.open(path) as again:
        _assert_same(processor, image, truth_image=again)


def test_orientation_is_of_the_file_only(processor: ImageProcessor, tmp_path: Path) -> None:
    """By hand: 50 x 20 pixels that are to be turned are tall from a path, wide from an image."""
    _jpeg_turned(tmp_path / "turned.jpg")
    assert processor.open(tmp_path / "turned.jpg").size == (20, 50)
    with Image.open(tmp_path / "turned.jpg") as image:
        grids = [
            tile_grids(4)[processor.tiles(each)[1] - 1] for each in (image, processor.open(tmp_path / "turned.jpg"))
        ]
    assert grids == [(1, 3), (3, 1)]


def test_an_image_is_left_as_it_was(processor: ImageProcessor) -> None:
    image = _noise(20, 20, "RGBA")
    before = image.tobytes()
    tiles, _ = processor.tiles(image)
    tiles += 1
    np.testing.assert_array_equal(processor.tiles(image)[0] + 1, tiles)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


# --- masks ------------------------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.sampled_from([TOKEN, TOKEN, 1, 2, 3]), min_size=1, max_size=14)


def _truth_mask(prompts: list[list[int]], tile_counts: list[list[int]], max_image_tiles: int) -> np.ndarray:
    """Transformers' mask of 0 and 1, int64 [B, S, I, T]."""
    truth = pytest.importorskip("transformers.models.mllama.processing_mllama")
    spans = [truth.get_cross_attention_token_mask(prompt, TOKEN) for prompt in prompts]
    return truth.convert_sparse_cross_attention_mask_to_dense(
        spans, tile_counts, max_image_tiles, max(len(prompt) for prompt in prompts)
    )


@pytest.fixture(scope="module")
def small_processors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ImageProcessor]:
    """By max_image_tiles, with tiles of one pixel: an image of n x 1 pixels has n tiles."""
    size = {"height": 1, "width": 1}
    folders = {tiles: tmp_path_factory.mktemp(f"tiles{tiles}") for tiles in range(1, 6)}
    return {tiles: _processor(folder, size=size, max_image_tiles=tiles) for tiles, folder in folders.items()}


@repeatable
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=4), tiles=st.integers(1, 5), random=st.randoms())
def test_masks(
    small_processors: dict[int, ImageProcessor], prompts: list[list[int]], tiles: int, random: random.Random
) -> None:
    """Within each row transformers' ones; 0 and -1 by their rules, one entry at a time; both ways to be blind."""
    tile_counts = [[random.randint(1, tiles) for token in prompt if token == TOKEN] for prompt in prompts]
    assume(any(tile_counts))
    images = [[_noise(count, 1) for count in of_row] for of_row in tile_counts]
    truth = _truth_mask(prompts, tile_counts, tiles)
    truth_images = _transformers(images, size={"height": 1, "width": 1}, max_image_tiles=tiles)
    assert truth_images["num_tiles"] == tile_counts
    blind_tokens = any(TOKEN in prompt and prompt[0] != TOKEN for prompt in prompts)
    for blind in ("transformers", "zero"):
        batch = small_processors[tiles].batch(prompts, images, blind=blind)
        assert batch is not None
        kept = (
            tiles if blind == "transformers" and blind_tokens else max(max(of_row, default=0) for of_row in tile_counts)
        )
        for name in ("pixel_values", "aspect_ratio_mask"):
            np.testing.assert_array_equal(getattr(batch, name), truth_images[name][:, :, :kept])
        np.testing.assert_array_equal(batch.aspect_ratio_ids, truth_images["aspect_ratio_ids"])
        mask = batch.cross_attention_mask
        assert mask.shape == (*truth.shape[:3], kept)
        assert mask.dtype == np.int64
        for row, s, i in np.ndindex(*mask.shape[:3]):
            at = min(s, len(prompts[row]) - 1)  # padding repeats the last token
            unseen = 0 if i < len(tile_counts[row]) and blind == "transformers" else -1
            np.testing.assert_array_equal(mask[row, s, i], np.where(truth[row, at, i, :kept] == 1, 1, unseen))


@repeatable
@given(PROMPTS)
def test_spans(prompt: list[int]) -> None:
    """Transformers' pairs, whose -1 is the end."""
    truth = pytest.importorskip("transformers.models.mllama.processing_mllama")
    pairs = truth.get_cross_attention_token_mask(prompt, TOKEN)
    expected = [range(start, len(prompt) if end == -1 else end) for start, end in pairs]
    assert visible_spans(prompt, TOKEN) == expected


def test_spans_by_hand() -> None:
    """Alone; one after the other; a run that sees as one; a run at the end; none."""
    assert visible_spans([1, TOKEN, 2, 3], TOKEN) == [range(1, 4)]
    assert visible_spans([TOKEN, 2, TOKEN, 3], TOKEN) == [range(0, 2), range(2, 4)]
    assert visible_spans([TOKEN, TOKEN, 2, TOKEN, 3], TOKEN) == [range(0, 3), range(1, 3), range(3, 5)]
    assert visible_spans([1, TOKEN, TOKEN], TOKEN) == [range(1, 3), range(2, 3)]
    assert visible_spans([1, 2], TOKEN) == visible_spans([], TOKEN) == []


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_that_of_transformers(processor: ImageProcessor, tmp_path: Path) -> None:
    """Rows of three, one and two images, paths among them; pixel values, ids and masks."""
    _noise(30, 60).save(tmp_path / "tall.png")
    path = tmp_path / "tall.png"
    images = [[_noise(16, 16), path, _noise(64, 9)], [_noise(99, 99, "L")], [str(path), _noise(5, 40, "RGBA")]]
    prompts = [[1, TOKEN, TOKEN, 5, TOKEN, 6], [TOKEN, 3], [1, 2, TOKEN, 4, TOKEN]]
    truth = _transformers([[str(image) if image is path else image for image in of_row] for of_row in images])
    batch = processor.batch(prompts, images)
    assert batch is not None
    feeds = batch.encoder_feeds()
    assert feeds.keys() == {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, truth[name])
        assert array.dtype == truth[name].dtype
    mask = _truth_mask(prompts, truth["num_tiles"], 4)
    for row, prompt in enumerate(prompts):
        seen = batch.cross_attention_mask[row, : len(prompt)] == 1
        np.testing.assert_array_equal(seen, mask[row, : len(prompt)] == 1)


def test_rows_without_images(processor: ImageProcessor) -> None:
    """By hand: a row of text beside one with an image of two tiles, and a token that sees nothing."""
    batch = processor.batch([[1, 2, 3], [4, TOKEN]], [[], [_noise(32, 16)]])
    assert batch is not None
    assert not batch.pixel_values[0].any()
    assert batch.aspect_ratio_ids.tolist() == [[0], [2]]
    assert batch.aspect_ratio_mask.tolist() == [[[1, 0, 0, 0]], [[1, 1, 0, 0]]]
    assert batch.cross_attention_mask[0].tolist() == [[[-1] * 4]] * 3
    assert batch.cross_attention_mask[1].tolist() == [[[0] * 4], [[1, 1, 0, 0]], [[1, 1, 0, 0]]]


def test_tiles_that_nobody_needs_are_left_out(processor: ImageProcessor) -> None:
    """Where nobody is blind, and with "zero": two tiles of four."""
    images = [[_noise(32, 16)]]
    seeing, zero = processor.batch([[TOKEN, 1]], images), processor.batch([[1, TOKEN]], images, blind="zero")
    assert seeing is not None
    assert zero is not None
    assert seeing.cross_attention_mask.tolist() == [[[[1, 1]], [[1, 1]]]]
    assert zero.cross_attention_mask.tolist() == [[[[-1, -1]], [[1, 1]]]]
    assert seeing.pixel_values.shape == zero.pixel_values.shape == (1, 1, 2, 3, 16, 16)
    assert seeing.aspect_ratio_mask.tolist() == zero.aspect_ratio_mask.tolist() == [[[1, 1]]]


def test_no_images_no_batch(processor: ImageProcessor) -> None:
    assert processor.batch([[1], [2]], [[], []]) is None
    assert processor.batch([], []) is None


def test_last_mask_and_repeat(processor: ImageProcessor) -> None:
    """The mask of each row's last real token; rows twice, one after the other."""
    images = [[_noise(16, 16), _noise(64, 16)], [_noise(32, 16)]]
    batch = processor.batch([[TOKEN, 1, TOKEN, 2], [3, TOKEN]], images)
    assert batch is not None
    last = batch.last_mask([4, 2])
    assert last.tolist() == [[[[0, 0, 0, 0], [1, 1, 1, 1]]], [[[1, 1, 0, 0], [-1, -1, -1, -1]]]]
    np.testing.assert_array_equal(batch.last_mask([1, 1])[:, 0], batch.cross_attention_mask[:, 0])
    twice = batch.repeat(2)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"):
        np.testing.assert_array_equal(getattr(twice, name), getattr(batch, name)[[0, 0, 1, 1]])


# --- messages: input --------------------------------------------------------------------------------------------------


def _bomb(path: Path, times: float) -> None:
    """A PNG whose header claims `times` as many pixels as Pillow's limit, in a few bytes."""
    _noise(4, 4).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = int(Image.MAX_IMAGE_PIXELS * times / 1000).to_bytes(4) + (1000).to_bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    path.write_bytes(data)


def _truncated(path: Path) -> None:
    _noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent.png": (lambda path: None, "absent.png: No such file or directory: give the path of an image file"),
    "folder.png": (lambda path: path.mkdir(), "folder.png: Is a directory: give the path of an image file"),
    "x" * 300: (lambda path: None, "xxx: File name too long: give the path of an image file"),
    "a.txt": (
        lambda path: path.write_text("hello"),
        "a.txt is not an image that Pillow knows: expected PNG, JPEG, WEBP, GIF",
    ),
    "empty.png": (lambda path: path.touch(), "empty.png is not an image that Pillow knows: expected PNG"),
    "cut.png": (_truncated, "cut.png cannot be read: image file is truncated"),
    "cut.jpg": (_truncated, ": it is damaged or unusual, save it again as PNG"),
    "large.png": (
        lambda path: _bomb(path, 1.5),
        "could be decompression bomb DOS attack. Scale it down, or raise PIL.Image.",
    ),
    "bomb.png": (lambda path: _bomb(path, 3), "bomb.png is too large: Image size ("),
}


@pytest.mark.parametrize("name", BAD_FILES, ids=lambda name: name[:12])
def test_files_that_are_no_images(processor: ImageProcessor, tmp_path: Path, name: str) -> None:
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    filters = list(warnings.filters)
    with pytest.raises(FeedError) as caught:
        processor.open(tmp_path / name)
    assert message in str(caught.value)
    with pytest.raises(FeedError) as caught:
        processor.batch([[1], [TOKEN, TOKEN]], [[], [_noise(1, 1), str(tmp_path / name)]])
    assert message in str(caught.value)
    assert str(caught.value).startswith("row 1, image 1: ")
    assert warnings.filters == filters


def test_many_pixels_are_fine_below_the_limit(processor: ImageProcessor, tmp_path: Path, monkeypatch: Any) -> None:
    """The limit is Pillow's own, which a caller may raise."""
    _noise(40, 30).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(FeedError, match=r"image\.png is too large: Image size \(1200 pixels\) exceeds limit of 1199"):
        processor.open(tmp_path / "image.png")
    for limit in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert processor.open(tmp_path / "image.png").size == (40, 30)


def test_images_that_cannot_be_used(processor: ImageProcessor, tmp_path: Path) -> None:
    with pytest.raises(FeedError, match=r"expected a path or a PIL\.Image\.Image, got ndarray"):
        processor.tiles(np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(
        FeedError, match="an image of mode RGB and 0 x 7 pixels cannot be shown: it must have at least one"
    ):
        processor.tiles(Image.new("RGB", (0, 7)))
    with pytest.raises(
        FeedError, match="an image of mode La and 2 x 2 pixels cannot be read: conversion from La to L not"
    ):
        processor.tiles(Image.new("La", (2, 2)))
    _truncated(tmp_path / "cut.png")
    with (
        Image.open(tmp_path / "cut.png") as image,
        pytest.raises(FeedError, match="cannot be read: image file is trunc"),
    ):
        processor.tiles(image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "HSV"])
def test_modes_that_are_not_converted(tmp_path: Path, mode: str) -> None:
    """With do_convert_rgb off, for which the graph's three colours leave no more."""
    processor = _processor(tmp_path, do_convert_rgb=False)
    with pytest.raises(
        FeedError, match=rf"mode {mode} .* must be RGB, as do_convert_rgb is false here: use image\.conv"
    ):
        processor.tiles(Image.new(mode, (4, 4)))


def test_image_tokens_and_images_differ_in_number(processor: ImageProcessor, tmp_path: Path) -> None:
    """Both ways, in any row, before any image is opened; the token by its text where there is a tokenizer."""
    fix = "give one image for each image token, in their order"
    with pytest.raises(FeedError) as caught:
        processor.batch([[TOKEN, TOKEN]], [["absent.png"]])
    assert str(caught.value) == f"row 0: the prompt holds 2 image tokens (id 9) but 1 image was given: {fix}"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": TOKEN, "content": "<|image|>"}]}))
    with pytest.raises(FeedError) as caught:
        processor.batch([[TOKEN], [1]], [["absent.png"], ["absent.png", "absent.png"]])
    assert str(caught.value) == (
        f"row 1: the prompt holds no image tokens (<|image|>, id 9) but 2 images were given: {fix}"
    )
    with pytest.raises(FeedError) as caught:
        processor.batch([[TOKEN]], [[]])
    assert (
        str(caught.value) == f"row 0: the prompt holds 1 image token (<|image|>, id 9) but no images were given: {fix}"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"added_tokens": null}', '{"added_tokens": [1]}', '{"added_tokens": []}']
)
def test_a_tokenizer_that_does_not_tell(processor: ImageProcessor, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FeedError, match=r"holds 1 image token \(id 9\) but no images were given"):
        processor.batch([[TOKEN]], [[]])


@pytest.mark.parametrize("images", [[], [[], []], ["image.png"], [None]], ids=str)
def test_images_are_lists_of_rows(processor: ImageProcessor, images: Any) -> None:
    with pytest.raises(FeedError) as caught:
        processor.batch([[TOKEN]], images)
    assert str(caught.value) == (
        f"images must hold one list for each prompt (1), got {images!r}: a prompt without images has an empty list"
    )


def test_unknown_ways_to_be_blind(processor: ImageProcessor) -> None:
    with pytest.raises(FeedError, match='blind must be "transformers" or "zero", got \'none\''):
        processor.batch([[1]], [[]], blind="none")


# --- messages: files of the artifact ----------------------------------------------------------------------------------

NOT_DONE: list[tuple[str, Any, str]] = [
    ("do_resize", False, "true, found false"),
    ("do_pad", False, "true, found false"),
    ("do_pad", None, "true, found null"),
    ("do_rescale", 1, "true or false, found 1"),
    ("do_normalize", None, "true or false, found null"),
    ("do_convert_rgb", "yes", 'true or false, found "yes"'),
    ("rescale_factor", "1/255", 'a number, found "1/255"'),
    ("rescale_factor", True, "a number, found true"),
    ("rescale_factor", float("nan"), "a number, found NaN"),
    ("rescale_factor", 10**400, "a number, found 1000"),
    ("image_mean", [0.5, 0.5], "a number or a list of three, found [0.5, 0.5]"),
    ("image_mean", [0.5, 0.5, None], "a number or a list of three, found [0.5, 0.5, null]"),
    ("image_std", [0.5, 0.0, 0.5], "a number or a list of three, without 0, found [0.5, 0.0, 0.5]"),
    ("image_std", 0, "a number or a list of three, without 0, found 0"),
    ("resample", 6, "0 to 5: nearest, lanczos, bilinear, bicubic, box, hamming, found 6"),
    ("resample", "bilinear", '0 to 5: nearest, lanczos, bilinear, bicubic, box, hamming, found "bilinear"'),
    ("resample", None, "0 to 5: nearest, lanczos, bilinear, bicubic, box, hamming, found null"),
    ("size", {"height": 16, "width": 32}, 'a square {"height": N, "width": N}, found {"height": 16, "width": 32}'),
    ("size", {"shortest_edge": 16}, 'a square {"height": N, "width": N}, found {"shortest_edge": 16}'),
    ("size", {"height": 0, "width": 0}, 'a square {"height": N, "width": N}, found {"height": 0, "width": 0}'),
    ("size", 16, 'a square {"height": N, "width": N}, found 16'),
    ("max_image_tiles", 0, "a whole number from 1 to 1024, found 0"),
    ("max_image_tiles", 2.5, "a whole number from 1 to 1024, found 2.5"),
    (
        "image_processor_type",
        "CLIPImageProcessor",
        'MllamaImageProcessor, MllamaImageProcessorFast, MllamaImageProcessorPil, found "CLIPImageProcessor"',
    ),
]


@pytest.mark.parametrize(("key", "value", "words"), NOT_DONE, ids=lambda value: str(value)[:30])
def test_keys_that_are_not_done_here(tmp_path: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        _processor(tmp_path, **{key: value})
    assert f"{tmp_path / 'preprocessor_config.json'}: {key} must be {words}" in str(caught.value)
    assert str(caught.value).endswith(": nothing else is done here")


@pytest.mark.parametrize("name", ["MllamaImageProcessor", "MllamaImageProcessorFast", "MllamaImageProcessorPil"])
def test_all_names_of_the_processor(tmp_path: Path, name: str) -> None:
    assert _processor(tmp_path, image_processor_type=name).tile_size == 16


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json"])
def test_files_missing_or_damaged(processor: ImageProcessor, tmp_path: Path, name: str) -> None:
    for content, message in [
        (b"{", f"{tmp_path / name} cannot be read: Expecting property name"),
        (b"\xff", "copy it from the checkpoint again"),
        (b"[1]", f"{tmp_path / name} must hold a JSON object, found [1]: copy it from the checkpoint again"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError) as caught:
            ImageProcessor(tmp_path)
        assert message in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        ImageProcessor(tmp_path)
    message = f"{tmp_path} holds no {name}, which images need: copy the one of the checkpoint there"
    assert str(caught.value) == message


def test_a_nested_processor_must_be_an_object(processor: ImageProcessor, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(ArtifactError, match=r"processor_config\.json: image_processor must be a JSON object, found 3"):
        ImageProcessor(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"do_pad": false}}')
    with pytest.raises(ArtifactError, match=r"/processor_config\.json: do_pad must be true, found false"):
        ImageProcessor(tmp_path)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"image_token_index": "x"}, '["x"]'),
        ({"image_token_id": None}, "[null]"),
        ({"image_token_id": -1}, "[-1]"),
        ({"image_token_id": True}, "[true]"),
        ({"image_token_index": 3, "image_token_id": 4}, "[3, 4]"),
    ],
)
def test_image_tokens_that_are_none(tmp_path: Path, config: dict[str, Any], found: str) -> None:
    _processor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError) as caught:
        ImageProcessor(tmp_path)
    expected = f"{tmp_path / 'config.json'}: image_token_index or image_token_id must be one token id, found {found}"
    assert str(caught.value) == expected


# --- without Pillow ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path

class Unimportable:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "PIL", "tokenizers"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Unimportable())

from runtimes.errors import RuntimeMissingError
from runtimes.images import ImageProcessor

processor = ImageProcessor(Path(sys.argv[1]))
assert processor.batch([[1]], [[]]) is None
for use, *inputs in ((processor.open, "a.png"), (processor.tiles, None), (processor.batch, [[9]], [["a.png"]])):
    try:
        use(*inputs)
    except RuntimeMissingError as error:
        print(error)
"""


def test_pillow_is_needed_for_images_only(processor: ImageProcessor, tmp_path: Path) -> None:
    """A process without torch, transformers and Pillow imports the module, and text goes on; images say what to do."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    message = "images need Pillow, which cannot be imported (PIL is not installed here): pip install pillow"
    assert done.stdout.splitlines() == [message] * 3
