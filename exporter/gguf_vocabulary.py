"""What a GGUF file says of its tokenizer, checked: tokens, merges or scores, and how text is cut before them.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what they mean: llama.cpp's src/llama-vocab.cpp.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphs.errors import CheckpointError
from graphs.keys import short

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type; 5: unused, 6: a byte
MAX_TOKEN = 1024  # characters
ROLES = ("bos", "eos", "unknown", "padding", "eot", "eom")
# Ends of a turn or a text, which llama.cpp knows by their names too: metadata has room for one of each kind.
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What comes before byte-level merges."""

    splits: tuple[str, ...]  # regular expressions; each cuts the pieces of the one before it
    whole_words: bool = False  # a piece that is a token is one, whatever the merges say
    add_bos: bool = False  # where metadata does not say
    nfc: bool = False  # text is normalised first; llama.cpp does not do that, the models' own tokenizers do


LLAMA3 = PreTokenizer(splits=(LLAMA3_SPLIT,), whole_words=True, add_bos=True)
GPT2 = PreTokenizer(splits=(GPT2_SPLIT,))
DIGITS = PreTokenizer(splits=(r"\p{N}", GPT2_SPLIT))
# tokenizer.ggml.pre
PRE_TOKENIZERS = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": PreTokenizer(splits=(TEKKEN_SPLIT,), whole_words=True, add_bos=True),
    "qwen2": PreTokenizer(splits=(QWEN2_SPLIT,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer(splits=(QWEN2_SPLIT,)),
    "gpt-2": GPT2,
    "default": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a GGUF file, by id, and what is said of them."""

    where: str
    tokens: list[str]
    types: list[int]
    special: Mapping[str, int]  # {role: token}: those of ROLES that there are
    merges: list[tuple[str, str]] | None
    scores: list[float] | None
    pre_tokenizer: PreTokenizer | None  # of byte-level merges
    add_bos: bool
    add_eos: bool
    add_space: bool  # before a text; of SentencePiece

    def token(self, role: str) -> str | None:
        """The token that has a role."""
        return self.tokens[self.special[role]] if role in self.special else None


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary | None:
    """Check and read what the metadata says; None where the file has no tokenizer.

    Raises:
        CheckpointError: something is missing or wrong, or the tokenizer is of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{where}: tokenizer.ggml.model {short(kind)} is not supported; supported: gpt2, llama")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens must be a list of strings")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has a token twice")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has a token of more than {MAX_TOKEN} characters")
    special = _read_roles(metadata, {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}, len(tokens), where)
    pre_tokenizer = find_pre_tokenizer(metadata, where) if kind == "gpt2" else None
    add_bos = _flag(metadata, "add_bos_token", pre_tokenizer is None or pre_tokenizer.add_bos, where)
    add_eos = _flag(metadata, "add_eos_token", False, where)
    for role, added in (("bos", add_bos), ("eos", add_eos)):
        if added and role not in special:
            raise CheckpointError(
                f"{where}: a text gets a {role} token (tokenizer.ggml.add_{role}_token), but there is no"
                f" tokenizer.ggml.{role}_token_id"
            )
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), where)
    if types is None:
        types = [CONTROL if i in special.values() else NORMAL for i in range(len(tokens))]
    return Vocabulary(
        where=where,
        tokens=tokens,
        types=[CONTROL if token in END_TOKENS else kind for token, kind in zip(tokens, types, strict=True)],
        special=special,
        merges=_read_merges(metadata, where),
        scores=_numbers(metadata, "tokenizer.ggml.scores", len(tokens), where),
        pre_tokenizer=pre_tokenizer,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space=_flag(metadata, "add_space_prefix", True, where),
    )


def find_pre_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTokenizer:
    """What tokenizer.ggml.pre names; a warning where it says nothing, CheckpointError where it is not supported."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre {short(name)} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    if name == "default":
        log.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre), GPT-2's way is assumed: compare token"
            " ids with the original model's",
            where,
        )
    return PRE_TOKENIZERS[name]


def _read_roles(metadata: Mapping[str, Any], roles: dict[str, int], count: int, where: str) -> dict[str, int]:
    """{role: token}, of `count` tokens; `roles` are those without being said."""
    roles = {role: token for role, token in roles.items() if token < count}
    for role in ROLES:
        key = f"tokenizer.ggml.{role}_token_id"
        if key in metadata:
            value = metadata[key]
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
                raise CheckpointError(f"{where}: {key} is {short(value)}, of {count} tokens")
            roles[role] = value
    return roles


def _flag(metadata: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: tokenizer.ggml.{name} is {short(value)}, expected true or false")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, count: int, where: str) -> list[Any] | None:
    """A list of as many numbers as there are tokens; None where it is absent."""
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, int | float) for v in value):
        raise CheckpointError(f"{where}: {key} must be a list of {count} numbers, one for each token")
    return value


def _read_merges(metadata: Mapping[str, Any], where: str) -> list[tuple[str, str]] | None:
    """tokenizer.ggml.merges, each a pair of tokens; None where there are none."""
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges must be a list of two tokens each")
    return [(first, second) for first, second in (merge.split(" ") for merge in merges)]
