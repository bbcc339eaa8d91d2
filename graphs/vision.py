"""The vision encoder of Llama 3.2 Vision: pixels of tiles in, keys and values of the cross-attention layers out.

arXiv:2407.21783 section 7.1; parameter names are Hugging Face's (Mllama). A picture is cut into at most max_num_tiles
square tiles, each a grid of patches and a class token. A local transformer over all tiles of a picture is followed by a
gated global one; its result, and those of some local layers, make the vision tokens.

Letters in shapes: B batch, I images of a row, N = B * I, T tiles of an image, P vision tokens of a tile, L tokens of a
picture in the transformers, E width of the encoder.
"""

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.attention.cross import CrossAttention
from graphs.config import VisionConfig
from graphs.layers import Activation

PATCH_MULTIPLE = 8  # the tokens of a tile are padded to a multiple of this, and the padding is attended to


class VisionAttention(nn.Module):
    """Attention of every token of a picture to every other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x: Tensor, mask_N1LL: Tensor) -> Tensor:
        q, k, v = (ops.split_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(ops.merge_heads(ops.attention(q, k, v, mask_N1LL, self.head_dim**-0.5)))


class VisionMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = Activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    """A pre-norm transformer layer; a gated one multiplies its two results by tanh of a number each."""

    def __init__(self, config: VisionConfig, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)
        if gated:
            self.gate_attn = nn.Parameter(torch.ones(1))
            self.gate_ffn = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, mask_N1LL: Tensor) -> Tensor:
        attn = self.self_attn(self.input_layernorm(x), mask_N1LL)
        x = x + (torch.tanh(self.gate_attn) * attn if self.gated else attn)
        mlp = self.mlp(self.post_attention_layernorm(x))
        return x + (torch.tanh(self.gate_ffn) * mlp if self.gated else mlp)


class VisionTransformer(nn.Module):
    """Layers one after the other."""

    def __init__(self, config: VisionConfig, layers: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated=gated) for _ in range(layers))

    def forward(self, x: Tensor, mask_N1LL: Tensor) -> list[Tensor]:
        """What each layer returns, [N, L, E] each; x itself where there is no layer."""
        results = []
        for layer in self.layers:
            x = layer(x, mask_N1LL)
            results.append(x)
        return results or [x]


class TileEmbedding(nn.Module):
    """A vector for each tile of each aspect ratio, gated."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_NTPE: Tensor, aspect_ratio_ids_N: Tensor) -> Tensor:
        _, tiles, _, width = x_NTPE.shape
        return x_NTPE + self.embedding(aspect_ratio_ids_N).reshape(-1, tiles, 1, width) * torch.tanh(self.gate)


