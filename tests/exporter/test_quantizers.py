"""Methods of weight quantization against plain loops and plain float models, and calibration's promise to resume."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.errors import ExportError
from exporter.progress import Quiet
from exporter.quantizers import QUANTIZERS, awq, folding, gptq, mse, rtn
from exporter.quantizers.calibration import calibrate
from exporter.quantizers.streaming import StreamedLayer
from exporter.quantizers.work import Calibrated
from exporter.reference import Reference
from exporter.text import sample_tokens
from graphs.build import build_decoder
from graphs.checkpoint import Checkpoint, open_checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family, find_family
from graphs.loading import load_decoder
from graphs.quantization import QuantizedTensor, WeightFormat, code_values, nearest_codes
from graphs.transformer import TransformerDecoder

INT4, INT8 = WeightFormat(name="int4", block=32), WeightFormat(name="int8", block=0)
FP8, NVFP4 = WeightFormat(name="fp8", block=0), WeightFormat(name="nvfp4", block=16)
FORMATS = (INT4, WeightFormat(name="int4", block=16), INT8, WeightFormat(name="int8", block=32), FP8, NVFP4)
CPU = torch.device("cpu")
BOS = 1  # of the shipped checkpoint


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def heavy_tailed(outputs: int, inputs: int) -> Tensor:
    """A weight with some numbers far from the others, as real ones have; and a block of zeros."""
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    weight[torch.rand_like(weight) < 0.01] *= 6
    weight[1, :32] = 0.0
    return weight


def correlated(tokens: int, inputs: int) -> Tensor:
    """Inputs of which a few directions are much larger than the rest."""
    return torch.randn(tokens, inputs) @ (torch.diag(torch.logspace(0, -2, inputs)) @ torch.randn(inputs, inputs))


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


# Methods that look at a weight alone


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_mse_is_never_worse_than_round_to_nearest(format: WeightFormat, scale_dtype: torch.dtype) -> None:
    weight = heavy_tailed(40, 256)

    def errors(quantized: QuantizedTensor) -> Tensor:
        lost = (quantized.dequantize(torch.float64) - weight).square()
        return lost.unflatten(1, (format.scales_of(256), -1)).sum(dim=2)

    nearest, searched = (QUANTIZERS[name].quantize_weight(weight, format, scale_dtype) for name in ("rtn", "mse"))
    assert (errors(searched) <= errors(nearest) * (1 + 1e-6)).all()
    assert errors(searched).sum() < errors(nearest).sum() * (0.95 if format.grid.bits == 4 else 1.0)
    for quantized in (nearest, searched):
        assert (quantized.scales > 0).all()
        stored = torch.float8_e4m3fn if format.has_tensor_scale else scale_dtype
        assert torch.equal(quantized.scales.to(stored).float(), quantized.scales)


def test_mse_uses_the_lowest_code() -> None:
    """-8 has no positive counterpart: a block of just the sixteen codes is exact, which rounding to 7 is not."""
    weight = torch.arange(-8.0, 8.0).repeat(2)[torch.randperm(32)].reshape(1, 32) / 64
    assert torch.equal(mse.quantize(weight, INT4, torch.float16).dequantize(), weight)
    assert not torch.equal(rtn.quantize(weight, INT4, torch.float16).dequantize(), weight)


def test_rows_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(50, 64)
    hessian = second_moment(correlated(200, 64))
    methods: tuple[Callable[[WeightFormat], QuantizedTensor], ...] = (
        lambda format: rtn.quantize(weight, format, torch.float16),
        lambda format: mse.quantize(weight, format, torch.float16),
        lambda format: gptq.quantize(weight, hessian, format, torch.float16),
    )
    whole = [method(format) for method in methods for format in (INT4, FP8, NVFP4)]
    from exporter.quantizers import chunks

    monkeypatch.setattr(chunks.row_chunks, "__defaults__", (64 * 7,))
    monkeypatch.setattr(gptq, "CHUNK_NUMBERS", 64 * 7)
    for one, other in zip(whole, [method(format) for method in methods for format in (INT4, FP8, NVFP4)], strict=True):
        # a matrix product of fewer rows may add in another order, which moves a number across an edge now and then
        assert (one.codes.float() != other.codes.float()).float().mean() < 0.01
        assert one.tensor_scale == other.tensor_scale


# GPTQ


def brain_surgeon(weight: Tensor, hessian: Tensor, order: list[int], done: QuantizedTensor) -> Tensor:
    """The paper's loop without its tricks (section 3.1): float64, and the inverse Hessian of what remains, each time.

    Scales are those of `done`; returns codes.
    """
    work, remaining = weight.double(), list(order)
    codes = done.codes.clone()
    block = done.format.block or weight.shape[1]
    for index in order:
        inverse = torch.linalg.inv(hessian.double()[remaining][:, remaining])
        scale = done.scales[:, index // block].double() * done.tensor_scale
        codes[:, index] = nearest_codes((work[:, index] / scale).float(), done.format)
        error = (work[:, index] - code_values(codes[:, index], done.format, torch.float64) * scale) / inverse[0, 0]
        work[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    return codes


@pytest.mark.parametrize("format", [*FORMATS[:5], NVFP4], ids=str)
def test_gptq_is_the_papers_loop(format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BATCH", 32)  # so that whole batches follow each other
    weight, hessian = heavy_tailed(9, 64), second_moment(correlated(300, 64))
    quantized = gptq.quantize(weight, hessian, format, torch.float16)
    damped = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(64)
    order = gptq.column_order(hessian.diagonal(), format.block or 64)
    expected = brain_surgeon(weight, damped, order.tolist(), quantized)
    assert torch.equal(quantized.codes.float(), expected.float())
    assert not torch.equal(expected.float(), nearest(weight, quantized).float())  # the errors did move something


def nearest(weight: Tensor, like: QuantizedTensor) -> Tensor:
    """Codes without any feedback, for the same scales."""
    scales = (like.scales * like.tensor_scale).repeat_interleave(weight.shape[1] // like.scales.shape[1], dim=1)
    return nearest_codes(weight / scales, like.format)


def test_inputs_are_ordered_by_size_and_blocks_stay_together() -> None:
    sizes = torch.tensor([1.0, 4.0, 2.0, 3.0, 9.0, 1.0, 5.0, 5.0])
    assert gptq.column_order(sizes, 4).tolist() == [4, 6, 7, 5, 1, 3, 2, 0]
    assert gptq.column_order(sizes, 8).tolist() == [4, 6, 7, 1, 3, 2, 0, 5]


def test_the_factor_of_the_inverse() -> None:
    hessian = second_moment(correlated(300, 48))
    order = torch.randperm(48)
    factor = gptq.inverse_factor(hessian, order).double()
    damped = hessian.double()[order][:, order] + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(48).double(), rtol=0, atol=1e-4)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.ones(32, 32) * 1e8, torch.eye(32).clamp(0, 1e-30)])
def test_a_hessian_that_says_nothing_is_survived(hessian: Tensor) -> None:
    """Inputs that are always 0, or always all alike."""
    quantized = gptq.quantize(heavy_tailed(8, 32), hessian, INT4, torch.float16)
    assert torch.isfinite(quantized.dequantize()).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_errs_less_than_rounding(format: WeightFormat) -> None:
    """On inputs of the same kind that it has not seen."""
    weight, x = heavy_tailed(48, 128), correlated(3000, 128)
    hessian, unseen = second_moment(x[:2000]), x[2000:]

    def error(quantized: QuantizedTensor) -> float:
        return float((unseen @ (quantized.dequantize() - weight).T).square().sum())

    ours = error(gptq.quantize(weight, hessian, format, torch.float16))
    assert ours < 0.8 * error(mse.quantize(weight, format, torch.float16))
    assert ours < 0.6 * error(rtn.quantize(weight, format, torch.float16))


def test_gptq_mends_what_earlier_layers_did() -> None:
    """For inputs that are off, results come nearer to those of the original weight on the original inputs."""
    weight, original = heavy_tailed(48, 128), correlated(3000, 128)
    x = original @ (torch.eye(128) + 0.02 * torch.randn(128, 128))
    moments = gptq.Moments(128)
    for rows in (slice(0, 700), slice(700, 2000)):
        moments.add(x[rows], original[rows])
    torch.testing.assert_close(moments.hessian, second_moment(x[:2000]))
    assert moments.drift is not None

    def error(drift: Tensor | None) -> float:
        quantized = gptq.quantize(weight, moments.hessian, INT4, torch.float16, drift=drift)
        return float((x[2000:] @ quantized.dequantize().T - original[2000:] @ weight.T).square().sum())

    assert error(moments.drift) < 0.7 * error(None)


# Decoders of many kinds


SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "layer_norm": {
        "model_type": "transformer_decoder",
        "norm": "layer_norm",
        "mlp_bias": True,
        "attention_bias": True,
        "attention": ["causal", "alibi"],
    },
    "not gated": {
        "model_type": "transformer_decoder",
        "gated_mlp": False,
        "hidden_act": "relu",
        "attention": ["aft_simple", "sparse_top_k"],
        "attention_top_k": 4,
        "position_embedding": "learned",
    },
}


class Saved:
    """A small random checkpoint, and what is needed to read it."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.family: Family = find_family(self.checkpoint.config, self.checkpoint.tensors)
        self.config: DecoderConfig = self.family.parse_config(self.checkpoint.config)
        self.names = self.family.tensor_names(self.config)

    def decoder(self) -> TransformerDecoder:
        return load_decoder(self.family, self.config, self.checkpoint)

    def sample(self, seed: int, samples: int, length: int) -> Tensor:
        reference = Reference(self.family, self.config, self.checkpoint, torch.float32)
        return sample_tokens(reference, samples, length, seed, BOS, Quiet())

    def formats(self, format: WeightFormat = INT4, head: WeightFormat = INT8) -> dict[str, WeightFormat]:
        """Of all matrices but the routers."""
        linears = {name for name, module in self.decoder().named_modules() if isinstance(module, nn.Linear)}
        chosen = {f"{name}.weight": format for name in sorted(linears) if not name.endswith("router")}
        return chosen | {"output.weight": head}

    def calibrate(self, method: str, work: Path, progress: Quiet | None = None, **changes: Any) -> Calibrated:
        arguments: dict[str, Any] = {
            "tokens": torch.randint(3, self.config.vocab_size, (12, 40), generator=torch.Generator().manual_seed(1)),
            "formats": self.formats(),
            "names": self.names,
            "fingerprint": "a",
        } | changes
        return calibrate(
            method,
            config=self.config,
            checkpoint=self.checkpoint,
            scale_dtype=torch.float16,
            work=work,
            progress=progress or Quiet(),
            device=CPU,
            **arguments,
        )

    def decoder_of(self, calibrated: Calibrated) -> TransformerDecoder:
        """The decoder with the weights that calibration made."""
        decoder = self.decoder()
        for name in list(self.names):
            module, _, leaf = name.rpartition(".")
            quantized, changed = calibrated.quantized(name), calibrated.changed(name)
            assert quantized is None or changed is None
            value = changed if quantized is None else quantized.dequantize()
            if value is not None:
                setattr(decoder.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
        return decoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Makes a checkpoint of CONFIGS, once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            torch.manual_seed(len(name))
            raw = SIZES | CONFIGS[name]
            family = find_family(raw)
            config = family.parse_config(raw)
            with torch.no_grad():
                decoder = build_decoder(config)
                for parameter_name, parameter in decoder.named_parameters():
                    if "norm" in parameter_name or "scale" in parameter_name:
                        parameter.uniform_(-0.5, 0.5) if config.norm == "gemma_rms_norm" else parameter.uniform_(0.3, 2)
                    else:
                        parameter.normal_(0, parameter.shape[-1] ** -0.5)
                # a few channels much larger than others, as in real models
                decoder.tok_embeddings.weight[:, ::16] *= 8
            parameters = dict(decoder.named_parameters())
            names = family.tensor_names(config)
            folder = tmp_path_factory.mktemp("saved")
            save_file(
                {ref.name: parameters[ours].detach() for ours, ref in names.items()}, folder / "model.safetensors"
            )
            (folder / "config.json").write_text(json.dumps(raw))
            made[name] = Saved(folder)
        return made[name]

    return get


ATTENTION_FOLDS, MLP_FOLDS = ["sa_norm", "attn.v_proj"], ["mlp_norm", "mlp.w3"]
FOLDS = {
    "llama": [ATTENTION_FOLDS + MLP_FOLDS] * 2,
    "gemma2": [ATTENTION_FOLDS + MLP_FOLDS] * 2,
    "qwen3": [ATTENTION_FOLDS + MLP_FOLDS] * 2,
    "mixtral": [[*ATTENTION_FOLDS, "mlp_norm", *(f"mlp.experts.{i}.w3" for i in range(4))]] * 2,
    "layer_norm": [ATTENTION_FOLDS + MLP_FOLDS] * 2,
    "not gated": [["sa_norm", "mlp_norm"], [*ATTENTION_FOLDS, "mlp_norm"]],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_changes_no_result(name: str, saved: Callable[[str], Saved]) -> None:
    """Scales of up to 4 and down to a quarter in every channel: the decoder computes what it did."""
    decoder = saved(name).decoder()
    tokens = torch.randint(0, 70, (3, 30))
    before = decoder(tokens)
    for layer, expected in zip(decoder.layers, FOLDS[name], strict=True):
        streamed = StreamedLayer(layer, {}, torch.float16, torch.zeros(1, 1, 1, 64), CPU, Quiet())
        found = folding.folds(layer)
        assert [fold.source for fold in found] == expected
        for fold in found:
            channels = fold.gather(torch.zeros(streamed.linear(fold.readers[0]).in_features)).shape
            old = streamed.linear(fold.readers[0]).weight.clone()
            folding.apply(streamed, fold, 4 ** (2 * torch.rand(channels) - 1))
            assert (streamed.linear(fold.readers[0]).weight / old - 1).abs().max() > 0.5
    torch.testing.assert_close(decoder(tokens), before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", CONFIGS)
def test_calibration_beats_rounding(name: str, method: str, saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """In every kind of decoder the layers' results on unseen text are nearer to the original's."""
    model = saved(name)
    formats = model.formats()
    calibrated = model.calibrate(method, tmp_path)
    nearest = model.decoder()
    for parameter, format in formats.items():
        weight = nearest.get_parameter(parameter)
        weight.copy_(rtn.quantize(weight, format, torch.float16).dequantize())
        quantized = calibrated.quantized(parameter)
        assert quantized is not None
        assert (quantized.format, quantized.shape) == (format, tuple(weight.shape))
    assert calibrated.quantized("norm.scale") is None
    assert (method == "gptq") == (not calibrated.changes)
    tokens = torch.randint(3, 70, (8, 40), generator=torch.Generator().manual_seed(2))

    def error(decoder: TransformerDecoder) -> float:
        return float((decoder(tokens) - model.decoder()(tokens)).square().sum())

    assert error(model.decoder_of(calibrated)) < (0.5 if method == "gptq" else 0.95) * error(nearest)


def test_an_expert_that_saw_little_is_quantized_by_itself(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """Four tokens, of which two experts get some each: none has inputs / 8."""
    model = saved("mixtral")
    for method in ("gptq", "awq"):
        calibrated = model.calibrate(method, tmp_path / method, tokens=torch.tensor([[3, 4, 5, 6]]))
        for expert in range(4):
            parameter = f"layers.0.mlp.experts.{expert}.w2.weight"
            found, alone = (
                calibrated.quantized(parameter),
                mse.quantize(model.checkpoint.load(model.names[parameter]), INT4, torch.float16),
            )
            assert found is not None
            assert torch.equal(found.codes, alone.codes)
            assert torch.equal(found.scales, alone.scales)


def test_weights_that_are_not_quantized_are_folded_into(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """With output_proj and w2 alone in 4 bits, their scales go to v_proj and w3, which stay floats."""
    model = saved("layer_norm")
    formats = {n: f for n, f in model.formats().items() if n.endswith(("output_proj.weight", "w2.weight"))}
    calibrated = model.calibrate("awq", tmp_path, formats=formats)
    changed = {f"layers.{i}.{n}" for i in range(2) for n in ("attn.v_proj.weight", "mlp.w3.weight")}
    assert calibrated.changes == changed | {name.replace("weight", "bias") for name in changed}


# Calibration, and going on with it


class Stopped(Exception):  # noqa: N818
    pass


class StopsAt(Quiet):
    """Raises when a layer begins, or so many weights later; remembers the stages."""

    def __init__(self, stage: str = "", after: int = 0) -> None:
        self.stage, self.after, self.stages = stage, after, list[str]()

    def start(self, stage: str, total: int | None = None) -> None:
        self.stages.append(stage)
        if stage == self.stage and not self.after:
            raise Stopped

    def advance(self, amount: int) -> None:
        if self.stages[-1] == self.stage:
            self.after -= amount
            if self.after <= 0:
                raise Stopped


def everything(model: Saved, calibrated: Calibrated) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in model.names:
        if (quantized := calibrated.quantized(name)) is not None:
            found |= {f"{name} codes": quantized.codes, f"{name} scales": quantized.scales}
        if (changed := calibrated.changed(name)) is not None:
            found[name] = changed
    return found


@pytest.fixture(scope="module", params=["gptq", "awq"])
def whole_run(
    request: pytest.FixtureRequest, saved: Callable[[str], Saved], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(method, the results of a run that was not stopped); with a quicker search in both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "POWERS", (0.2, 0.5))
        calibrated = saved("gemma2").calibrate(request.param, tmp_path_factory.mktemp("whole"))
        yield request.param, everything(saved("gemma2"), calibrated)


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("calibrate: layer 1 of 2", 2),
        ("calibrate: layer 2 of 2", 0),
        ("calibrate: layer 2 of 2", 3),
        ("calibrate: output projection", 0),
        ("calibrate: output projection", 1),
    ],
)
def test_a_stopped_run_goes_on(
    whole_run: tuple[str, dict[str, Tensor]], stage: str, after: int, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    """At the layer where it stopped, with results that are the same bit for bit."""
    model, (method, whole) = saved("gemma2"), whole_run
    with pytest.raises(Stopped):
        model.calibrate(method, tmp_path / "work", StopsAt(stage, after))
    assert not list((tmp_path / "work").glob("*partial*"))
    again = StopsAt()
    resumed = everything(model, model.calibrate(method, tmp_path / "work", again))
    assert again.stages[0] == stage
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name].float(), whole[name].float()) for name in whole)
    assert not list((tmp_path / "work").glob("*.npy"))  # what enters a layer is kept no longer than needed


def test_another_fingerprint_starts_anew(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    model = saved("llama")
    (tmp_path / "mine.txt").write_text("not calibration's")
    with pytest.raises(Stopped):
        model.calibrate("gptq", tmp_path, StopsAt("calibrate: layer 2 of 2"))
    progress = StopsAt()
    model.calibrate("gptq", tmp_path, progress, fingerprint="b")
    assert progress.stages[0] == "calibrate: layer 1 of 2"
    finished = StopsAt()
    model.calibrate("gptq", tmp_path, finished, fingerprint="b")
    assert not [stage for stage in finished.stages if stage.startswith("calibrate")]
    assert (tmp_path / "mine.txt").exists()


def test_what_text_does_not_reach_is_quantized_by_mse(tiny_vision: Path, tmp_path: Path) -> None:
    """Cross attention and the vision encoder; text passes them by, and the layers behind them are calibrated."""
    model = Saved(tiny_vision)
    cross = model.config.cross_layers[0]
    names = model.names | model.family.encoder_names(model.config)
    for leaf in ("k_proj", "v_proj"):  # the encoder's graph has them
        del names[f"layers.{cross}.attn.{leaf}.weight"]
    encoder = "multi_modal_projector.weight"
    unreached = [f"layers.{cross}.attn.q_proj.weight", f"layers.{cross}.mlp.w2.weight", encoder]
    behind = f"layers.{cross + 1}.mlp.w1.weight"
    formats = dict.fromkeys([*unreached, behind], INT8)
    for method in ("gptq", "awq"):
        progress = StopsAt("quantize what text does not reach", 1)
        with pytest.raises(Stopped):
            model.calibrate(method, tmp_path / method, progress, names=names, formats=formats)
        progress = StopsAt()
        calibrated = model.calibrate(method, tmp_path / method, progress, names=names, formats=formats)
        assert progress.stages == ["quantize what text does not reach"]
        for parameter in (*unreached, behind):
            found = calibrated.quantized(parameter)
            alone = mse.quantize(model.checkpoint.load(names[parameter]), INT8, torch.float16)
            assert found is not None
            assert torch.equal(found.codes, alone.codes) == (parameter != behind)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros((2, 65), dtype=torch.int64), ["65 tokens", "64 at most"]),
        (torch.tensor([[0, 70]]), ["0 to 70", "0 to 69", "tokenizer"]),
        (torch.tensor([[-1, 3]]), ["-1 to 3", "0 to 69"]),
    ],
)
def test_text_that_does_not_fit(
    tokens: Tensor, words: list[str], saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as error:
        saved("llama").calibrate("gptq", tmp_path, tokens=tokens)
    assert all(word in str(error.value) for word in words)


def test_a_model_that_computes_infinities(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    model = saved("llama")
    infinite = {name: model.checkpoint.load(ref).clone() for name, ref in model.names.items()}
    infinite["layers.1.sa_norm.scale"][3] = float("inf")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({ref.name: infinite[name] for name, ref in model.names.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES | CONFIGS["llama"]))
    for method in ("gptq", "awq"):
        with pytest.raises(ExportError, match="not finite"):
            Saved(folder).calibrate(method, tmp_path / method)


def test_sampled_text_is_the_models_own(tiny_llama: Path) -> None:
    """As drawn from full passes over the text so far, with the same generator."""
    model = Saved(tiny_llama)
    found, decoder, generator = model.sample(5, 3, 24), model.decoder(), torch.Generator().manual_seed(5)
    torch.randint(model.config.vocab_size, (3,), generator=generator)  # the first tokens, were there no BOS
    expected = torch.full((3, 1), BOS)
    for _ in range(23):
        probabilities = torch.softmax(decoder(expected)[:, -1], dim=-1)
        expected = torch.cat((expected, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(found, model.sample(5, 3, 24))
    assert not torch.equal(found, model.sample(6, 3, 24))


def test_calibration_on_a_models_own_text_halves_the_loss(tiny_llama: Path, tmp_path: Path) -> None:
    """What calibration is for, on a trained model: the divergence of next tokens' distributions, on unseen text."""
    model = Saved(tiny_llama)
    tokens, unseen = (model.sample(seed, 24, 64) for seed in (1, 2))
    formats = model.formats()
    expected = torch.log_softmax(model.decoder()(unseen), dim=-1)

    def divergence(decoder: TransformerDecoder) -> float:
        found = torch.log_softmax(decoder(unseen), dim=-1)
        return float((expected.exp() * (expected - found)).sum(dim=-1).mean())

    nearest = model.decoder()
    nearest.output.weight = nn.Parameter(nearest.output.weight.clone())  # the embedding's otherwise
    for parameter, format in formats.items():
        weight = nearest.get_parameter(parameter)
        weight.data = rtn.quantize(weight, format, torch.float16).dequantize()
    worst = divergence(nearest)
    found = {
        method: divergence(model.decoder_of(model.calibrate(method, tmp_path / method, tokens=tokens, formats=formats)))
        for method in ("gptq", "awq")
    }
    assert found["gptq"] < 0.2 * worst
    assert found["awq"] < 0.8 * worst
