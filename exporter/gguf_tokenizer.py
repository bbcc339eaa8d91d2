"""tokenizer.json and its companions, made from what a GGUF file says of its tokenizer (gguf_vocabulary.py)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.gguf_vocabulary import (
    CONTROL,
    END_TOKENS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    PreTokenizer,
    Vocabulary,
    read_vocabulary,
)
from graphs.errors import CheckpointError
from graphs.formats.gguf_header import read_header

SPACE = "▁"  # how SentencePiece writes a space
CHAT_TEMPLATE = "tokenizer.chat_template"  # and others behind a dot


def rebuild_tokenizer(path: Path) -> dict[str, str] | None:
    """{file name: text} of tokenizer.json, tokenizer_config.json and generation_config.json; None: it has none.

    Raises:
        CheckpointError: the file is damaged, or its tokenizer is of a kind that is not supported.
    """
    metadata = read_header(path).metadata
    vocabulary = read_vocabulary(metadata, str(path))
    if vocabulary is None:
        return None
    try:
        tokenizer = build_tokenizer(vocabulary)
        text: str = tokenizer.to_str(pretty=True)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception, say for merges of unknown tokens
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error}") from None
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(_tokenizer_config(vocabulary, metadata), indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(_generation_config(vocabulary), indent=2),
    }


def build_tokenizer(vocabulary: Vocabulary) -> Any:
    """A tokenizers.Tokenizer, with added tokens, and what it puts before and after a text."""
    from tokenizers import AddedToken, processors

    pre_tokenizer = vocabulary.pre_tokenizer
    tokenizer = (
        build_sentencepiece(vocabulary) if pre_tokenizer is None else build_byte_level(vocabulary, pre_tokenizer)
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    bos = [vocabulary.token("bos")] if vocabulary.add_bos else []
    eos = [vocabulary.token("eos")] if vocabulary.add_eos else []
    if bos or eos:
        first, second = [*bos, "$A", *eos], [f"{part}:1" for part in (*bos, "$B", *eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *second],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((*bos, *eos))],
        )
    return tokenizer


def build_byte_level(vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> Any:
    """A byte-level BPE, as GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocabulary.merges is None:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.merges is missing")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=vocabulary.merges,
            ignore_merges=pre_tokenizer.whole_words,
        )
    )
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre_tokenizer.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_sentencepiece(vocabulary: Vocabulary) -> Any:
    """SentencePiece's BPE, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=find_merges(vocabulary) if vocabulary.merges is None else vocabulary.merges,
            unk_token=vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend = [normalizers.Prepend(SPACE)] if vocabulary.add_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def find_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: two pieces become the token of the highest score first.

    Where scores are equal, as some converters write them, the token that was learned earlier has the lower id.
    """
    scores = vocabulary.scores
    if scores is None:
        raise CheckpointError(f"{vocabulary.where}: tokenizer.ggml.scores is missing: merges follow from it")
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == NORMAL}
    merges = [
        (-scores[i], i, ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(first, second) for *_, first, second in sorted(merges)]


def _tokenizer_config(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: vocabulary.token(role) for name, role in roles.items()},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
    }
    longest = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(longest, int):
        config["model_max_length"] = longest
    templates = {
        key.removeprefix(CHAT_TEMPLATE).lstrip(".") or "default": value
        for key, value in metadata.items()
        if key == CHAT_TEMPLATE or key.startswith(f"{CHAT_TEMPLATE}.")
    }
    if not all(isinstance(template, str) for template in templates.values()):
        raise CheckpointError(f"{vocabulary.where}: {CHAT_TEMPLATE} must be a string")
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": value} for name, value in templates.items()]
    return config


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Where generation begins and ends."""
    ends = [vocabulary.special[role] for role in ("eos", "eot", "eom") if role in vocabulary.special]
    named = [i for i, token in enumerate(vocabulary.tokens) if token in END_TOKENS]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys([*ends, *named]))}
    if "bos" in vocabulary.special:
        config["bos_token_id"] = vocabulary.special["bos"]
    return config
