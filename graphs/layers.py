"""Norms and feed-forward networks, with torchtune's parameter names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs import ops
from graphs.config import DecoderConfig, ExpertsConfig
from graphs.near_ties import Chooser


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension; arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale, self.eps)


class GemmaRMSNorm(nn.Module):
    """RMSNorm whose weight is stored as its difference from 1; x / rms(x) * (1 + scale), arXiv:2403.08295.

    All of it is computed in float32 and rounded once, as in Hugging Face: 1 + scale would lose most of a small scale
    in 16 bits.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.rms_norm(x.to(wide), 1.0 + self.scale.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last dimension; arXiv:1607.06450.

    The variance is the mean of squares (over n, not n - 1) and eps stands under the root, as in the paper.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.bias, self.eps)


# norm: made with (dim, eps)
NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms_norm": RMSNorm,
    "layer_norm": LayerNorm,
    "gemma_rms_norm": GemmaRMSNorm,
}


class Activation(nn.Module):
    """One of graphs.ops.ACTIVATION_FUNCTIONS, as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ops.ACTIVATION_FUNCTIONS[self.name](x)


# further names of some of graphs.ops.ACTIVATION_FUNCTIONS
ACTIVATION_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


class FeedForward(nn.Module):
    """w2(act(w1(x)) * w3(x)), arXiv:2002.05202 (SwiGLU with SiLU, GeGLU with GELU); without up_proj, w2(act(w1(x))).

    torchtune's interface: w1 is the gate, w2 the down and w3 the up projection.
    """

    def __init__(
        self,
        *,
        gate_proj: nn.Module,
        down_proj: nn.Module,
        up_proj: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.w1 = gate_proj
        self.w2 = down_proj
        self.w3 = up_proj
        self.activation = Activation("silu") if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        if self.w3 is not None:
            h = h * self.w3(x)
        return self.w2(h)


class MoE(Chooser):
    """A router picks num_experts_per_tok experts for each token; Mixtral, arXiv:2401.04088 section 2.1.

    The exported graph computes every expert for every token and weights it, with 0 where it was not picked. So no shape
    depends on the data, and the graph runs on every runtime; it costs num_experts / num_experts_per_tok times the
    arithmetic. Eager PyTorch computes an expert for the tokens that picked it.

    Args:
        experts: all of one kind, with an Activation and without biases.
    """

    def __init__(self, router: nn.Linear, experts: list[FeedForward], config: ExpertsConfig) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        probs = torch.softmax(self.router(x).to(wide), dim=-1)
        best, picked = probs.topk(self.num_experts_per_tok, dim=-1)
        if self.swap_margin:
            picked = self.choose(probs, self.num_experts_per_tok)
            best = probs.gather(-1, picked)
        if self.norm_topk_prob:
            best = best / best.sum(dim=-1, keepdim=True)
        if torch.compiler.is_exporting():
            weights = torch.zeros_like(probs).scatter(-1, picked, best)
            w1, w2, w3 = ([getattr(e, w).weight for e in self.experts if getattr(e, w)] for w in ("w1", "w2", "w3"))
            return ops.experts(x, weights, w1, w2, w3, self.experts[0].activation.name)
        tokens, picked, best = x.flatten(0, -2), picked.flatten(0, -2), best.flatten(0, -2)
        out = torch.zeros_like(tokens, dtype=wide)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(picked == index)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]).to(wide) * best[token, choice].unsqueeze(-1))
        return out.reshape(x.shape).to(x.dtype)


def build_feed_forward(config: DecoderConfig, intermediate_size: int) -> FeedForward:
    """One feed-forward network of the config's kind."""
    hidden, bias = config.hidden_size, config.mlp_bias
    return FeedForward(
        gate_proj=nn.Linear(hidden, intermediate_size, bias=bias),
        down_proj=nn.Linear(intermediate_size, hidden, bias=bias),
        up_proj=nn.Linear(hidden, intermediate_size, bias=bias) if config.gated_mlp else None,
        activation=Activation(config.hidden_act),
    )


def build_mlp(config: DecoderConfig, experts: ExpertsConfig | None) -> nn.Module:
    """A layer's feed-forward network, or its experts."""
    if experts is None:
        return build_feed_forward(config, config.intermediate_size)
    router = nn.Linear(config.hidden_size, experts.num_experts, bias=False)
    networks = [build_feed_forward(config, experts.intermediate_size) for _ in range(experts.num_experts)]
    return MoE(router, networks, experts)
