"""Llama 3.2 Vision against transformers' own MllamaForConditionalGeneration, from pixels to logits.

Random weights with gates far from zero, heads and widths that are no powers of two, 1 to 4 tiles, two pictures in one
prompt and a row that has none beside them.
"""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mllama_cases as cases
import numpy as np
import pytest
import torch
from mllama_cases import CASES, IMAGE_TOKEN, MAX_LEN, VOCAB, Shown
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export
from exporter.verify import verify
from graphs.checkpoint import open_checkpoint
from graphs.errors import CheckpointError
from graphs.families import find_family
from graphs.loading import load_model
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.artifact import Artifact, Manifest, open_artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.eager_runner import EagerRunner
from runtimes.errors import ArtifactError, FeedError
from runtimes.generation import generate
from runtimes.images import ImageBatch
from runtimes.onnxruntime_layouts import LAYOUT_RUNNERS
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import Runner, open_runner
from runtimes.verification import onnx_targets

ATOL = 1e-5  # both sides compute in float32, and logits are of order 1: what differs is the order of additions
ONNX_ATOL = 3e-5  # ONNX Runtime's kernels order their additions in their own way, in every layer
STEPS = 16
MAX_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class Pair:
    """transformers' model, and ours from what its save_pretrained wrote."""

    theirs: MllamaForConditionalGeneration
    decoder: TransformerDecoder
    encoder: VisionEncoder
    folder: Path
    shown: Shown
    forced: np.ndarray  # [rows, STEPS]
    logits: list[Tensor]  # transformers', per row alone [1 + STEPS, V]

    def batch(self) -> ImageBatch:
        shown = self.shown
        return ImageBatch(
            pixel_values=shown.pixel_values.numpy(),
            aspect_ratio_ids=shown.aspect_ratio_ids.numpy(),
            aspect_ratio_mask=shown.aspect_ratio_mask.numpy(),
            cross_attention_mask=shown.sight(),
        )


def load(folder: Path) -> tuple[TransformerDecoder, VisionEncoder]:
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config, checkpoint.tensors)
    decoder, encoder = load_model(family, family.parse_config(checkpoint.config), checkpoint)
    assert encoder is not None
    return decoder, encoder


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    theirs = CASES[request.param].make_model()
    folder = cases.save(theirs, tmp_path_factory.mktemp("mllama") / "checkpoint")
    shown = cases.show(theirs)
    forced = np.random.default_rng(5).integers(3, VOCAB, (len(shown.prompts), STEPS))
    logits = [cases.cached_logits(theirs, shown, row, tokens.tolist()) for row, tokens in enumerate(forced)]
    assert min(row.std() for row in logits) > 0.2  # a model whose logits are near zero proves nothing
    with torch.no_grad():
        yield Pair(theirs, *load(folder), folder, shown, forced, logits)


def assert_close(found: Tensor | np.ndarray, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=atol)


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids [B, longest], lengths [B])."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids, lengths


# --- eager --------------------------------------------------------------------------------------------------------


def test_the_cases_tell_something(pair: Pair) -> None:
    """Other pictures give other logits, and so does each gate."""
    ids, pictures = torch.tensor([pair.shown.prompts[0]]), pair.shown.row(0)
    before = pair.theirs(ids, **pictures).logits
    changed = {**pictures, "pixel_values": pictures["pixel_values"].flip(-1)}
    assert (pair.theirs(ids, **changed).logits - before).abs().max() > 1e-2


def test_a_full_pass_in_a_batch(pair: Pair) -> None:
    """transformers' own masks of 0 and 1, rows as it batches them: a token that sees nothing attends to everything."""
    shown, (ids, lengths) = pair.shown, padded(pair.shown.prompts)
    pictures = (shown.pixel_values, shown.aspect_ratio_ids, shown.aspect_ratio_mask)
    theirs = pair.theirs(
        ids,
        pixel_values=pictures[0],
        aspect_ratio_ids=pictures[1],
        aspect_ratio_mask=pictures[2],
        cross_attention_mask=shown.cross_attention_mask,
    ).logits
    sight = shown.cross_attention_mask.flatten(2).repeat_interleave(pair.decoder.num_patches, dim=2)
    ours = pair.decoder(ids, encoder_input=pair.encoder.vision_tokens(*pictures), encoder_mask=sight)
    for row, length in enumerate(lengths):
        assert_close(ours[row, :length], theirs[row, :length])


