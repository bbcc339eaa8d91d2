"""Images to tiles, and which token sees which tile: what Llama 3.2 Vision is fed. Needs Pillow once there is an image.

Pixels are bit for bit those of transformers' Pillow processor. Letters: B rows, I images of a row, T tiles of an image,
C colours, H and W pixels of a tile, S tokens of the longest prompt.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.files import read_json, why_no_file
from runtimes.image_config import read_image_keys, read_image_token_id

if TYPE_CHECKING:
    from PIL import Image

# Pillow's other formats are seldom pictures that a user has; of some of them, it starts a program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI")

SEEN, UNSEEN, HIDDEN = 1, 0, -1  # the values of ImageBatch.cross_attention_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """What the images of a batch feed to the graphs. A row with fewer images than I ends with padding images.

    Attributes:
        pixel_values: float32 [B, I, T, C, H, W], 0 in padding tiles.
        aspect_ratio_ids: int64 [B, I]; 0 is a padding image.
        aspect_ratio_mask: int64 [B, I, T]; 1 is a real tile and, as in transformers, a padding image's first tile.
        cross_attention_mask: int64 [B, S, I, T]. 1: the token sees the tile. 0: it does not; but a token that sees no
            tile attends to all those with 0, as in transformers. -1: the tile is hidden in any case. Positions after a
            row's end repeat its last token.
    """

    pixel_values: np.ndarray
    aspect_ratio_ids: np.ndarray
    aspect_ratio_mask: np.ndarray
    cross_attention_mask: np.ndarray

    def encoder_feeds(self) -> dict[str, np.ndarray]:
        """What the vision encoder is fed, by name; the rest is the decoder's."""
        return {name: getattr(self, name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def last_mask(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """What each row's last token, and so every later one, sees: int64 [B, 1, I, T]; lengths [B] of the prompts."""
        last = np.asarray(lengths, np.int64) - 1
        return self.cross_attention_mask[np.arange(len(last)), last][:, None]

    def repeat(self, n: int) -> "ImageBatch":
        """Every row n times in succession: row b becomes rows n * b to n * b + n - 1."""
        return ImageBatch(**{field.name: getattr(self, field.name).repeat(n, 0) for field in dataclasses.fields(self)})


class ImageProcessor:
    """An artifact's preprocessor_config.json and config.json, applied to images and prompts.

    Attributes:
        tile_size: height and width of a tile in pixels.
        max_image_tiles: the most tiles that an image is cut into.
        image_token_id: the token that stands for an image in a prompt.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files; absent keys have transformers' defaults.

        Raises:
            ArtifactError: a file is missing or damaged, or asks for what is not done here.
        """
        keys = read_image_keys(folder)
        self.tile_size: int = keys["size"]["height"]
        self.max_image_tiles: int = keys["max_image_tiles"]
        self.image_token_id = read_image_token_id(folder)
        self._folder = folder
        self._converts: bool = keys["do_convert_rgb"]
        self._resample: int = keys["resample"]
        self._grids = tile_grids(self.max_image_tiles)
        self._levels = _levels(keys)

    @classmethod
    def of(cls, artifact: Artifact) -> "ImageProcessor":
        """An artifact's, checked against its vision encoder.

        Raises:
            ArtifactError: as __init__, or it makes tiles that the encoder does not take.
            FeedError: the model reads text only.
        """
        vision = artifact.manifest.vision
        if vision is None:
            raise FeedError("this model reads text only: leave the images out")
        processor = cls(artifact.folder)
        (pixels,) = (s for s in artifact.manifest.graphs["vision_encoder"].signature.inputs if s.name == "pixel_values")
        processor.require_tiles(vision.max_tiles, *pixels.shape[3:5])
        return processor

    def require_tiles(self, max_tiles: int, channels: int | str, size: int | str) -> None:
        """ArtifactError unless these are the tiles that are made."""
        made, taken = (self.max_image_tiles, 3, self.tile_size), (max_tiles, channels, size)
        if made != taken:
            raise ArtifactError(
                f"{self._folder}: images become up to {made[0]} tiles of {made[1]} colours and {made[2]} pixels, but"
                f" the vision encoder takes up to {taken[0]} of {taken[1]} and {taken[2]}: check size and"
                " max_image_tiles in preprocessor_config.json against vision_config in config.json"
            )

    def open(self, path: str | Path) -> "Image.Image":
        """A file as an RGB image, as transformers makes it of a path.

        It is turned as its EXIF orientation says, transparency is dropped, and of an animation the first frame taken.

        Raises:
            FeedError: not a whole image, or one of more than PIL.Image.MAX_IMAGE_PIXELS pixels.
            RuntimeMissingError: Pillow is not installed.
        """
        pillow = _import_pillow()
        if reason := why_no_file(Path(path)):  # a pipe would never answer
            raise FeedError(f"{path}: {reason}: give the path of an image file")
        with _reading(str(path)), pillow.Image.open(path, formats=FORMATS) as image:
            return pillow.ImageOps.exif_transpose(image).convert("RGB")

    def tiles(self, image: "Image.Image") -> tuple[np.ndarray, int]:
        """The real tiles, float32 [t, C, H, W] with t <= max_image_tiles, row by row; and the aspect ratio id, from 1.

        The image is taken as it is (EXIF orientation ignored), with white behind transparency.

        Raises:
            FeedError: not an image, without pixels, damaged, or of a mode that cannot become RGB.
            RuntimeMissingError: Pillow is not installed.
        """
        rgb, size = self._rgb(image), self.tile_size
        rows, columns = grid = best_grid(rgb.height, rgb.width, self._grids, size)
        height, width = fitted_size(rgb.height, rgb.width, grid, size)
        canvas_HWC = np.zeros((rows * size, columns * size, 3), np.uint8)  # padding is black, and normalised like it
        canvas_HWC[:height, :width] = np.asarray(rgb.resize((width, height), self._resample))
        bytes_tCHW = (
            canvas_HWC.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
        )
        return self._levels[np.arange(3)[:, None, None], bytes_tCHW], self._grids.index(grid) + 1

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence["Image.Image | str | Path"]],
        *,
        blind: str = "transformers",
    ) -> ImageBatch | None:
        """Prompts [B], and the images or paths [B][any number] of their image tokens, in order; None without any image.

        `blind` is about tokens that see no image although their row has some. "transformers": they attend to all
        max_image_tiles tiles of the row's images, as they would if the row were alone. "zero": they get nothing from
        cross-attention, as in Meta's own code. T is max_image_tiles where "transformers" meets such a token; else the
        largest number of real tiles, as the vision encoder adds by itself what padding it needs.

        Raises:
            FeedError: images and image tokens differ in number, or an image is refused by `open` or `tiles`.
            RuntimeMissingError: Pillow is not installed.
        """
        self._check_batch(prompts, images, blind)
        if not any(images):
            return None
        made: dict[tuple[int, int], tuple[np.ndarray, int]] = {}
        for row, of_row in enumerate(images):
            made |= {(row, i): self._tiles_of(row, i, image) for i, image in enumerate(of_row)}
        T = max(len(tiles) for tiles, _ in made.values())
        blind_start = (
            of_row and prompt[0] != self.image_token_id for prompt, of_row in zip(prompts, images, strict=True)
        )
        if blind == "transformers" and any(blind_start):
            T = self.max_image_tiles
        shape_BIT = (len(prompts), max(map(len, images)), T)
        pixel_values = np.zeros((*shape_BIT, 3, self.tile_size, self.tile_size), np.float32)
        ids, tile_mask = np.zeros(shape_BIT[:2], np.int64), np.zeros(shape_BIT, np.int64)
        tile_mask[:, :, 0] = 1
        for (row, i), (tiles, aspect_ratio_id) in made.items():
            pixel_values[row, i, : len(tiles)] = tiles
            tile_mask[row, i, : len(tiles)] = 1
            ids[row, i] = aspect_ratio_id
        return ImageBatch(
            pixel_values=pixel_values,
            aspect_ratio_ids=ids,
            aspect_ratio_mask=tile_mask,
            cross_attention_mask=cross_attention_mask(prompts, self.image_token_id, tile_mask, blind),
        )

    def _tiles_of(self, row: int, i: int, image: "Image.Image | str | Path") -> tuple[np.ndarray, int]:
        try:
            return self.tiles(self.open(image) if isinstance(image, str | Path) else image)
        except FeedError as error:
            raise FeedError(f"row {row}, image {i}: {error}") from None

    def _rgb(self, image: "Image.Image") -> "Image.Image":
        pillow = _import_pillow()
        if not isinstance(image, pillow.Image.Image):
            raise FeedError(f"expected a path or a PIL.Image.Image, got {type(image).__name__}")
        what = f"an image of mode {image.mode} and {image.width} x {image.height} pixels"
        if not image.width * image.height:
            raise FeedError(f"{what} cannot be shown: it must have at least one pixel")
        if not self._converts and image.mode != "RGB":
            raise FeedError(f"{what} must be RGB, as do_convert_rgb is false here: use image.convert('RGB')")
        with _reading(what):
            if self._converts and ("A" in image.getbands() or image.info.get("transparency") is not None):
                white = pillow.Image.new("RGBA", image.size, "white")
                image = pillow.Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")

    def _check_batch(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Any]], blind: str) -> None:
        if blind not in ("transformers", "zero"):
            raise FeedError(f'blind must be "transformers" or "zero", got {blind!r}')
        if len(images) != len(prompts) or not all(isinstance(of_row, list | tuple) for of_row in images):
            raise FeedError(
                f"images must hold one list for each prompt ({len(prompts)}), got {images!r:.80}:"
                " a prompt without images has an empty list"
            )
        for row, (prompt, of_row) in enumerate(zip(prompts, images, strict=True)):
            tokens = sum(token == self.image_token_id for token in prompt)
            if tokens != len(of_row):
                raise FeedError(
                    f"row {row}: the prompt holds {_count(tokens, 'image token')}"
                    f" ({_token_name(self._folder, self.image_token_id)}) but {_count(len(of_row), 'image')}"
                    f" {'was' if len(of_row) == 1 else 'were'} given:"
                    " give one image for each image token, in their order"
                )


