"""Checkpoints written by transformers, loaded by us: the same logits and caches as transformers' own Llama."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.checkpoint import open_checkpoint
from graphs.families import find_family
from graphs.loading import load_decoder
from graphs.transformer import TransformerDecoder

# Both sides compute in float32, logits are of order 1: what differs is the order of additions.
ATOL = 1e-5
CAPACITY = 48
LENGTH = 40

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 8 pairs one is kept, one mixed, the others slowed
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "llama3.1": {"num_key_value_heads": 2, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0}},
    "llama3.2": {
        "num_key_value_heads": 2,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0, "rope_theta": 500_000.0},
        "tie_word_embeddings": True,
    },
    "linear": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0},
    },
    "attention_bias": {"num_key_value_heads": 2, "attention_bias": True},
    "mlp_bias": {"num_key_value_heads": 2, "mlp_bias": True},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 24},
    "narrow heads": {"num_key_value_heads": 4, "head_dim": 6},
    "mqa": {"num_key_value_heads": 1},
    "large eps": {"num_key_value_heads": 2, "rms_norm_eps": 0.3},
}


class Pair(NamedTuple):
    theirs: LlamaForCausalLM
    ours: TransformerDecoder
    folder: Path


def random_model(changes: dict[str, Any], seed: int = 0) -> LlamaForCausalLM:
    """Weights large enough that every part matters: logits of order 1, norms and biases far from 1 and 0."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def load(folder: Path) -> TransformerDecoder:
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    return load_decoder(family, family.parse_config(checkpoint.config), checkpoint)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """transformers' model, and ours from what its save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = random_model(MODELS[request.param])
    theirs.save_pretrained(folder)
    with torch.no_grad():
        yield Pair(theirs, load(folder), folder)


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.std() > 0.3  # a model whose logits are near zero proves nothing
    return logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def poisoned_cache(config: LlamaConfig, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Slots that nobody wrote hold large numbers: one that is read shows at once."""
    shape = (batch, config.num_key_value_heads, CAPACITY, config.head_dim)
    return [(torch.full(shape, 1e4), torch.full(shape, -1e4)) for _ in range(config.num_hidden_layers)]


# --- one model, three ways to call it ----------------------------------------------------------------------------


def test_full_pass(pair: Pair) -> None:
    ids = tokens(2, LENGTH)
    assert_close(pair.ours(ids), logits_of(pair.theirs, ids))


def test_torchtune_caches(pair: Pair) -> None:
    """Prefill of 24 tokens, then one at a time."""
    ids = tokens(2, LENGTH)
    ours = load(pair.folder)
    ours.setup_caches(batch_size=2, dtype=torch.float32)
    parts = torch.arange(LENGTH).split([24] + [1] * 16)
    logits = torch.cat([ours(ids[:, part], input_pos=part) for part in parts], dim=1)
    assert_close(logits, logits_of(pair.theirs, ids))


def test_step_against_past_key_values(pair: Pair) -> None:
    """Prefill and 16 cached steps against transformers' own cache: the logits, every key and every value."""
    ids, prompt = tokens(2, LENGTH), 24
    past, hf_past = poisoned_cache(pair.theirs.config, 2), None
    for first, end in [(0, prompt), *((p, p + 1) for p in range(prompt, LENGTH))]:
        result = pair.theirs(ids[:, first:end], past_key_values=hf_past, use_cache=True)
        hf_past = result.past_key_values
        logits, present = pair.ours.step(
            input_ids=ids[:, first:end],
            position_ids=torch.arange(first, end).expand(2, -1),
            write_indices=torch.full((2,), first),
            attention_mask=torch.ones(2, end, dtype=torch.int64),
            logit_indices=torch.arange(end - first).expand(2, -1),
            past=past,
        )
        assert_close(logits, result.logits)
        for layer, hf_layer, before in zip(present, hf_past.layers, past, strict=True):
            for found, expected, old in zip(layer, (hf_layer.keys, hf_layer.values), before, strict=True):
                assert_close(found[:, :, :end], expected)
                assert torch.equal(found[:, :, end:], old[:, :, end:])
        past = present
    assert_close(logits[:, 0], logits_of(pair.theirs, ids)[:, -1])