def test_a_ragged_batch_with_explicit_caches(pair: Pair) -> None:
    """Prefill and 16 cached steps of three rows at once, in caches full of poison: each row as transformers alone.

    What is poisoned: slots that nobody wrote, padding pictures, and padding tiles of the row whose tokens all see.
    """
    shown, (ids, lengths) = pair.shown, padded(pair.shown.prompts)
    rows, longest = ids.shape
    key_values = pair.encoder(shown.pixel_values, shown.aspect_ratio_ids, shown.aspect_ratio_mask)
    hidden = torch.from_numpy(shown.sight() == -1).all(dim=1)  # [B, I, T]
    hidden[1] |= shown.aspect_ratio_mask[1] == 0
    poison = hidden.flatten(1).repeat_interleave(pair.decoder.num_patches, dim=1)[:, None, :, None]
    key_values = [tuple(tensor.masked_fill(poison, 1e4) for tensor in layer) for layer in key_values]
    state = [
        tuple(tensor.zeros(rows, torch.float32).fill_(1e4) for tensor in layer)
        for layer in pair.decoder.state(MAX_LEN)
        if layer
    ]
    sight = torch.from_numpy(shown.sight())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    positions = torch.arange(longest).expand(rows, -1)
    zeros = torch.zeros(rows).long()
    logits, state = pair.decoder.step(ids, positions, zeros, mask, lengths[:, None] - 1, state, sight, key_values)
    found = [logits[:, 0]]
    last = sight[torch.arange(rows), lengths - 1][:, None]
    for tokens in torch.tensor(pair.forced).T:
        mask = (torch.arange(int(lengths.max()) + 1) <= lengths[:, None]).long()
        logits, state = pair.decoder.step(
            tokens[:, None], lengths[:, None], lengths, mask, zeros[:, None], state, last, key_values
        )
        found.append(logits[:, 0])
        lengths = lengths + 1
    for ours, theirs in zip(torch.stack(found, dim=1), pair.logits, strict=True):
        assert_close(ours, theirs)


def test_fewer_tiles_than_the_most_are_padded_inside(pair: Pair) -> None:
    """A picture's keys and values do not depend on how many padding tiles are handed over with it."""
    shown, most = pair.shown, pair.theirs.config.vision_config.max_num_tiles
    row, image = 1, 0
    tiles = int(shown.aspect_ratio_mask[row, image].sum())
    ids = shown.aspect_ratio_ids[row : row + 1, image : image + 1]
    whole = pair.encoder(shown.pixel_values[row : row + 1, :1], ids, shown.aspect_ratio_mask[row : row + 1, :1])
    for count in range(tiles, most + 1):
        fewer = pair.encoder(
            shown.pixel_values[row : row + 1, :1, :count], ids, shown.aspect_ratio_mask[row : row + 1, :1, :count]
        )
        for ours, expected in zip(fewer, whole, strict=True):
            for tensor, other in zip(ours, expected, strict=True):
                assert tensor.shape[2] == count * pair.decoder.num_patches
                assert_close(tensor, other[:, :, : tensor.shape[2]], 2e-5)


def test_tokens_that_see_nothing(four_tiles: Path) -> None:
    """What transformers computes for them depends on their neighbours in the batch; -1 makes it what it is alone.

    Meta's own code and torchtune give them nothing from cross attention at all: the graph does, with -1 throughout.
    """
    theirs = CASES["4 tiles"].make_model()
    shown, (ids, lengths) = cases.show(theirs), padded(cases.show(theirs).prompts)
    with torch.no_grad():
        together = theirs(
            ids,
            pixel_values=shown.pixel_values,
            aspect_ratio_ids=shown.aspect_ratio_ids,
            aspect_ratio_mask=shown.aspect_ratio_mask,
            cross_attention_mask=shown.cross_attention_mask,
        ).logits
        alone = [theirs(torch.tensor([prompt]), **shown.row(row)).logits for row, prompt in enumerate(shown.prompts)]
    differs = [(together[row, : lengths[row]] - alone[row][0]).abs().max().item() for row in range(3)]
    with torch.no_grad():  # Meta's rule, by our decoder
        decoder, encoder = load(four_tiles)
        sight = shown.cross_attention_mask.where(shown.cross_attention_mask == 1, -1).flatten(2)
        tokens = encoder.vision_tokens(shown.pixel_values, shown.aspect_ratio_ids, shown.aspect_ratio_mask)
        mask = sight.repeat_interleave(decoder.num_patches, dim=2)
        meta = decoder(ids, encoder_input=tokens, encoder_mask=mask)
        same = decoder(ids, encoder_input=tokens, encoder_mask=mask == 1)
    assert_close(meta, same)  # as torchtune's call has it
    assert (meta[0, : lengths[0]] - alone[0][0]).abs().max() > 0.1  # its first tokens see nothing
    assert_close(meta[1, : lengths[1]], alone[1][0])
    assert_close(meta[2, : lengths[2]], alone[2][0])
    assert differs[0] < ATOL  # it has as many pictures as anybody
    assert differs[1] < ATOL  # its first token is its picture's
    assert differs[2] > 0.1  # it reads text only, beside rows with pictures


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("mllama") / "out"
    result = export(ExportRequest(checkpoint=pair.folder, out=out, max_len=MAX_LEN, max_images=MAX_IMAGES))
    assert result.parity is not None
    assert result.parity.passed, [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]
    names = [rung.name for report in result.parity.reports for rung in report.rungs]
    assert "keys and values of images" in names
    return open_artifact(out)


