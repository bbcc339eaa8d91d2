"""Every model family, by one runner: a small random checkpoint that transformers saved, against transformers itself.

Our eager decoder equals transformers' on a prefill and 16 cached steps, in a ragged batch, beyond windows and beyond
the length at which some rotary embeddings change. The export equals it too, and builds into a TensorRT-RTX engine. A
config value that alters the maths is honoured or refused, never ignored.

A new family adds an entry to CASES, and to CHANGES what its config.json can say.
"""

import copy
import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from exporter.errors import ExportError
from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export
from exporter.precision import cache_spec
from exporter.verify import verify
from graphs.checkpoint import open_checkpoint
from graphs.errors import CheckpointError
from graphs.families import FAMILIES, find_family
from graphs.loading import load_decoder
from graphs.transformer import TransformerDecoder
from runtimes.artifact import open_artifact
from runtimes.decoding import Decoding
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import open_runner

# Both sides compute in float32, and logits are of order 1: what differs is the order of additions.
ATOL = 1e-5
# ONNX Runtime's kernels order their additions in their own way, in every layer.
ONNX_ATOL = 3e-5

PROMPT_LENGTHS = (11, 3, 21)
STEPS = 16
MAX_LEN = 64

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,  # 6 of 8
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 6.0],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A transformers model: the class names' common part, and what its config says beyond SIZES."""

    name: str
    config: dict[str, Any]
    text: str = ""  # part of the config's class name only

    def make_config(self, **changes: Any) -> transformers.PreTrainedConfig:
        settings = {**SIZES, **self.config, **changes}
        return getattr(transformers, f"{self.name}{self.text}Config")(**settings, attn_implementation="eager")

    def make_model(self) -> transformers.PreTrainedModel:
        """Weights large enough that every part matters: logits of order 1, norms and biases far from 1 and 0."""
        torch.manual_seed(len(self.name))
        model = getattr(transformers, f"{self.name}ForCausalLM")(self.make_config()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and self.name.startswith("Gemma"):
                    parameter.normal_(0, 0.3)  # the difference from 1
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                else:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return model


CASES: dict[str, FamilyCase] = {
    "llama": FamilyCase(name="Llama", config={}),
    "llama, yarn": FamilyCase(
        name="Llama",
        config={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,  # of four pairs, some are slowed, some kept, and some mixed
                "factor": 4.0,
                "original_max_position_embeddings": 40,
            }
        },
    ),
    "llama, dynamic": FamilyCase(
        name="Llama",
        config={
            "max_position_embeddings": 24,  # the steps cross it
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
        },
    ),
    "mistral": FamilyCase(name="Mistral", config={"sliding_window": 7, "head_dim": 10}),
    "mistral, a window beyond the prompts": FamilyCase(name="Mistral", config={"sliding_window": 40}),
    "qwen2": FamilyCase(name="Qwen2", config={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": FamilyCase(name="Qwen3", config={"head_dim": 16}),
    "gemma2": FamilyCase(
        name="Gemma2",
        config={
            "head_dim": 10,
            "sliding_window": 6,
            "query_pre_attn_scalar": 14,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2, heads of 16": FamilyCase(
        name="Gemma2",
        config={
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 14,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": FamilyCase(
        name="Gemma3",
        text="Text",
        config={
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 14,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": FamilyCase(name="Phi3", config={"sliding_window": 9}),
    "phi3, longrope": FamilyCase(
        name="Phi3",
        config={"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},  # the steps cross it
    ),
    "granite": FamilyCase(
        name="Granite",
        config={
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.7,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3": FamilyCase(name="SmolLM3", config={"no_rope_layer_interval": 2}),
    "mixtral": FamilyCase(
        name="Mixtral", config={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    ),
    "qwen3_moe": FamilyCase(
        name="Qwen3Moe",
        config={
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = CASES["llama, yarn"].config["rope_parameters"]

# {case: changes to its config.json, each of which alters what transformers computes, or would if it knew the key}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"rms_norm_eps": 0.3},
        {"hidden_act": "gelu"},
        {"rope_parameters": DEFAULT_ROPE},
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 100.0}},
        {"attn_logit_softcapping": 2.0},  # of Gemma 2
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ],
    "llama, yarn": [
        {"rope_parameters": {**YARN, "beta_fast": 4.0, "truncate": False}},
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
        {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7}},
    ],
    "mistral": [{"sliding_window": 5}, {"sliding_window": None}, {"hidden_act": "gelu_pytorch_tanh"}],
    "qwen2": [
        {"max_window_layers": 2, "layer_types": None},
        {"use_sliding_window": False, "layer_types": None},
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        {"sliding_window": 4},
        {"qk_norm": True},
    ],
    "qwen3": [
        {"rms_norm_eps": 0.3},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
        {"layer_types": ["sliding_attention"] * 3},
    ],
    "gemma2": [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 3},
        {"sliding_window": 4},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"hidden_activation": "relu"},
        {"use_bidirectional_attention": True},
    ],
    "gemma3_text": [
        {"final_logit_softcapping": 3.0},
        {"attn_logit_softcapping": 2.0},  # which transformers stores and does not apply
        {"sliding_window": 4},
        {"sliding_window": None},
        {"rope_parameters": DEFAULT_ROPE},
        {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}},
        {"use_bidirectional_attention": True},
    ],
    "phi3": [
        {"sliding_window": None},
        {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {**YARN, "partial_rotary_factor": 1.0}},
        {"hidden_act": "gelu_new"},
    ],
    "phi3, longrope": [
        {"original_max_position_embeddings": 48},
        {"rope_parameters": {**LONGROPE, "short_factor": [1.0, 1.0, 1.0], "long_factor": [3.0, 3.0, 3.0]}},
    ],
    "granite": [
        {"attention_multiplier": 0.5},
        {"embedding_multiplier": 1.0},
        {"residual_multiplier": 1.0},
        {"logits_scaling": 2.0},
    ],
    "smollm3": [
        {"no_rope_layers": [0, 1, 1]},
        {"no_rope_layers": None, "no_rope_layer_interval": 3},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": None},
    ],
    "mixtral": [{"num_experts_per_tok": 1}, {"sliding_window": None}, {"num_local_experts": 3}],
    "qwen3_moe": [
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 3},
        {"mlp_only_layers": []},
        {"decoder_sparse_step": 2},
        {"use_sliding_window": True, "sliding_window": 4},
    ],
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """transformers' model, and ours from what its save_pretrained wrote."""

    name: str
    theirs: transformers.PreTrainedModel
    ours: TransformerDecoder
    folder: Path
    prompts: list[list[int]]
    forced: np.ndarray  # [rows, STEPS]
    logits: list[Tensor]  # transformers', per row [1 + STEPS, V]


def load(folder: Path) -> TransformerDecoder:
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config, checkpoint.tensors)
    return load_decoder(family, family.parse_config(checkpoint.config), checkpoint)


def cached_logits(model: transformers.PreTrainedModel, prompt: list[int], forced: np.ndarray) -> Tensor:
    """[1 + steps, V]: after the prompt, and after each forced token, with transformers' own cache."""
    model = copy.deepcopy(model)  # its dynamic rotary embedding remembers the longest text of earlier calls
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits[0, -1]]
        for token in forced.tolist():
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    theirs = CASES[request.param].make_model()
    folder = tmp_path_factory.mktemp("family") / "checkpoint"
    theirs.save_pretrained(folder)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, SIZES["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
    forced = rng.integers(3, SIZES["vocab_size"], (len(prompts), STEPS))
    logits = [cached_logits(theirs, prompt, row) for prompt, row in zip(prompts, forced, strict=True)]
    assert min(row.std() for row in logits) > 0.2  # a model whose logits are near zero proves nothing
    with torch.no_grad():
        yield Pair(request.param, theirs, load(folder), folder, prompts, forced, logits)


def assert_close(found: Tensor | np.ndarray, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=atol)


def test_every_family_has_a_case() -> None:
    """Families are added to the table with a case of their own."""
    covered = {case.make_config().model_type for case in CASES.values()}
    elsewhere = {"transformer_decoder", "mllama"}  # test_transformer_decoder.py, test_vision.py
    assert covered == FAMILIES.keys() - elsewhere
    assert {name.partition(",")[0] for name in CASES} == {name.partition(",")[0] for name in CHANGES}


def test_a_full_pass(pair: Pair) -> None:
    """Logits of every position of a text longer than any window."""
    ids = torch.randint(3, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    if pair.ours.max_seq_len < 40:
        ids = ids[:, : pair.ours.max_seq_len]
    with torch.no_grad():
        assert_close(pair.ours(ids), pair.theirs(ids).logits)


def run_ours(pair: Pair) -> list[Tensor]:
    """Our `step` on the ragged batch: a right-padded prefill, then the forced tokens; per row [1 + STEPS, V]."""
    rows, longest = len(pair.prompts), max(PROMPT_LENGTHS)
    lengths = torch.tensor(PROMPT_LENGTHS)
    ids = torch.zeros((rows, longest), dtype=torch.int64)
    for row, prompt in enumerate(pair.prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    state = [
        tuple(tensor.zeros(rows, torch.float32).fill_(1e4) for tensor in layer) for layer in pair.ours.state(MAX_LEN)
    ]
    mask = (torch.arange(longest) < lengths[:, None]).long()
    positions = torch.arange(longest).expand(rows, -1)
    logits, state = pair.ours.step(ids, positions, torch.zeros(rows).long(), mask, lengths[:, None] - 1, state)
    found = [logits[:, 0]]
    for tokens in torch.tensor(pair.forced).T:
        total = int(lengths.max()) + 1
        mask = (torch.arange(total) <= lengths[:, None]).long()
        zeros = torch.zeros((rows, 1)).long()
        logits, state = pair.ours.step(tokens[:, None], lengths[:, None], lengths, mask, zeros, state)
        found.append(logits[:, 0])
        lengths = lengths + 1
    return list(torch.stack(found, dim=1))


def test_a_ragged_batch_with_an_explicit_cache(pair: Pair) -> None:
    """Prefill and 16 cached steps of three rows at once, in a cache full of poison: each as transformers alone."""
    for ours, theirs in zip(run_ours(pair), pair.logits, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_export(pair: Pair, layout: str, tmp_path: Path) -> None:
    """Parity passes, and ONNX Runtime gives transformers' logits for the ragged batch, in every layout."""
    request = ExportRequest(checkpoint=pair.folder, out=tmp_path / "out", max_len=MAX_LEN, layout=layout)
    if layout == "genai" and (head_dim := pair.ours.head_dim) % 8:
        with pytest.raises(ExportError, match=rf"heads of width {head_dim} \(it must be a multiple of 8\)"):
            export(request)
        return
    result = export(request)
    assert result.parity is not None
    assert result.parity.passed, [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]
    with open_runner(open_artifact(tmp_path / "out"), device="cpu") as runner:
        decoding = Decoding(runner)
        found = [decoding.prefill(pair.prompts)]
        found += [decoding.decode(tokens) for tokens in pair.forced.T]
    for row, theirs in enumerate(pair.logits):
        assert_close(np.stack([logits[row] for logits in found]), theirs, ONNX_ATOL)


def test_a_float16_engine_builds(pair: Pair, tmp_path: Path) -> None:
    """TensorRT-RTX takes the graph of every family; and the float16 graph passes parity."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    request = ExportRequest(
        checkpoint=pair.folder,
        out=tmp_path / "out",
        max_len=MAX_LEN,
        precision="fp16",
        targets=("tensorrt-rtx",),
        gpu_archs=("89",),
    )
    result = export(request)
    assert result.parity is not None
    assert result.parity.passed, [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]
    assert (tmp_path / "out" / result.manifest.engines["tensorrt-rtx"].file).stat().st_size > 10_000


def test_cache_bytes(pair: Pair) -> None:
    """As many as transformers' own cache holds."""
    config = pair.theirs.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    assert cache_spec(pair.ours, MAX_LEN, "float32").bytes_per_token == expected


Changed = Callable[[str, dict[str, Any]], tuple[Path, Path]]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """Saves a case's checkpoint once; gives it, and a copy with changes to its config.json."""
    saved: dict[str, Path] = {}

    def get(case: str, changes: dict[str, Any]) -> tuple[Path, Path]:
        if case not in saved:
            saved[case] = tmp_path_factory.mktemp("unchanged") / "checkpoint"
            CASES[case].make_model().save_pretrained(saved[case])
        other = tmp_path_factory.mktemp("changed") / "checkpoint"
        shutil.copytree(saved[case], other)
        config = json.loads((other / "config.json").read_text())
        assert {key: config.get(key, "absent") for key in changes} != changes
        (other / "config.json").write_text(json.dumps(config | changes))
        return saved[case], other

    return get


@pytest.mark.parametrize(
    ("case", "changes"), [pytest.param(c, x, id=f"{c}, {', '.join(x)}") for c, list_ in CHANGES.items() for x in list_]
)
def test_a_changed_value_is_honoured_or_refused(case: str, changes: dict[str, Any], changed: Changed) -> None:
    """Never ignored: the logits follow transformers' own, or the error names the key (or the tensors it calls for)."""
    original, other = changed(case, changes)
    ids = torch.randint(3, SIZES["vocab_size"], (1, 36), generator=torch.Generator().manual_seed(2))
    try:
        ours = load(other)
    except CheckpointError as error:
        message = str(error)
        assert any(key in message for key in changes) or "does not hold the tensors" in message
        return
    model_class = getattr(transformers, f"{CASES[case].name}ForCausalLM")
    theirs = model_class.from_pretrained(other, attn_implementation="eager")
    before = model_class.from_pretrained(original, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (expected - before(ids).logits).abs().max() > 1e-3  # the change does alter the maths
        assert_close(ours(ids), expected)


# {case: changes so small that only exact arithmetic shows them}
SUBTLE: dict[str, list[dict[str, Any]]] = {
    "mistral": [{"sliding_window": 8}],
    "mistral, a window beyond the prompts": [{"sliding_window": 41}, {"sliding_window": 39}],
    "gemma2": [{"attn_logit_softcapping": 2.02}, {"final_logit_softcapping": 3.01}, {"query_pre_attn_scalar": 14.1}],
    "gemma3_text": [{"rms_norm_eps": 3e-6}],
    "phi3, longrope": [{"original_max_position_embeddings": 17}],
    "granite": [{"residual_multiplier": 0.401}, {"embedding_multiplier": 3.01}],
    "smollm3": [{"no_rope_layers": [1, 1, 1]}],
    "qwen3_moe": [{"norm_topk_prob": False}],
}


@pytest.mark.parametrize(
    ("case", "changes"), [pytest.param(c, x, id=f"{c}, {x}") for c, list_ in SUBTLE.items() for x in list_]
)
def test_parity_notices(case: str, changes: dict[str, Any], changed: Changed, tmp_path: Path) -> None:
    """The graph of a slightly different config fails parity with the checkpoint it is said to be of; its own passes."""
    original, other = changed(case, changes)
    export(ExportRequest(checkpoint=other, out=tmp_path / "out", max_len=MAX_LEN, verify=False))
    artifact = open_artifact(tmp_path / "out")
    graph, cache = artifact.manifest.graphs["decoder"], artifact.manifest.cache
    for folder, passes in ((original, False), (other, True)):
        report = verify(
            lambda: OnnxRuntimeRunner(artifact.path(graph.file), graph.signature, cache, device="cpu"),
            open_checkpoint(folder),
            layout="portable",
            signature=graph.signature,
            cache=cache,
        )
        assert report.passed == passes, report.rungs
