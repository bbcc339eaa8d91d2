"""What an export reads: a checkpoint, the model that it is, and how each of its weights is to be stored."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from exporter.precision import Precision, find_precision
from exporter.weight_choice import Choices, choose_weights, untie
from graphs.checkpoint import Checkpoint, open_checkpoint
from graphs.config import DecoderConfig
from graphs.errors import CheckpointError
from graphs.families import Family, find_family
from graphs.files import is_file
from graphs.keys import require_inside
from graphs.loading import check_weights

log = logging.getLogger(__name__)

# Files of a checkpoint that clients of the artifact need, and that are taken over as they are.
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, read and checked."""

    checkpoint: Checkpoint
    family: Family
    config: DecoderConfig
    precision: Precision
    choices: Choices  # empty: all weights are floats of one kind

    @property
    def files(self) -> Path:
        """The folder in which the checkpoint's other files lie."""
        return self.checkpoint.folder if self.checkpoint.folder.is_dir() else self.checkpoint.folder.parent

    @property
    def quantizes(self) -> bool:
        """Whether some weights of the artifact are quantized."""
        return any(choice.format is not None for choice in self.choices.values())


def read_source(path: Path, precision: str | None, *, requantize: bool = False) -> Source:
    """Open a checkpoint folder or a GGUF file, and decide how each weight is to be stored.

    Raises:
        CheckpointError: it cannot be read, or describes what is not supported.
        ExportError: the precision is wrong, or cannot be had without rounding again what is quantized already.
    """
    checkpoint = open_checkpoint(path)
    family = find_family(checkpoint.config, checkpoint.shapes)
    config = family.parse_config(checkpoint.config)
    check_weights(family, config, checkpoint)
    return make_source(checkpoint, family, config, precision, requantize=requantize)


def make_source(
    checkpoint: Checkpoint, family: Family, config: DecoderConfig, precision: str | None, *, requantize: bool
) -> Source:
    """Decide how each weight of a checkpoint that has been checked is to be stored; ExportError as read_source."""
    asked = find_precision(precision, checkpoint)
    choices: Choices = {}
    if asked.weights is not None or asked.overrides or checkpoint.packed:
        config, checkpoint = untie(family, config, checkpoint, asked)
        choices = choose_weights(family, config, checkpoint, asked, requantize=requantize)
    return Source(checkpoint=checkpoint, family=family, config=config, precision=asked, choices=choices)


def small_files(source: Source) -> dict[str, Path | str]:
    """{name: the file that is copied, or the text that is written} of what lies in an artifact beside weights."""
    folder = source.checkpoint.folder
    if folder.is_file():
        return {**_tokenizer_files(folder), "config.json": _config_json(source)}
    files: dict[str, Path | str] = {name: folder / name for name in COPIED_FILES if is_file(folder / name)}
    for name in files:
        require_inside(folder / name)  # what a link leads to would be copied, and published with the artifact
    if source.choices:
        files["config.json"] = _config_json(source)
    return files


def _tokenizer_files(path: Path) -> dict[str, str]:
    """What a GGUF file says of its tokenizer; nothing, with a warning, where that is not supported."""
    from exporter.gguf_tokenizer import rebuild_tokenizer

    try:
        return rebuild_tokenizer(path) or {}
    except CheckpointError as error:
        log.warning("the artifact has no tokenizer.json, without which text cannot be generated: %s", error)
        return {}


def _config_json(source: Source) -> str:
    """The checkpoint's config.json as the artifact's weights are: an output projection may have become untied."""
    config = dict(source.checkpoint.config)
    if "tie_word_embeddings" in config or source.config.tie_word_embeddings != _tied_by_default(source):
        config["tie_word_embeddings"] = source.config.tie_word_embeddings
    return json.dumps(config, indent=2) + "\n"


def _tied_by_default(source: Source) -> bool:
    return source.family.parse_config(source.checkpoint.config).tie_word_embeddings