@pytest.fixture
def runner(artifact: Artifact) -> Iterator[Runner]:
    with open_runner(artifact, device="cpu") as opened:
        yield opened


def test_the_exported_graphs(pair: Pair, runner: Runner) -> None:
    """ONNX Runtime gives transformers' logits for the ragged batch, prefill and 16 steps."""
    decoding = Decoding(runner)
    found = [decoding.prefill(pair.shown.prompts, pair.batch())]
    found += [decoding.decode(tokens) for tokens in pair.forced.T]
    for row, theirs in enumerate(pair.logits):
        assert_close(np.stack([logits[row] for logits in found]), theirs, ONNX_ATOL)


def test_a_client_that_knows_transformers_tensors_only(pair: Pair, artifact: Artifact) -> None:
    """The two files with onnxruntime alone, fed what transformers' processor makes: names, dtypes, masks of 0 and 1."""
    ort = pytest.importorskip("onnxruntime")
    sessions = {
        name: ort.InferenceSession(str(artifact.folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("vision_encoder", "decoder")
    }
    shown, (ids, lengths) = pair.shown, padded(pair.shown.prompts)
    pictures = {
        "pixel_values": shown.pixel_values.numpy(),
        "aspect_ratio_ids": shown.aspect_ratio_ids.numpy(),
        "aspect_ratio_mask": shown.aspect_ratio_mask.numpy(),
    }
    assert [value.name for value in sessions["vision_encoder"].get_inputs()] == list(pictures)
    outputs = [value.name for value in sessions["vision_encoder"].get_outputs()]
    layers = sorted(pair.theirs.config.text_config.cross_attention_layers)
    assert outputs == [f"cross_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    rows, longest = ids.shape
    feeds = {
        "input_ids": ids.numpy(),
        "position_ids": np.tile(np.arange(longest), (rows, 1)),
        "write_indices": np.zeros(rows, np.int64),
        "attention_mask": (np.arange(longest) < lengths.numpy()[:, None]).astype(np.int64),
        "logit_indices": np.tile(np.arange(longest), (rows, 1)),
        "cross_attention_mask": shown.cross_attention_mask.numpy(),
        **dict(zip(outputs, sessions["vision_encoder"].run(None, pictures), strict=True)),
    }
    for value in sessions["decoder"].get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros([rows, *value.shape[1:]], np.float32)
    logits = sessions["decoder"].run(["logits"], feeds)[0]
    theirs = pair.theirs(
        ids, cross_attention_mask=shown.cross_attention_mask, **{k: torch.from_numpy(v) for k, v in pictures.items()}
    ).logits
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], theirs[row, :length], ONNX_ATOL)


def test_text_alone_runs_the_same_decoder(pair: Pair, runner: Runner) -> None:
    """Without a picture, and after one: transformers leaves its cross-attention layers out."""
    prompts = [[1, 5, 9, 17], [1, 33]]
    for pictures in (None, pair.batch(), None):
        decoding = Decoding(runner)
        if pictures is not None:
            decoding.prefill(pair.shown.prompts, pictures)
            continue
        found = decoding.prefill(prompts)
        for row, prompt in enumerate(prompts):
            assert_close(found[row], pair.theirs(torch.tensor([prompt])).logits[0, -1], ONNX_ATOL)


def test_generation_is_that_of_transformers(pair: Pair, runner: Runner) -> None:
    """Greedy tokens of each row in one batch; and beams, whose rows move."""
    result = generate(runner, pair.shown.prompts, 12, images=pair.batch())
    beams = beam_search(runner, pair.shown.prompts[:2], 3, 8, images=_first_rows(pair, 2), early_stopping="never")
    for row, prompt in enumerate(pair.shown.prompts):
        common: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **pair.shown.row(row)}
        ids = torch.tensor([prompt])
        if 0 in pair.theirs.config.text_config.cross_attention_layers:
            common["use_cache"] = False  # see cached_logits
        expected = pair.theirs.generate(ids, max_new_tokens=12, **common)
        assert result.token_ids[row] == expected[0, len(prompt) :].tolist()
        if row < 2:
            expected = pair.theirs.generate(ids, max_new_tokens=8, num_beams=3, early_stopping="never", **common)
            assert beams.hypotheses[row][0].token_ids == expected[0, len(prompt) :].tolist()


