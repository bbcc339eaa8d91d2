"""Text to token ids and back, from the artifact's tokenizer.json. Needs the `tokenizers` package only."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.files import is_file, require_inside

MOST_GROWTH = 10_000  # of a text by replacements; models replace a space by one character


class Tokenizer:
    """tokenizer.json, as Hugging Face's `tokenizers` library runs it."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtifactError when the folder holds no readable tokenizer.json."""
        path = folder / "tokenizer.json"
        require_inside(path)
        if not is_file(path):
            raise ArtifactError(f"{folder} holds no tokenizer.json: copy the one of the checkpoint there")
        try:
            import tokenizers
        except ImportError:
            raise RuntimeMissingError("text needs the tokenizers package: pip install tokenizers") from None
        with _reading(f"{path} is damaged"):
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            # Whether a prompt is cut or filled up is not the file's to say; transformers goes without both, too.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            for part in (self._tokenizer.normalizer, self._tokenizer.decoder):
                _check_growth(path, part)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer's post-processor adds (usually BOS)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FeedError(f"the prompt is not text in UTF-8: {error}") from None
        with _reading("tokenizer.json cannot cut the prompt into tokens"):
            ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def vocabulary(self) -> dict[int, str]:
        """Every token by its id, special ones included."""
        return {token_id: token for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens."""
        with _reading("tokenizer.json cannot make text of tokens"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _check_growth(path: Path, part: Any) -> None:
    """ArtifactError where replacements, one after the other, would make a text very much longer."""
    if part is None:
        return
    growth, parts = 1, [json.loads(part.__getstate__())]  # as in tokenizer.json
    while parts:
        each = parts.pop()
        parts += [*each.get("normalizers", ()), *each.get("decoders", ())]
        growth *= 1 + len(each.get("content", "")) if each.get("type") == "Replace" else 1
    if growth > MOST_GROWTH:
        raise ArtifactError(f"{path} is damaged: its replacements would make a text {growth:,} times as long")


@contextlib.contextmanager
def _reading(problem: str) -> Iterator[None]:
    """ArtifactError for anything that the library raises inside."""
    try:
        yield
    except BaseException as error:  # it raises plain Exception; a panic of Rust's is not even that
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{problem}: {error}") from None