def test_step_on_ragged_rows(pair: Pair) -> None:
    """Right-padded prompts of 9, 17 and 24 tokens, then 10 steps each, against transformers row by row."""
    prompts, steps = [9, 17, 24], 10
    ids = tokens(3, LENGTH)
    alone = [logits_of(pair.theirs, ids[row : row + 1, : length + steps])[0] for row, length in enumerate(prompts)]
    lengths = torch.tensor(prompts)
    longest = int(lengths.max())
    columns = torch.arange(longest)
    padded = torch.where(columns < lengths[:, None], ids[:, :longest], 7)

    logits, past = pair.ours.step(
        input_ids=padded,
        position_ids=torch.minimum(columns, lengths[:, None] - 1),
        write_indices=torch.zeros(3, dtype=torch.int64),
        attention_mask=(columns < lengths[:, None]).long(),
        logit_indices=(lengths - 1)[:, None],
        past=poisoned_cache(pair.theirs.config, 3),
    )
    assert logits.shape == (3, 1, SHAPE["vocab_size"])
    for row, length in enumerate(prompts):
        assert_close(logits[row, 0], alone[row][length - 1])

    for step in range(steps):
        at = lengths + step
        logits, past = pair.ours.step(
            input_ids=ids.gather(1, at[:, None]),
            position_ids=at[:, None],
            write_indices=at,
            attention_mask=(torch.arange(int(at.max()) + 1) <= at[:, None]).long(),
            logit_indices=torch.zeros(3, 1, dtype=torch.int64),
            past=past,
        )
        for row, length in enumerate(prompts):
            assert_close(logits[row, 0], alone[row][length + step])


def test_step_in_chunks_with_chosen_logits(pair: Pair) -> None:
    """A prompt in chunks of 10 with more mask columns than tokens so far; only the asked-for positions get logits."""
    ids = tokens(2, 30)
    expected = logits_of(pair.theirs, ids)
    past = poisoned_cache(pair.theirs.config, 2)
    chosen = torch.tensor([[9, 0, 4], [3, 3, 9]])
    for first in (0, 10, 20):
        logits, past = pair.ours.step(
            input_ids=ids[:, first : first + 10],
            position_ids=torch.arange(first, first + 10).expand(2, -1),
            write_indices=torch.full((2,), first),
            attention_mask=torch.ones(2, CAPACITY, dtype=torch.int64),  # the positions alone hide later slots
            logit_indices=chosen,
            past=past,
        )
        for row in range(2):
            assert_close(logits[row], expected[row, first + chosen[row]])


def test_left_padding_is_an_attention_mask(pair: Pair) -> None:
    """Slots whose attention_mask is 0 are not seen: as transformers with the same mask and positions."""
    ids, padding = tokens(2, 20), 6
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :padding] = 0
    expected = pair.theirs(ids, attention_mask=mask, position_ids=torch.arange(20).expand(2, -1)).logits
    mask[1, 0] = 1  # a padding token must see some key; nobody after it sees it again
    logits, past = pair.ours.step(
        input_ids=ids[:, :padding],
        position_ids=torch.arange(padding).expand(2, -1),
        write_indices=torch.zeros(2, dtype=torch.int64),
        attention_mask=mask[:, :padding],
        logit_indices=torch.arange(padding).expand(2, -1),
        past=poisoned_cache(pair.theirs.config, 2),
    )
    assert_close(logits[0], expected[0, :padding])
    mask[1, 0] = 0
    logits, _ = pair.ours.step(
        input_ids=ids[:, padding:],
        position_ids=torch.arange(padding, 20).expand(2, -1),
        write_indices=torch.full((2,), padding),
        attention_mask=mask,
        logit_indices=torch.arange(20 - padding).expand(2, -1),
        past=past,
    )
    assert_close(logits, expected[:, padding:])


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
@torch.no_grad()
def test_step_gives_wide_logits_and_keeps_the_cache_dtype(
    dtype: torch.dtype, logits_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Logits are float32 at least, whatever the model computes in; the cache stays in the model's dtype."""
    theirs = random_model(MODELS["llama3"])
    theirs.save_pretrained(tmp_path)
    ids = tokens(2, 12)
    positions = torch.arange(12).expand(2, -1)
    logits, present = (
        load(tmp_path)
        .to(dtype)
        .step(
            input_ids=ids,
            position_ids=positions,
            write_indices=torch.zeros(2, dtype=torch.int64),
            attention_mask=torch.ones(2, 12, dtype=torch.int64),
            logit_indices=positions,
            past=[(k.to(dtype), v.to(dtype)) for k, v in poisoned_cache(theirs.config, 2)],
        )
    )
    assert logits.dtype == logits_dtype
    assert {tensor.dtype for layer in present for tensor in layer} == {dtype}
    error = (logits - logits_of(theirs, ids)).abs().max()
    assert error < (ATOL if dtype == torch.float64 else 0.2)


# --- how the checkpoint is stored --------------------------------------------------------------------------------


def rewrite_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1", "llama3.2", "linear"])
def test_classic_rope_keys(name: str, type_key: str, tmp_path: Path) -> None:
    """rope_theta and rope_scaling, as checkpoints had them before transformers 5, mean the same."""
    theirs = random_model(MODELS[name])
    theirs.save_pretrained(tmp_path)

    def classic(config: dict[str, Any]) -> dict[str, Any]:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope[type_key] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope[type_key] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        return config

    rewrite_config(tmp_path, classic)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" not in written
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids), logits_of(theirs, ids))