def _first_rows(pair: Pair, count: int) -> ImageBatch:
    images = {field.name: getattr(pair.batch(), field.name)[:count] for field in dataclasses.fields(ImageBatch)}
    longest = max(len(prompt) for prompt in pair.shown.prompts[:count])
    return ImageBatch(**images | {"cross_attention_mask": images["cross_attention_mask"][:, :longest]})


def test_log_probabilities_in_chunks(pair: Pair, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt fed in chunks sees its pictures in each; image tokens have no probability."""
    monkeypatch.setattr("runtimes.generation.LOGITS_PER_CALL", 12)
    result = generate(runner, pair.shown.prompts, 1, images=pair.batch(), logprobs=True)
    for row, prompt in enumerate(pair.shown.prompts):
        logits = pair.theirs(torch.tensor([prompt]), **pair.shown.row(row)).logits[0]
        expected = torch.log_softmax(logits.double(), dim=-1)
        for place, (token, found) in enumerate(zip(prompt, result.prompt_logprobs[row], strict=True)):
            if place == 0 or token == IMAGE_TOKEN:
                assert found is None
            else:
                assert found == pytest.approx(float(expected[place - 1, token]), abs=1e-4)


def test_the_eager_runner(pair: Pair, artifact: Artifact) -> None:
    """The same interface over PyTorch: pictures, decode steps, and rows that move."""
    manifest, layout = artifact.manifest, LAYOUTS["portable"]
    signature = manifest.graphs["decoder"].signature
    modules = (layout.wrap(pair.decoder), layout.wrap_encoder(pair.encoder))
    eager = EagerRunner(
        modules[0], signature, manifest.cache, encoder=modules[1], vision=artifact.vision_part(), device="cpu"
    )
    with eager:
        decoding = Decoding(eager)
        found = [decoding.prefill(pair.shown.prompts, pair.batch())]
        found += [decoding.decode(tokens) for tokens in pair.forced.T[:3]]
        decoding.reorder(np.array([1, 1, 0]))
        moved = decoding.decode(pair.forced[[1, 1, 0], 3])
    for row, theirs in enumerate(pair.logits):
        assert_close(np.stack([logits[row] for logits in found]), theirs[:4])
    for row, origin in enumerate([1, 1, 0]):
        assert_close(moved[row], pair.logits[origin][4])


def test_poison_in_padding_changes_nothing(pair: Pair, runner: Runner) -> None:
    """Keys and values of padding pictures, and of tiles that no token attends to, may hold anything."""
    images = pair.batch()
    assert runner.vision_spec is not None
    results = []
    for poison in (0.0, 1e4, -3e3):
        decoding = Decoding(_PoisonedPadding(runner, images, poison))
        logits = [decoding.prefill(pair.shown.prompts, images)]
        logits += [decoding.decode(tokens) for tokens in pair.forced.T[:4]]
        results.append(np.stack(logits))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


class _PoisonedPadding:
    """A runner whose encoder leaves a number in everything that is hidden or, of the second row, padding."""

    def __init__(self, runner: Runner, images: ImageBatch, value: float) -> None:
        self._runner, self._images, self._value = runner, images, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def encode_images(self, feeds: dict[str, np.ndarray]) -> None:
        self._runner.encode_images(feeds)
        spec = self._runner.vision_spec
        assert spec is not None
        hidden = (self._images.cross_attention_mask == -1).all(axis=1)
        hidden[1] |= self._images.aspect_ratio_mask[1] == 0
        tokens = np.repeat(hidden.reshape(len(hidden), -1), spec.patches_per_tile, axis=1)
        assert tokens.any()
        for index in range(len(spec.names())):
            array = self._runner.read_images(index)
            array.swapaxes(1, 2)[tokens] = self._value
            self._runner.write_images(index, array)


def test_rows_move_with_their_pictures(pair: Pair, runner: Runner) -> None:
    """After a reordering, decoding goes on as if each row had been there from the start."""
    tokens = np.array([7, 8, 9])
    decoding = Decoding(runner)
    for order in ([2, 0, 1], [1, 1, 0]):
        decoding.prefill(pair.shown.prompts, pair.batch())
        decoding.reorder(np.array(order))
        found = decoding.decode(tokens)
        for row, origin in enumerate(order):
            theirs = cases.cached_logits(pair.theirs, pair.shown, origin, [int(tokens[row])])[1]
            assert_close(found[row], theirs, ONNX_ATOL)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_and_engines(pair: Pair, precision: str, tmp_path: Path) -> None:
    """Both graphs pass parity on ONNX Runtime, and build with TensorRT-RTX without a GPU."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    request = ExportRequest(
        checkpoint=pair.folder,
        out=tmp_path / "out",
        max_len=MAX_LEN,
        max_images=3,
        precision=precision,
        targets=("tensorrt-rtx",),
        gpu_archs=("89",),
    )
    result = export(request)
    assert result.parity is not None
    assert result.parity.passed, [rung for report in result.parity.reports for rung in report.rungs if not rung.passed]
    tiles, patches = pair.theirs.config.vision_config.max_num_tiles, pair.decoder.num_patches
    for graph in result.manifest.graphs.values():  # the engines' profiles are these ranges
        ranges = {name: (sizes.min, sizes.max) for name, sizes in graph.signature.dims.items()}
        assert ranges["num_images"] == (1, 3)
        assert ranges["num_tiles"] == (1, tiles)
        assert ranges["vision_tokens"] == (patches, 3 * tiles * patches)
    for engine in ("tensorrt-rtx", "tensorrt-rtx/vision_encoder"):
        assert (tmp_path / "out" / result.manifest.engines[engine].file).stat().st_size > 10_000


