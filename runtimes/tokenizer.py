"""Text to token ids and back, from the artifact's tokenizer.json. Needs the `tokenizers` package only."""

from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError


class Tokenizer:
    """tokenizer.json, as Hugging Face's `tokenizers` library runs it."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtifactError when the folder holds no readable tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{folder} holds no tokenizer.json: copy the one of the checkpoint there")
        try:
            import tokenizers
        except ImportError:
            raise RuntimeMissingError("text needs the tokenizers package: pip install tokenizers") from None
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise ArtifactError(f"{path} is damaged: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer's post-processor adds (usually BOS)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FeedError(f"the prompt is not text in UTF-8: {error}") from None
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def vocabulary(self) -> dict[int, str]:
        """Every token by its id, special ones included."""
        return {token_id: token for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
