"""A GGUF file's tokenizer becomes a tokenizer.json with the original's token ids, or is refused.

Truths: the tokenizers that the files are made from, transformers' reading of the files, and SentencePiece's algorithm
written out.
"""

import contextlib
import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_cases as cases
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import runtimes.tokenizer
from exporter.gguf_tokenizer import SPACE, rebuild_tokenizer
from graphs.errors import CheckpointError

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces before, and three   within   \n\n and after  ",
    "it's I'LL we'Ve don't, 'RE you? 'M",
    "numbers 1 12 123 1234 12345678 3.14 -7 ²½ ٣٤",
    "café naïve Ünïcödé ÆØÅ ß İ ﬁ Привет мир Γειά",
    "日本語のテキスト 한국어 中文\uff0c标点。",
    "🦙🦙 👩‍👩‍👧 é́ 🇩🇪 \u200d\ufe0f",
    "tabs\tand\r\nlines\n\n\n  indented\n\tcode(x) { return y[0]!=z; }",
    "<unk> and <s> within text</s><|im_start|>user\nhi<|im_end|>",
    "camelCaseWords ALLCAPS snake_case x/y//z ....!!! ----",
    "e\u0301 A\u030a \ufb01 zqx 1zqx",
    "\x00\x01\x7f\x80\xa0\u2028",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]


def write(out: Path, metadata: dict[str, Any], *, architecture: str = "llama") -> Path:
    """A GGUF file with a tokenizer and no tensors, but with the sizes that transformers wants to see."""
    writer = gguf.GGUFWriter(out, architecture)
    sizes = {"block_count": 1, "context_length": 77, "embedding_length": 8, "feed_forward_length": 8}
    sizes |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    for key, value in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_string("general.name", "a model")
    for key, value in metadata.items():
        cases.add(writer, key if "." in key else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return out


def rebuilt(path: Path) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:
    """(tokenizer, tokenizer_config.json, generation_config.json)"""
    files = rebuild_tokenizer(path)
    assert files is not None
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    tokenizer, *configs = files.values()
    return Tokenizer.from_str(tokenizer), *map(json.loads, configs)


def refusal(tmp_path: Path, metadata: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        rebuild_tokenizer(write(tmp_path / "model.gguf", metadata))
    return str(caught.value)


def assert_same_ids(found: Tokenizer, original: Tokenizer, text: str) -> None:
    ids = original.encode(text).ids
    assert found.encode(text).ids == ids, text
    assert found.decode(ids) == original.decode(ids)


# --- byte-level merges ---------------------------------------------------------------------------------------------


def splits(name: str) -> list[Any]:
    """The pre-tokenizer of the models' own tokenizer.json files."""
    if name == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if name in DIGITS:
        return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


PRE = ["llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "gpt-2"]
DIGITS = ["smollm", "starcoder"]


def train(name: str) -> Tokenizer:
    """A small tokenizer of a family's kind."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits(name))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text.replace("zqx", "") for text in (__doc__, *TEXTS)], trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"]["zqx"] = tokenizer.get_vocab_size()  # which no merge leads to
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    if name in ("llama-bpe", "tekken"):
        bos = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
        )
    return tokenizer


def describe(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    """What llama.cpp's converter writes of such a tokenizer."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    kinds = {**dict.fromkeys(SPECIAL, 3), "<think>": 4}
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds.get(token, 1) for token in tokens],
        "merges": [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]],
        "bos_token_id": tokens.index("<|endoftext|>"),
        "eos_token_id": tokens.index("<|im_end|>"),
    }


@pytest.fixture(scope="module", params=[*PRE, *DIGITS])
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Path]:
    """(tokenizer.ggml.pre, the original, the GGUF file)"""
    original = train(request.param)
    path = write(tmp_path_factory.mktemp("gguf") / "model.gguf", describe(original, request.param))
    return request.param, original, path


def test_byte_level_ids_are_the_originals(byte_level: tuple[str, Tokenizer, Path]) -> None:
    _, original, path = byte_level
    found, _, _ = rebuilt(path)
    for text in TEXTS:
        assert_same_ids(found, original, text)
    assert found.get_vocab() == original.get_vocab()

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40))
    def any_text(text: str) -> None:
        assert_same_ids(found, original, text)

    any_text()