# --- mistakes are noticed ---------------------------------------------------------------------------------------------


def _scale(name: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] * factor

    return change


def _swap_tiles(tensors: dict[str, Tensor]) -> None:
    name = "vision_model.post_tile_positional_embedding.embedding.weight"
    tensors[name] = tensors[name].unflatten(1, (4, -1)).flip(1).flatten(1)


TEXT_LAYER = "language_model.model.layers.3"
# what is done to the exported copy of the weights, or to its config; small, and in one place each
MISTAKES: dict[str, Callable[[dict[str, Tensor]], None] | dict[str, Any]] = {
    "an attention gate": _scale(f"{TEXT_LAYER}.cross_attn_attn_gate", 1.001),
    "a feed-forward gate": _scale(f"{TEXT_LAYER}.cross_attn_mlp_gate", 1.001),
    "a key norm": _scale(f"{TEXT_LAYER}.cross_attn.k_norm.weight", 1.001),
    "a global layer's gate": _scale("vision_model.global_transformer.layers.1.gate_ffn", 1.001),
    "the class token": _scale("vision_model.class_embedding", 1.01),
    "tiles in another order": _swap_tiles,
    "the projector's bias": _scale("multi_modal_projector.bias", 0.999),
    "intermediate layers in another order": {"intermediate_layers_indices": [0, 2]},
    "the vision encoder's eps": {"norm_eps": 2e-5},
}


@pytest.fixture(scope="module")
def four_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save(CASES["4 tiles"].make_model(), tmp_path_factory.mktemp("mllama") / "checkpoint")


