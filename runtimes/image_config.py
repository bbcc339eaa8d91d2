"""preprocessor_config.json, strictly: every key that decides on pixels is honoured or refused."""

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import ArtifactError
from runtimes.files import read_json, shown

PROCESSOR_TYPES = ("MllamaImageProcessor", "MllamaImageProcessorFast", "MllamaImageProcessorPil")
MOST = 2**31 - 1  # of any count
MOST_TILES = 1024  # of an image; as graphs/families/mllama.py has it
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # a filter's place is Pillow's number


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38  # float32 holds it


def _is_colours(value: object) -> bool:
    return _is_number(value) or (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)))


def _is_square(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"height", "width"}:
        return False
    return _is_count(value["height"]) and value["height"] == value["width"]


_SWITCH: tuple[Any, ...] = (True, lambda value: isinstance(value, bool), "true or false")
_ALWAYS: tuple[Any, ...] = (True, lambda value: value is True, "true")
# {key: (transformers' default, what is done here, the same in words)}; transformers' pixels depend on no other key
_KEYS: dict[str, tuple[Any, ...]] = {
    "image_processor_type": (PROCESSOR_TYPES[0], lambda value: value in PROCESSOR_TYPES, ", ".join(PROCESSOR_TYPES)),
    "do_convert_rgb": _SWITCH,
    "do_resize": _ALWAYS,
    "do_pad": _ALWAYS,
    "do_rescale": _SWITCH,
    "do_normalize": _SWITCH,
    "rescale_factor": (1 / 255, _is_number, "a number"),
    "image_mean": (0.5, _is_colours, "a number or a list of three"),
    "image_std": (0.5, lambda value: _is_colours(value) and np.all(value), "a number or a list of three, without 0"),
    "resample": (2, lambda value: _is_count(value, 0) and value < len(FILTERS), f"0 to 5: {', '.join(FILTERS)}"),
    "size": ({"height": 224, "width": 224}, _is_square, 'a square {"height": N, "width": N}'),
    "max_image_tiles": (
        4,
        lambda value: _is_count(value) and value <= MOST_TILES,
        f"a whole number from 1 to {MOST_TILES}",
    ),
}


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {name}, which images need: copy the one of the checkpoint there")
    try:
        return read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}: copy it from the checkpoint again") from None


def read_image_keys(folder: Path) -> dict[str, Any]:
    """The values of _KEYS, from where transformers looks: an image_processor in processor_config.json goes first.

    Raises:
        ArtifactError: there is no such file, it is damaged, or it asks for what is not done here.
    """
    name, found = "processor_config.json", None
    if (folder / name).is_file():
        found = _read_object(folder, name).get("image_processor")
    if found is None:
        name = "preprocessor_config.json"
        found = _read_object(folder, name)
    if not isinstance(found, dict):
        raise ArtifactError(f"{folder / name}: image_processor must be a JSON object, found {shown(found)}")
    keys = {key: found.get(key, default) for key, (default, _, _) in _KEYS.items()}
    for key, (_, is_done, words) in _KEYS.items():
        if not is_done(keys[key]):
            raise ArtifactError(
                f"{folder / name}: {key} must be {words}, found {shown(keys[key])}: nothing else is done here"
            )
    return keys


def read_image_token_id(folder: Path) -> int:
    """The token that stands for an image in a prompt, of config.json; ArtifactError where it names none."""
    config = _read_object(folder, "config.json")
    names = ("image_token_index", "image_token_id")  # of one thing; 128256 is transformers' default
    found = [config[name] for name in names if name in config] or [128256]
    if not _is_count(found[0], least=0) or found[0] != found[-1]:
        raise ArtifactError(
            f"{folder / 'config.json'}: {' or '.join(names)} must be one token id, found {shown(found)}"
        )
    token_id: int = found[0]
    return token_id