@pytest.mark.parametrize("byte_level", PRE, indirect=True)  # it does not cut digits apart
def test_byte_level_ids_are_those_that_transformers_reads(byte_level: tuple[str, Tokenizer, Path]) -> None:
    _, _, path = byte_level
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found, _, _ = rebuilt(path)
    for text in TEXTS:
        # Two things that the models' own tokenizers do and transformers' reader does not: Qwen's composes letters, and
        # a whole word that is a token is one in Llama 3's.
        composed = unicodedata.normalize("NFC", text.replace("1zqx", ""))
        ids = found.encode(composed, add_special_tokens=False).ids
        assert ids == theirs(composed, add_special_tokens=False)["input_ids"]


def test_digits_of_smollm_stand_alone(tmp_path: Path) -> None:
    metadata = describe(train("gpt-2"), "smollm")
    metadata["tokens"].append("12")
    metadata["token_type"].append(1)
    metadata["merges"].insert(0, "1 2")
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"])):
        found, _, _ = rebuilt(write(tmp_path / "model.gguf", {**metadata, "pre": pre}))
        assert found.encode("12").tokens == expected


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_that_does_not_say_how_text_is_cut(
    pre: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = train("gpt-2")
    found, _, _ = rebuilt(write(tmp_path / "model.gguf", describe(original, pre)))
    assert "does not say how its tokenizer cuts text (tokenizer.ggml.pre), GPT-2's way is assumed" in caplog.text
    assert_same_ids(found, original, TEXTS[4])


def test_added_tokens_are_special_where_they_are_control_tokens(byte_level: tuple[str, Tokenizer, Path]) -> None:
    _, _, path = byte_level
    found, _, _ = rebuilt(path)
    special = {added.content: added.special for added in found.get_added_tokens_decoder().values()}
    assert special == {**dict.fromkeys(SPECIAL, True), "<think>": False}
    ids = found.encode("a<|im_end|><think>b").ids
    assert found.decode(ids) == "a<think>b"
    assert found.decode(ids, skip_special_tokens=False).endswith("a<|im_end|><think>b")


# --- SentencePiece -------------------------------------------------------------------------------------------------


def read_sentencepiece(folder: Path) -> tuple[Tokenizer, dict[str, Any], list[list[str]]]:
    """(a checkpoint's tokenizer, what llama.cpp's converter writes of it, its merges).

    The score of a token is how late its first merge is; SentencePiece's Llama 2 gives all runs of spaces -1e9.
    """
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    scores: dict[str, float] = {}
    for rank, (first, second) in enumerate(model["merges"]):
        token = first + second
        scores.setdefault(token, -float(rank) if token.strip(SPACE) else -1e9)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [scores.get(token, 0.0) for token in tokens],
        "token_type": [kinds.get(t, 6 if t.startswith("<0x") and len(t) == 6 else 1) for t in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return Tokenizer.from_file(str(folder / "tokenizer.json")), metadata, model["merges"]


@pytest.mark.parametrize("name", ["stories15m-llama", "stories260k-llama"])
def test_sentencepiece_ids_are_the_originals(name: str, shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    original, metadata, merges = read_sentencepiece(shared_model(name))
    path = write(tmp_path / "model.gguf", metadata)
    files = rebuild_tokenizer(path)
    assert files is not None
    if name == "stories15m-llama":  # Llama 2's own
        assert json.loads(files["tokenizer.json"])["model"]["merges"] == merges
    found = Tokenizer.from_str(files["tokenizer.json"])
    for text in TEXTS:
        assert_same_ids(found, original, text)
    assert found.encode("a", "b").ids == original.encode("a", "b").ids

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=40))
    def any_text(text: str) -> None:
        assert_same_ids(found, original, text)

    any_text()


def test_sentencepiece_ids_are_those_that_transformers_reads(
    shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, metadata, _ = read_sentencepiece(shared_model("stories260k-llama"))
    path = write(tmp_path / "model.gguf", metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    found, _, _ = rebuilt(path)
    for text in TEXTS:
        if not text.startswith(" ") and "<" not in text:  # it adds no space there; Llama 2's own tokenizer does
            assert found.encode(text).ids == theirs(text)["input_ids"], text


WORDS = ["low", "lower", "lowest", "new", "newer", "newest", "the", "then", "these", "there", "an", "and", "ana"]


def small_sentencepiece() -> dict[str, Any]:
    """A vocabulary of parts of words, all scores different."""
    parts = {part for word in WORDS for end in range(2, len(word) + 1) for part in (word[:end], word[-end:])}
    parts |= {SPACE + part for part in parts} | {SPACE * 2, SPACE + "l", SPACE + "n", SPACE + "t"}
    letters = sorted(set("".join(WORDS)) | {SPACE})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(parts), *letters]
    scores = [0.0] * 259 + [-float((7 * i) % 997) for i in range(len(tokens) - 259)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}


def sentencepiece(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE, arXiv:1808.06226: the two neighbours that make the best token become one, leftmost first."""
    ids = {token: i for i, token in enumerate(metadata["tokens"])}
    symbols = list((SPACE if text else "") + text.replace(" ", SPACE))
    while True:
        pairs = [
            (-metadata["scores"][ids[first + second]], i)
            for i, (first, second) in enumerate(itertools.pairwise(symbols))
            if first + second in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    encoded = []
    for symbol in symbols:
        encoded += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return encoded


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.sampled_from([*WORDS, "low new", "  ", "é", "🦙", "\n"]), max_size=6),
    joint=st.sampled_from(["", " "]),
)
def test_sentencepiece_equals_its_algorithm(
    words: list[str], joint: str, small: tuple[Tokenizer, dict[str, Any]]
) -> None:
    tokenizer, metadata = small
    text = joint.join(words)
    ids = tokenizer.encode(text).ids
    assert ids == [1, *sentencepiece(text, metadata)]
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, dict[str, Any]]:
    metadata = small_sentencepiece()
    tokenizer, _, _ = rebuilt(write(tmp_path_factory.mktemp("gguf") / "model.gguf", metadata))
    return tokenizer, metadata


def test_scores_that_are_all_alike_mean_the_order_of_the_ids(tmp_path: Path) -> None:
    metadata = small_sentencepiece()
    count = len(metadata["tokens"])
    alike, _, _ = rebuilt(write(tmp_path / "alike.gguf", {**metadata, "scores": [-1000.0] * count}))
    ordered, _, _ = rebuilt(write(tmp_path / "ordered.gguf", {**metadata, "scores": [-float(i) for i in range(count)]}))
    assert json.loads(alike.to_str())["model"] == json.loads(ordered.to_str())["model"]


def test_merges_that_the_file_holds_are_used(tmp_path: Path) -> None:
    metadata = {**small_sentencepiece(), "merges": [f"{SPACE} n", f"{SPACE} t"]}
    found, _, _ = rebuilt(write(tmp_path / "model.gguf", metadata))
    assert found.encode("new").tokens == ["<s>", f"{SPACE}n", "e", "w"]


def test_no_space_before_the_text(tmp_path: Path) -> None:
    found, _, _ = rebuilt(write(tmp_path / "model.gguf", {**small_sentencepiece(), "add_space_prefix": False}))
    assert found.encode("low low").tokens == ["<s>", "low", f"{SPACE}low"]
    assert found.decode(found.encode(" low").ids) == " low"


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token_id": 1}, [], [1]),
    ],
)
def test_tokens_before_and_after_a_text(
    flags: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    metadata = {**small_sentencepiece(), **flags}
    found, config, _ = rebuilt(write(tmp_path / "model.gguf", metadata))
    assert found.encode("low").ids == [*before, metadata["tokens"].index(f"{SPACE}low"), *after]
    assert (config["add_bos_token"], config["add_eos_token"]) == (bool(before), bool(after))


def test_without_token_types_the_tokens_with_a_role_are_special(tmp_path: Path) -> None:
    metadata = {key: value for key, value in small_sentencepiece().items() if key != "token_type"}
    found, _, _ = rebuilt(write(tmp_path / "model.gguf", metadata))
    assert [added.content for added in found.get_added_tokens_decoder().values()] == ["<unk>", "<s>", "</s>"]


# --- the files beside tokenizer.json -------------------------------------------------------------------------------


def test_the_files_serve_transformers_and_our_own_runtime(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    original = train("llama-bpe")
    metadata = {**describe(original, "llama-bpe"), "tokenizer.chat_template": template}
    files = rebuild_tokenizer(write(tmp_path / "model.gguf", metadata))
    assert files is not None
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    ids = metadata["tokens"].index
    ends = [ids("<|im_end|>"), ids("<|endoftext|>"), ids("<|eot_id|>")]
    assert json.loads(files["generation_config.json"]) == {
        "eos_token_id": ends,
        "bos_token_id": ids("<|endoftext|>"),
    }
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token, theirs.eos_token, theirs.model_max_length) == ("<|endoftext|>", "<|im_end|>", 77)
    assert theirs.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    ours = runtimes.tokenizer.Tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"] == original.encode(text).ids


def test_several_chat_templates(tmp_path: Path) -> None:
    metadata = {
        **small_sentencepiece(),
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
    }
    _, config, _ = rebuilt(write(tmp_path / "model.gguf", metadata))
    assert config["chat_template"] == [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]


@pytest.mark.parametrize("metadata", [{}, {"model": "none"}, {"model": "no_vocab"}])
def test_a_file_without_a_tokenizer(metadata: dict[str, Any], tmp_path: Path) -> None:
    assert rebuild_tokenizer(write(tmp_path / "model.gguf", metadata)) is None


# --- what is refused -----------------------------------------------------------------------------------------------

GPT2 = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
LLAMA = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a"], "scores": [0.0, 0.0, 0.0, -1.0]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "bert"}, 'tokenizer.ggml.model "bert" is not supported; supported: gpt2, llama'),
        ({"model": ["gpt2"]}, 'tokenizer.ggml.model ["gpt2"] is not supported'),
        ({**GPT2, "pre": "falcon"}, 'tokenizer.ggml.pre "falcon" is not supported; supported: llama-bpe,'),
        ({**GPT2, "pre": 3}, "tokenizer.ggml.pre 3 is not supported"),
        ({**GPT2, "tokens": None}, "tokenizer.ggml.tokens must be a list of strings"),
        ({**GPT2, "tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of strings"),
        ({**GPT2, "tokens": ["a", "a"]}, "tokenizer.ggml.tokens has a token twice"),
        ({**GPT2, "tokens": ["a" * 1025]}, "tokenizer.ggml.tokens has a token of more than 1024 characters"),
        ({**GPT2, "token_type": [1, 1]}, "tokenizer.ggml.token_type must be a list of 3 numbers, one for each token"),
        ({**GPT2, "merges": None}, "tokenizer.ggml.merges is missing"),
        ({**GPT2, "merges": 7}, "tokenizer.ggml.merges must be a list of two tokens each"),
        ({**GPT2, "merges": ["a b c"]}, "tokenizer.ggml.merges must be a list of two tokens each"),
        ({**GPT2, "merges": ["a x"]}, "its tokenizer is damaged: "),
        ({**GPT2, "eos_token_id": 3}, "tokenizer.ggml.eos_token_id is 3, of 3 tokens"),
        ({**GPT2, "bos_token_id": True}, "tokenizer.ggml.bos_token_id is true, of 3 tokens"),
        (
            {**GPT2, "add_bos_token": True},
            "a text gets a bos token (tokenizer.ggml.add_bos_token), but there is no tokenizer.ggml.bos_token_id",
        ),
        ({**GPT2, "pre": "llama-bpe"}, "a text gets a bos token"),
        ({**LLAMA, "add_eos_token": 1}, "tokenizer.ggml.add_eos_token is 1, expected true or false"),
        ({**LLAMA, "scores": None}, "tokenizer.ggml.scores is missing: merges follow from it"),
        ({**LLAMA, "scores": ["a"] * 4}, "tokenizer.ggml.scores must be a list of 4 numbers"),
        ({**LLAMA, "tokenizer.chat_template": 3}, "tokenizer.chat_template must be a string"),
        ({**LLAMA, "add_space_prefix": 2}, "tokenizer.ggml.add_space_prefix is 2, expected true or false"),
    ],
)
def test_what_is_wrong_is_named(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, metadata)
    assert message in text
    assert str(tmp_path / "model.gguf") in text


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    metadata = data.draw(st.sampled_from([GPT2, LLAMA, {**LLAMA, "add_eos_token": True, "bos_token_id": 1}]))
    raw = bytearray(write(tmp_path / "model.gguf", metadata).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(24, len(raw) - 4))
        raw[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    (tmp_path / "model.gguf").write_bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))])
    with contextlib.suppress(CheckpointError):
        rebuild_tokenizer(tmp_path / "model.gguf")
