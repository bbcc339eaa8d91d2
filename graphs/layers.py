"""The small layers of a Llama block, with torchtune's parameter names."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension; arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale, self.eps)


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202: w2(silu(w1(x)) * w3(x)); w1 is the gate, w2 the down and w3 the up projection."""

    def __init__(self, *, gate_proj: nn.Module, down_proj: nn.Module, up_proj: nn.Module) -> None:
        super().__init__()
        self.w1 = gate_proj
        self.w2 = down_proj
        self.w3 = up_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
