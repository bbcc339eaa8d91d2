"""Scales of channels that can be moved from a linear's inputs into what computes them, without changing the layer.

diag(s) after an operation and diag(1 / s) before the linear cancel: the linear's columns are multiplied by s, and the
operation's outputs divided by it. AWQ, arXiv:2306.00978 section 3.2; which pairs there are follows from the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from exporter.quantizers.streaming import StreamedLayer
from graphs.attention.attention_free import AttentionFree
from graphs.attention.causal import CausalSelfAttention
from graphs.layers import FeedForward, GemmaRMSNorm, MoE
from graphs.transformer import TransformerDecoderLayer


@dataclass(frozen=True, kw_only=True)
class Fold:
    """An operation whose outputs are read by linears, and by nothing else."""

    source: str  # the norm or linear that computes the outputs, by name within the layer
    readers: tuple[str, ...]  # linears; the first of them reads all that the source computes
    # what joins the statistics of the readers' inputs to those of the source's outputs, and what spreads a scale of the
    # source's outputs over the readers' inputs
    gather: Callable[[Tensor], Tensor] = lambda inputs: inputs
    spread: Callable[[Tensor], Tensor] = lambda outputs: outputs


def folds(layer: nn.Module) -> list[Fold]:
    """All that a decoder layer allows; none for layers of other kinds."""
    if not isinstance(layer, TransformerDecoderLayer):
        return []
    found = []
    if isinstance(layer.attn, CausalSelfAttention | AttentionFree):
        found.append(Fold(source="sa_norm", readers=("attn.q_proj", "attn.k_proj", "attn.v_proj")))
    if isinstance(layer.attn, CausalSelfAttention):  # its result is linear in v, head by head
        found.append(_of_values(layer.attn))
    if isinstance(layer.mlp, FeedForward):
        networks = {"mlp": layer.mlp}
    elif isinstance(layer.mlp, MoE):
        networks = {f"mlp.experts.{index}": expert for index, expert in enumerate(layer.mlp.experts)}
    else:
        return found
    router = ("mlp.router",) if isinstance(layer.mlp, MoE) else ()
    first = [f"{name}.{leaf}" for name, net in networks.items() for leaf in ("w1", "w3") if getattr(net, leaf)]
    found.append(Fold(source="mlp_norm", readers=(*router, *first)))
    found += [Fold(source=f"{name}.w3", readers=(f"{name}.w2",)) for name, net in networks.items() if net.w3]
    return found


def _of_values(attn: CausalSelfAttention) -> Fold:
    """Query heads that share a value head share its channels' scales."""
    group, dim = attn.num_heads // attn.num_kv_heads, attn.head_dim

    def gather(inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, group, dim).mean(dim=1).flatten()

    def spread(outputs: Tensor) -> Tensor:
        return outputs.reshape(-1, 1, dim).expand(-1, group, -1).flatten()

    return Fold(source="attn.v_proj", readers=("attn.output_proj",), gather=gather, spread=spread)


def apply(layer: StreamedLayer, fold: Fold, scale: Tensor) -> None:
    """Divide the source's outputs by `scale`, and multiply the readers' columns."""
    source = layer.module.get_submodule(fold.source)
    if isinstance(source, nn.Linear):
        layer.change(f"{fold.source}.weight", source.weight / scale[:, None])
    elif isinstance(source, GemmaRMSNorm):
        layer.change(f"{fold.source}.scale", (1.0 + source.scale) / scale - 1.0)
    else:
        layer.change(f"{fold.source}.scale", source.scale / scale)
    if getattr(source, "bias", None) is not None:
        layer.change(f"{fold.source}.bias", source.bias / scale)
    columns = fold.spread(scale)
    for reader in fold.readers:
        layer.change(f"{reader}.weight", layer.linear(reader).weight * columns)