class PositionEmbedding(nn.Module):
    """A vector for each token of a tile, mixed by a gate with one for each token of each tile of each aspect ratio."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.num_patches * config.hidden_size
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(config.max_aspect_ratio_id + 1, config.max_num_tiles * size)

    def forward(self, x_NTPE: Tensor, aspect_ratio_ids_N: Tensor) -> Tensor:
        gate = torch.tanh(self.gate)
        of_tiles = self.tile_embedding(aspect_ratio_ids_N).reshape(-1, *x_NTPE.shape[1:])
        return x_NTPE + (1 - gate) * self.embedding + gate * of_tiles


class VisionModel(nn.Module):
    """Pixels to vision tokens, before the projector."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)  # its eps is LayerNorm's own, not norm_eps
        self.layernorm_post = nn.LayerNorm(width)
        self.transformer = VisionTransformer(config, config.num_hidden_layers, gated=False)
        self.global_transformer = VisionTransformer(config, config.num_global_layers, gated=True)

    def forward(self, pixel_values: Tensor, aspect_ratio_ids_N: Tensor, aspect_ratio_mask_NT: Tensor) -> Tensor:
        """[N, T, C, H, W] -> [N, T, P, output_dim] for T up to max_num_tiles.

        The transformers always see max_num_tiles tiles: tokens of real tiles attend to those of padding tiles, so
        leaving these out would change the result. In the end only the first T are returned.
        """
        config = self.config
        images, tiles = pixel_values.shape[:2]
        patches = self.patch_embedding(pixel_values.flatten(0, 1).to(self.class_embedding.dtype))
        x_NTPE = patches.flatten(2).transpose(1, 2).reshape(images, tiles, config.num_patches - 1, -1)
        x_NTPE = _pad_tiles(x_NTPE, config.max_num_tiles)  # patches of a black tile are zero: there is no bias
        x_NTPE = self.pre_tile_positional_embedding(x_NTPE, aspect_ratio_ids_N)
        class_token = self.class_embedding.expand(*x_NTPE.shape[:2], 1, -1)
        x_NTPE = torch.cat((class_token, x_NTPE), dim=2)
        x_NTPE = self.layernorm_pre(self.gated_positional_embedding(x_NTPE, aspect_ratio_ids_N))
        padded = -(-config.num_patches // PATCH_MULTIPLE) * PATCH_MULTIPLE
        # not F.pad: ONNX Runtime pads no bfloat16 on a GPU
        nothing = x_NTPE.new_zeros((images, config.max_num_tiles, padded - config.num_patches, x_NTPE.shape[-1]))
        x_NTPE = torch.cat((x_NTPE, nothing), dim=2)

        mask = self._mask(_pad_tiles(aspect_ratio_mask_NT, config.max_num_tiles), padded)
        of_layers = self.transformer(x_NTPE.flatten(1, 2), mask)
        tile_shape = (config.max_num_tiles, padded)
        x_NTPE = self.layernorm_post(of_layers[-1]).unflatten(1, tile_shape)
        x_NTPE = self.post_tile_positional_embedding(x_NTPE, aspect_ratio_ids_N)
        x_NTPE = self.global_transformer(x_NTPE.flatten(1, 2), mask)[-1].unflatten(1, tile_shape)

        of_layers = [of_layers[index].unflatten(1, tile_shape) for index in config.intermediate_layers_indices]
        # the intermediate results lie number by number beside each other, behind the final one
        together = torch.cat((x_NTPE, torch.stack(of_layers, dim=-1).flatten(-2)), dim=-1)
        # a slice would let tracing conclude that there are as many tiles as in the example
        first = torch.arange(tiles, device=together.device)
        return together[:, :, : config.num_patches].index_select(1, first)

    def _mask(self, aspect_ratio_mask_NT: Tensor, padded: int) -> Tensor:
        """bool [N, 1, L, L]: all but padding to padding. Real tokens attend to padding, as they were trained to."""
        in_tile = torch.arange(padded, device=aspect_ratio_mask_NT.device) < self.config.num_patches
        real_NL = ((aspect_ratio_mask_NT != 0).unsqueeze(-1) & in_tile).flatten(1)
        return (real_NL.unsqueeze(-1) | real_NL.unsqueeze(-2)).unsqueeze(1)


def _pad_tiles(x_NT: Tensor, tiles: int) -> Tensor:
    """[N, T, ..] -> [N, tiles, ..] with zeros; of operators whose result has a constant size for any T."""
    zeros = x_NT.new_zeros((x_NT.shape[0], tiles, *x_NT.shape[2:]))
    return torch.cat((x_NT, zeros), dim=1)[:, :tiles]


class VisionEncoder(nn.Module):
    """Everything that is computed once per image.

    Args:
        hidden_size: width of the decoder.
        cross: the decoder's cross-attention, layer by layer; of each, what makes keys and values is used.
    """

    def __init__(self, config: VisionConfig, hidden_size: int, cross: list[CrossAttention]) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.multi_modal_projector = nn.Linear(config.output_dim, hidden_size)
        self.cross = nn.ModuleList(cross)

    def vision_tokens(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        """[B, I * T * P, hidden_size]: what TransformerDecoder.forward takes as encoder_input.

        Args:
            pixel_values: [B, I, T, C, H, W], T up to max_num_tiles.
            aspect_ratio_ids: int64 [B, I], 0 for no image.
            aspect_ratio_mask: int64 [B, I, T], 1 for real tiles; an image has one at least.
        """
        tokens = self.vision_model(
            pixel_values.flatten(0, 1), aspect_ratio_ids.flatten(), aspect_ratio_mask.flatten(0, 1)
        )
        tokens = self.multi_modal_projector(tokens)
        return tokens.reshape(pixel_values.shape[0], -1, tokens.shape[-1])

    def forward(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Per cross-attention layer (key, value), each [B, K, I * T * P, D]; arguments as of vision_tokens."""
        tokens = self.vision_tokens(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        return [attention.keys_values(tokens) for attention in self.cross]
