"""Where a text ends: stop ids, stop strings, and text that may be shown while tokens still come."""

from collections.abc import Callable, Sequence
from pathlib import Path

from runtimes.errors import ArtifactError, FeedError
from runtimes.files import read_json, shown

Decode = Callable[[list[int]], str]  # token ids to text, without special tokens

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what half a UTF-8 character decodes to


def read_stop_ids(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a number or a list; empty when neither names one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ArtifactError(f"{path}: eos_token_id must be a number or a list of numbers, found {shown(value)}")
        if ids:
            return ids
    return []


def check_stop_strings(stop_strings: Sequence[str], decode: Decode | None) -> None:
    """FeedError when they are one string, hold an empty one, or there is no `decode` to find them with."""
    if isinstance(stop_strings, str):
        raise FeedError(f"stop_strings must be a list of strings, got {stop_strings!r}: write [{stop_strings!r}]")
    if "" in stop_strings:
        raise FeedError("a stop string must hold at least one character, got ''")
    if stop_strings and decode is None:
        raise FeedError("stop_strings are found in text: give decode as well, such as Tokenizer(folder).decode")


def finish_reason(ids: Sequence[int], stopped: bool, stop_ids: Sequence[int], max_new_tokens: int) -> str:
    """Why a row with these new tokens ends; empty when it goes on.

    "stop_string" (where `stopped`) comes first, as it decides what the text is, then "stop_id", then "length".
    """
    if stopped:
        return "stop_string"
    if ids[-1] in stop_ids:
        return "stop_id"
    return "length" if len(ids) >= max_new_tokens else ""


def added_text(
    decode: Decode, prompt_ids: Sequence[int], ids: Sequence[int], stop_strings: Sequence[str]
) -> tuple[str, bool]:
    """The text that `ids` add to the prompt's, up to the first stop string; and whether there was one.

    A token may be half a character and a decoder may look at neighbours, so prompt and tokens are decoded as one.
    """
    text = decode([*prompt_ids, *ids])[len(decode(list(prompt_ids))) :]
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


class RowText:
    """The text of a row whose tokens come one by one: `text` so far, and whether it ends before a stop string."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._prompt_ids = prompt_ids
        self._ids: list[int] = []
        self._stop_strings = stop_strings
        self._shown_chars = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before.

        Half a character is kept back, and so is an end that may turn out to be the start of a stop string.
        """
        self._ids.append(token)
        self.text, self.stopped = added_text(self._decode, self._prompt_ids, self._ids, self._stop_strings)
        if self.stopped:
            return self.rest()
        whole = self.text.rstrip(_UNFINISHED)
        return self._show(len(whole) - _overlap(whole, self._stop_strings))

    def rest(self) -> str:
        """What was kept back; for a row that gets no more tokens."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown_chars : end]
        self._shown_chars = max(self._shown_chars, end)
        return piece


def _overlap(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string starts with."""
    lengths = (size for stop in stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(lengths, default=0)