def test_transformers_writes_rope_parameters(pair: Pair) -> None:
    """The other tests of this file read transformers 5's style only if it still writes it."""
    assert "rope_theta" in json.loads((pair.folder / "config.json").read_text())["rope_parameters"]


def test_first_llama_config_without_later_keys(tmp_path: Path) -> None:
    """Llama 1 and 2 wrote no num_key_value_heads, rope_theta, head_dim, biases or tie_word_embeddings."""
    theirs = random_model({"rms_norm_eps": 1e-6})
    theirs.save_pretrained(tmp_path)
    kept = ["model_type", "hidden_act", *SHAPE]
    rewrite_config(tmp_path, lambda config: {key: config[key] for key in kept})
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids), logits_of(theirs, ids))


@pytest.mark.parametrize("name", ["llama2", "llama3.2"])
def test_sharded_checkpoint(name: str, tmp_path: Path) -> None:
    theirs = random_model(MODELS[name])
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids), logits_of(theirs, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama2", "llama3.2"])
def test_half_precision_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Loaded in its dtype, bit for bit; computed in float32 it is what transformers computes in float32."""
    theirs = random_model(MODELS[name]).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    weights = theirs.state_dict()
    assert torch.equal(ours.layers[1].attn.k_proj.weight, weights["model.layers.1.self_attn.k_proj.weight"])
    assert torch.equal(ours.layers[2].mlp_norm.scale, weights["model.layers.2.post_attention_layernorm.weight"])
    wide = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(load(tmp_path).to(torch.float32)(ids), logits_of(wide, ids))


@pytest.mark.parametrize("name", ["llama2", "llama3.1"])
def test_half_precision_arithmetic_is_transformers_own(name: str, tmp_path: Path) -> None:
    """In bfloat16 both round at the same places: closer to each other than to float32."""
    theirs = random_model(MODELS[name])
    ids = tokens(2, LENGTH)
    exact = logits_of(theirs, ids)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    narrow = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        found, expected = load(tmp_path)(ids).float(), logits_of(narrow, ids).float()
    assert (found - exact).abs().mean() < 1.2 * (expected - exact).abs().mean()
    assert (found - expected).abs().mean() < (expected - exact).abs().mean()


@pytest.mark.parametrize("stored", ["tied and stored", "tied"])
def test_tied_head(stored: str, tmp_path: Path) -> None:
    """A tied head is the embedding, one parameter, whether or not the writer stored it as well."""
    theirs = random_model(MODELS["llama3.2"])
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    if stored == "tied and stored":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors")
    ours, ids = load(tmp_path), tokens(2, LENGTH)
    assert ours.output.weight is ours.tok_embeddings.weight
    with torch.no_grad():
        assert_close(ours(ids), logits_of(theirs, ids))


def test_rotary_tables_in_the_checkpoint_are_ignored(tmp_path: Path) -> None:
    """Old checkpoints hold inv_freq; it follows from config.json."""
    theirs = random_model(MODELS["llama2"])
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for i in range(SHAPE["num_hidden_layers"]):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, tmp_path / "model.safetensors")
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids), logits_of(theirs, ids))


# --- every number of config.json counts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("llama3", {"rms_norm_eps": 0.1}),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
        ("llama3.1", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "factor": 2.0}}),
        ("llama3.1", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "low_freq_factor": 2.0}}),
        ("llama3.1", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "high_freq_factor": 16.0}}),
        (
            "llama3.1",
            {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0, "original_max_position_embeddings": 16}},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:120],
)
def test_a_changed_number_changes_the_logits_as_it_does_in_transformers(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    theirs = random_model(MODELS[name])
    theirs.save_pretrained(tmp_path)
    ids = tokens(2, LENGTH)
    before = logits_of(theirs, ids)
    rewrite_config(tmp_path, lambda config: {**config, **change})
    changed = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = logits_of(changed, ids)
    assert (expected - before).abs().max() > 1e-2
    with torch.no_grad():
        assert_close(load(tmp_path)(ids), expected)