def show_images(
    artifact: Artifact,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence["Image.Image | str | Path"]],
    *,
    blind: str = "transformers",
) -> ImageBatch | None:
    """ImageProcessor.batch for any artifact: one whose model reads text only takes no images, and needs no files.

    Raises:
        ArtifactError: the artifact's preprocessor_config.json is missing, damaged, or does not fit its vision encoder.
        FeedError: as ImageProcessor.batch, or images for a model that reads text only.
    """
    if artifact.manifest.vision is None and not any(images):
        return None
    tokens = {token for prompt in prompts for token in prompt}
    if not any(images) and read_image_token_id(artifact.folder) not in tokens:
        return None
    return ImageProcessor.of(artifact).batch(prompts, images, blind=blind)


def tile_grids(max_image_tiles: int) -> list[tuple[int, int]]:
    """(rows, columns) of all grids of at most that many tiles; an aspect ratio id is a grid's place here, from 1."""
    counts = range(1, max_image_tiles + 1)
    return [(rows, columns) for rows in counts for columns in counts[: max_image_tiles // rows]]


def best_grid(height: int, width: int, grids: list[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """The grid an image fills with the least enlargement, else reduction; of equals the smallest, then the first."""
    scales = {grid: min(grid[0] * tile_size / height, grid[1] * tile_size / width) for grid in grids}
    best = min((scale for scale in scales.values() if scale >= 1), default=max(scales.values()))
    return min((grid for grid in grids if scales[grid] == best), key=math.prod)


def fitted_size(height: int, width: int, grid: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """(height, width) an image is resized to: it keeps its shape, fits its grid, and grows to one tile at most."""
    most_height, most_width = (
        min(max(size, tile_size), tiles * tile_size) for size, tiles in zip((height, width), grid, strict=True)
    )
    scale_h, scale_w = most_height / height, most_width / width
    if scale_w < scale_h:
        return min(math.floor(height * scale_w) or 1, most_height), most_width
    return most_height, min(math.floor(width * scale_h) or 1, most_width)


def visible_spans(prompt: Sequence[int], image_token_id: int) -> list[range]:
    """For each image token the positions that see its image: itself and all before the next run of image tokens."""
    places = [i for i, token in enumerate(prompt) if token == image_token_id]
    run_starts = [i for i in places if i == 0 or prompt[i - 1] != image_token_id]
    return [range(i, min((start for start in run_starts if start > i), default=len(prompt))) for i in places]


def cross_attention_mask(
    prompts: Sequence[Sequence[int]], image_token_id: int, tile_mask: np.ndarray, blind: str
) -> np.ndarray:
    """ImageBatch.cross_attention_mask, for tile_mask [B, I, T] of images that prompts [B] hold a token for."""
    mask = np.full((len(prompts), max(map(len, prompts)), *tile_mask.shape[1:]), HIDDEN, np.int64)
    for row, prompt in enumerate(prompts):
        for i, span in enumerate(visible_spans(prompt, image_token_id)):
            if blind == "transformers":
                mask[row, :, i] = UNSEEN
            mask[row, span.start : span.stop, i, : tile_mask[row, i].sum()] = SEEN
        mask[row, len(prompt) :] = mask[row, len(prompt) - 1]
    return mask


def _import_pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise RuntimeMissingError(
            f"images need Pillow, which cannot be imported ({error}): pip install pillow"
        ) from None
    return PIL


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Make a FeedError about `what` of anything that Pillow raises inside."""
    pillow = _import_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.Image.DecompressionBombWarning)
            yield
    except (pillow.Image.DecompressionBombWarning, pillow.Image.DecompressionBombError) as error:
        raise FeedError(
            f"{what} is too large: {error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except pillow.UnidentifiedImageError:
        raise FeedError(f"{what} is not an image that Pillow knows: expected {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and others
        if isinstance(error, OSError) and error.strerror:  # of the file system
            raise FeedError(f"{what}: {error.strerror}: give the path of an image file") from None
        raise FeedError(f"{what} cannot be read: {error}: it is damaged or unusual, save it again as PNG") from None


def _levels(keys: dict[str, Any]) -> np.ndarray:
    """What each byte becomes, float32 [C, 256]: rescaled in float64 and rounded, then normalised in float32."""
    levels = np.tile(np.arange(256, dtype=np.float64), (3, 1))
    if keys["do_rescale"]:
        levels *= keys["rescale_factor"]
    levels = levels.astype(np.float32)
    if keys["do_normalize"]:  # a number is for all colours
        levels -= np.array(keys["image_mean"], np.float32).reshape(-1, 1)
        levels /= np.array(keys["image_std"], np.float32).reshape(-1, 1)
    return levels


def _token_name(folder: Path, token_id: int) -> str:
    """A token's text and id, or its id alone where tokenizer.json does not tell: this is for messages."""
    try:
        added = read_json(folder / "tokenizer.json")["added_tokens"]
        return f"{next(token['content'] for token in added if token['id'] == token_id)}, id {token_id}"
    except (ValueError, LookupError, TypeError, StopIteration):
        return f"id {token_id}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