@pytest.fixture(scope="module")
def exported(four_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("mllama") / "out"
    export(ExportRequest(checkpoint=four_tiles, out=out, max_len=MAX_LEN, verify=False))
    return open_artifact(out)


def passes(artifact: Artifact, checkpoint: Path, *, target: str = "onnxruntime", seed: int = 0) -> bool:
    """The verdict on the artifact's graphs, compared with the checkpoint."""
    graphs, cache = artifact.manifest.graphs, artifact.manifest.cache
    decoder = graphs["decoder"]
    part = artifact.vision_part()
    targets = onnx_targets("portable", artifact.path(decoder.file), decoder.signature, cache, "cpu", part)
    return verify(
        targets[target],
        open_checkpoint(checkpoint),
        layout="portable",
        signature=decoder.signature,
        cache=cache,
        encoder=graphs["vision_encoder"].signature,
        seed=seed,
    ).passed


def test_the_unchanged_graphs_pass(exported: Artifact, four_tiles: Path) -> None:
    """What the next tests change is what makes them fail."""
    assert passes(exported, four_tiles)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_notices(mistake: str, exported: Artifact, four_tiles: Path, tmp_path: Path) -> None:
    """Graphs that are slightly another model's than the checkpoint they are said to be of fail."""
    other = shutil.copytree(four_tiles, tmp_path / "other")
    change = MISTAKES[mistake]
    if isinstance(change, dict):
        config = json.loads((other / "config.json").read_text())
        config["vision_config"] |= change
        (other / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(other / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, other / "model.safetensors")
    assert not passes(exported, other)


class _Runner(OnnxRuntimeRunner):
    """A runner with one mistake."""

    mistake = ""

    def encode_images(self, feeds: Any) -> None:
        if self.mistake == "pictures of the row before":
            feeds = {name: np.roll(array, 1, axis=0) for name, array in feeds.items()}
        if self.mistake == "no padding mask":
            feeds = {**feeds, "aspect_ratio_mask": np.ones_like(feeds["aspect_ratio_mask"])}
        super().encode_images(feeds)
        if self.mistake == "keys and values exchanged":
            exchanged = [value for pair in zip(self._images[1::2], self._images[::2], strict=True) for value in pair]
            assert self._held is not None
            self._show(exchanged, self._held)

    def step(self, feeds: Any) -> np.ndarray:
        mask = feeds["cross_attention_mask"]
        if self.mistake == "what is not seen is hidden":
            mask = np.where(mask == 0, -1, mask)
        if self.mistake == "every token sees as the last":
            mask = np.repeat(mask[:, -1:], mask.shape[1], axis=1)
        return super().step({**feeds, "cross_attention_mask": mask})


@pytest.mark.parametrize(
    "mistake",
    [
        "pictures of the row before",
        "no padding mask",
        "keys and values exchanged",
        "what is not seen is hidden",
        "every token sees as the last",
    ],
)
def test_parity_notices_a_runners_mistake(
    mistake: str, exported: Artifact, four_tiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With good graphs as well."""
    monkeypatch.setitem(LAYOUT_RUNNERS, "portable", _Runner)
    monkeypatch.setattr(_Runner, "mistake", mistake)
    assert not passes(exported, four_tiles)


def test_no_false_alarms(four_tiles: Path, tmp_path: Path) -> None:
    """Other tokens and pictures, other shapes of artifacts."""
    for number, (max_batch, max_images) in enumerate([(1, 1), (2, 3)]):
        out = tmp_path / str(number)
        request = ExportRequest(
            checkpoint=four_tiles,
            out=out,
            max_len=[5, 40][number],
            max_batch=max_batch,
            max_images=max_images,
            precision="fp16",
        )
        parity = export(request).parity
        assert parity is not None
        assert parity.passed, [rung for report in parity.reports for rung in report.rungs if not rung.passed]
    for target in ("onnxruntime", "onnxruntime in float32"):
        for seed in (1, 2):
            assert passes(open_artifact(tmp_path / "1"), four_tiles, target=target, seed=seed)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_names_of_a_state_dict(four_tiles: Path, tmp_path: Path) -> None:
    """Tensors named as transformers 5 has them inside load as well."""
    model = CASES["4 tiles"].make_model()
    other = shutil.copytree(four_tiles, tmp_path / "other")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, other / "model.safetensors")
    for ours, theirs in zip(load(other), load(four_tiles), strict=True):
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=0)


# (where in config.json, key, value, what the message says); absent and harmless values are read as transformers does
REFUSED: list[tuple[str, str, Any, str]] = [
    (
        "text_config",
        "cross_attention_layers",
        [],
        "cross_attention_layers must be a list of layers, 0 to 4, one at least",
    ),
    ("text_config", "cross_attention_layers", [1, 5], "0 to 4, one at least and not all, found [1, 5]"),
    ("text_config", "cross_attention_layers", [0, 1, 2, 3, 4], "one at least and not all"),
    ("text_config", "tie_word_embeddings", True, "tie_word_embeddings must be false"),
    ("text_config", "head_dim", 16, "head_dim (16) must be hidden_size / num_attention_heads (8)"),
    ("text_config", "hidden_act", "mish", "hidden_act must be one of"),
    ("text_config", "sliding_window", 8, "sliding_window = 8 changes the maths"),
    ("vision_config", "hidden_act", "quick_gelu", "hidden_act must be one of"),
    ("vision_config", "vision_output_dim", 160, "vision_output_dim (160) must be hidden_size times one more than"),
    ("vision_config", "intermediate_layers_indices", [4], "must be a list of local layers, 0 to 3"),
    ("vision_config", "attention_heads", 7, "hidden_size (40) must be a multiple of attention_heads (7)"),
    ("vision_config", "patch_size", 25, "patch_size (25) must be at most image_size (24)"),
    ("vision_config", "supported_aspect_ratios", [], "supported_aspect_ratios must be a list"),
    ("vision_config", "model_type", "siglip_vision_model", "model_type"),
    ("vision_config", "max_num_tiles", 0, "max_num_tiles must be an integer from 1"),
    ("", "image_token_index", 98, "image_token_index (98) must be below vocab_size + 8 (98)"),
    ("", "vision_config", None, "vision_config must be an object, it is missing"),
]


@pytest.mark.parametrize(("where", "key", "value", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_configs_that_are_refused(where: str, key: str, value: Any, message: str, four_tiles: Path) -> None:
    """Everything that changes the maths is honoured or refused by name."""
    raw = json.loads((four_tiles / "config.json").read_text())
    (raw[where] if where else raw)[key] = value
    with pytest.raises(CheckpointError) as error_info:
        find_family(raw).parse_config(raw)
    assert message in str(error_info.value)


def test_what_config_json_leaves_out_is_as_in_transformers() -> None:
    """The 11B model's, whose config.json on the hub gives most keys."""
    raw = {
        "model_type": "mllama",
        "text_config": {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
        },
        "vision_config": {},
    }
    config = find_family(raw).parse_config(raw)
    theirs = MllamaForConditionalGeneration.config_class()
    vision, text = theirs.vision_config, theirs.text_config
    assert config.vision is not None
    assert list(config.cross_layers) == text.cross_attention_layers
    assert config.num_key_value_heads == text.num_key_value_heads
    assert config.norm_eps == text.rms_norm_eps
    assert config.max_position_embeddings == text.max_position_embeddings
    assert config.layer_kinds["full_attention"].rope is not None
    assert config.layer_kinds["full_attention"].rope.theta == text.rope_parameters["rope_theta"]
    for field in dataclasses.fields(config.vision):
        if field.name != "intermediate_layers_indices":
            assert getattr(config.vision, field.name) == getattr(vision, field.name), field.name
    assert list(config.vision.intermediate_layers_indices) == vision.intermediate_layers_indices
    assert config.vision.output_dim == vision.vision_output_dim


def test_a_checkpoint_without_its_vision_part(four_tiles: Path, tmp_path: Path) -> None:
    """Missing tensors are listed, of both parts."""
    other = shutil.copytree(four_tiles, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_model.")}
    save_file(kept, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: vision_model\.class_embedding \[40\]"):
        load(other)


# --- feeds ------------------------------------------------------------------------------------------------------------


def test_wrong_pictures_are_refused(exported: Artifact) -> None:
    """Before anything runs, and the message says what was expected."""
    shown = cases.show(CASES["4 tiles"].make_model())
    good = {
        "pixel_values": shown.pixel_values[:1, :1].numpy(),
        "aspect_ratio_ids": shown.aspect_ratio_ids[:1, :1].numpy(),
        "aspect_ratio_mask": shown.aspect_ratio_mask[:1, :1].numpy(),
    }
    many = {name: np.repeat(array, 5, axis=1) for name, array in good.items()}
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        (many, r"num_images is 5, but this artifact takes 1 to 4 \(set by --max-images, at export\)"),
        (
            {**good, "pixel_values": good["pixel_values"].astype(np.float64)},
            "pixel_values must be float32, got float64",
        ),
        ({**good, "pixel_values": good["pixel_values"][..., :20]}, r"pixel_values must have shape .* 3, 24, 24\], got"),
        (
            {**good, "aspect_ratio_ids": np.array([[9]])},
            r"aspect_ratio_ids holds 9, outside the aspect ratios \(0 to 8\)",
        ),
        ({**good, "aspect_ratio_mask": np.full((1, 1, 4), 2)}, "aspect_ratio_mask holds 2, expected one of 0, 1"),
        (
            {**good, "aspect_ratio_mask": np.zeros((1, 1, 4), np.int64)},
            "aspect_ratio_mask must be 1 for a tile of every",
        ),
        ({"pixel_values": good["pixel_values"]}, "missing inputs: aspect_ratio_ids, aspect_ratio_mask"),
        (
            {name: np.repeat(array, 2, axis=0) for name, array in good.items()},
            "batch_size is 2, but reset made a cache",
        ),
    ]
    five = {name: np.concatenate([array, array[:, :, :1]], axis=2) for name, array in good.items() if array.ndim > 2}
    wrong.append(
        ({**good, **five}, r"num_tiles is 5, but this artifact takes 1 to 4 \(set by the model's max_num_tiles\)")
    )
    with open_runner(exported, device="cpu") as runner:
        with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called before images are shown"):
            runner.encode_images(good)
        runner.reset(1)
        for feeds, message in wrong:
            with pytest.raises(FeedError, match=message):
                runner.encode_images(feeds)
        feeds = {
            "input_ids": np.array([[1, IMAGE_TOKEN]]),
            "position_ids": np.array([[0, 1]]),
            "write_indices": np.array([0]),
            "attention_mask": np.ones((1, 2), np.int64),
            "logit_indices": np.array([[1]]),
        }
        with pytest.raises(FeedError, match="missing inputs: cross_attention_mask"):
            runner.step(feeds)
        with pytest.raises(FeedError, match="speaks of 1 images with 4 tiles, but the rows were shown 1 with 1"):
            runner.step({**feeds, "cross_attention_mask": np.zeros((1, 2, 1, 4), np.int64)})
        with pytest.raises(FeedError, match="cross_attention_mask holds 3, expected one of -1, 0, 1"):
            runner.step({**feeds, "cross_attention_mask": np.full((1, 2, 1, 1), 3)})
        with pytest.raises(FeedError, match="input_ids holds 98, outside the vocabulary"):
            runner.step(
                {
                    **feeds,
                    "input_ids": np.array([[1, VOCAB + 8]]),
                    "cross_attention_mask": np.zeros((1, 2, 1, 1), np.int64),
                }
            )
        images = ImageBatch(**good, cross_attention_mask=np.zeros((1, 5, 1, 4), np.int64))
        with pytest.raises(
            FeedError, match=r"images were made for prompts of another shape: \[1, 5\], expected \[1, 2\]"
        ):
            Decoding(runner).prefill([[1, IMAGE_TOKEN]], images)


# what is done to a manifest with pictures, and what the message says
TAMPERED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(vision=None), "vision and its encoder go together"),
    (lambda m: m["graphs"].pop("vision_encoder"), "vision and its encoder go together"),
    (lambda m: m["vision"].update(head_dim=0), "must be whole numbers above 0"),
    (lambda m: m["vision"].update(layers=[1]), "are not the keys and values of images"),
    (lambda m: m["vision"].update(dtype="float16"), "is not what vision says"),
    (lambda m: m["graphs"]["decoder"]["signature"]["inputs"].pop(), "does not take every key and value of images"),
    (lambda m: m["vision"].update(dtype="complex"), "unknown dtype"),
    (lambda m: m["vision"].pop("max_tiles"), "max_tiles"),
    (
        lambda m: m["engines"].update(
            tensorrt={
                "file": "decoder.onnx",
                "graph": "decoder",
                "target": "tensorrt",
                "library_version": "1",
                "gpu_archs": [],
            }
        ),
        "a target has no engine of some graph",
    ),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED, ids=[message for _, message in TAMPERED])
def test_a_damaged_manifest(change: Callable[[dict[str, Any]], Any], message: str, exported: Artifact) -> None:
    """Parts that contradict each other are refused on opening."""
    text = (exported.folder / "manifest.json").read_text()
    assert Manifest.from_json(text) == exported.manifest
    data = json.loads(text)
    change(data)
    with pytest.raises(ArtifactError, match=f"is damaged: .*{message}"):
        Manifest.from_json(json.dumps(data))


def test_pictures_for_a_model_that_reads_text(tiny_artifact: Artifact) -> None:
    """It has no vision encoder."""
    images = ImageBatch(
        pixel_values=np.zeros((1, 1, 1, 3, 8, 8), np.float32),
        aspect_ratio_ids=np.ones((1, 1), np.int64),
        aspect_ratio_mask=np.ones((1, 1, 1), np.int64),
        cross_attention_mask=np.ones((1, 2, 1, 1), np.int64),
    )
    with (
        open_runner(tiny_artifact, device="cpu") as runner,
        pytest.raises(FeedError, match="this model reads text only"),
    ):
        Decoding(runner).prefill([[1, 5]], images)
