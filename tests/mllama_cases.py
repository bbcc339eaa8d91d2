"""Small random Llama 3.2 Vision checkpoints of odd sizes, and transformers' own results for them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaVisionConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

VOCAB = 90
IMAGE_TOKEN = VOCAB
MAX_LEN = 48
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "cross_attention_layers": [1, 3],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
VISION: dict[str, Any] = {
    "hidden_size": 40,
    "attention_heads": 5,
    "num_hidden_layers": 4,
    "num_global_layers": 2,
    "intermediate_size": 56,
    "image_size": 24,
    "patch_size": 8,
    "vision_output_dim": 120,
    "intermediate_layers_indices": [2, 0],  # not in order: their numbers lie in each other's place if that is lost
}


def grids(tiles: int) -> list[list[int]]:
    """All aspect ratios of at most so many tiles, as transformers' image processor counts them."""
    return [[rows, columns] for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllamaCase:
    """What a case's config says beyond TEXT and VISION."""

    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    vision: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_model(self, seed: int = 0) -> MllamaForConditionalGeneration:
        """Weights large enough that every part matters: gates far from 0, where they start, and logits of order 1."""
        tiles = self.vision.get("max_num_tiles", 4)
        vision = MllamaVisionConfig(**{**VISION, "supported_aspect_ratios": grids(tiles), **self.vision})
        config = MllamaConfig(
            text_config=MllamaTextConfig(**{**TEXT, **self.text}),
            vision_config=vision,
            image_token_index=IMAGE_TOKEN,
            attn_implementation="eager",
        )
        model = MllamaForConditionalGeneration(config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name and parameter.numel() == 1:
                    parameter.uniform_(0.4, 1.2)
                elif "norm" in name and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                elif "embedding" in name and "patch" not in name:
                    parameter.normal_(0, 0.5)
                else:
                    parameter.normal_(0, 0.1 if parameter.dim() == 4 else parameter.shape[-1] ** -0.5)
        return model


CASES: dict[str, MllamaCase] = {
    "4 tiles": MllamaCase(),
    "3 tiles, cross attention first and last, one key/value head": MllamaCase(
        text={"num_hidden_layers": 4, "cross_attention_layers": [3, 0], "num_key_value_heads": 1},
        vision={"max_num_tiles": 3, "image_size": 28, "attention_heads": 2, "num_global_layers": 1},
    ),
    "2 tiles, cross attention twice in succession, wide heads": MllamaCase(
        text={
            "hidden_size": 60,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "cross_attention_layers": [1, 2],
            "rms_norm_eps": 0.02,
        },
        vision={"max_num_tiles": 2, "norm_eps": 0.01, "intermediate_layers_indices": [1], "vision_output_dim": 80},
    ),
    "1 tile": MllamaCase(text={"num_hidden_layers": 2, "cross_attention_layers": [1]}, vision={"max_num_tiles": 1}),
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A batch of prompts with pictures, as transformers' processor makes it: rows of two pictures, one, and none."""

    prompts: list[list[int]]
    pixel_values: Tensor  # [B, I, T, C, H, W]
    aspect_ratio_ids: Tensor  # [B, I]
    aspect_ratio_mask: Tensor  # [B, I, T]
    cross_attention_mask: Tensor  # [B, S, I, T]: 1 where a token sees a tile, else 0

    def row(self, row: int) -> dict[str, Tensor]:
        """The row's pictures alone; empty where it has none."""
        count = int((self.aspect_ratio_ids[row] > 0).sum())
        if not count:
            return {}
        return {
            "pixel_values": self.pixel_values[row : row + 1, :count],
            "aspect_ratio_ids": self.aspect_ratio_ids[row : row + 1, :count],
            "aspect_ratio_mask": self.aspect_ratio_mask[row : row + 1, :count],
            "cross_attention_mask": self.cross_attention_mask[row : row + 1, : len(self.prompts[row]), :count],
        }

    def sight(self) -> np.ndarray:
        """cross_attention_mask with padding pictures, and the pictures of rows that have none, hidden (-1)."""
        mask = self.cross_attention_mask.numpy().copy()
        mask[np.repeat((self.aspect_ratio_ids == 0).numpy()[:, None], mask.shape[1], axis=1)] = -1
        return mask


# (text before the first picture, text after each picture); ragged, and text before a picture sees nothing
LAYOUTS: list[tuple[int, list[int]]] = [(2, [4, 5]), (0, [3]), (9, [])]


def show(model: MllamaForConditionalGeneration, seed: int = 1) -> Shown:
    """Random pictures of 1 to max_num_tiles tiles, in prompts of LAYOUTS."""
    vision = model.config.vision_config
    tiles, rng = vision.max_num_tiles, np.random.default_rng(seed)
    prompts, spans = [], []
    for before, after in LAYOUTS:
        prompt = [1, *rng.integers(3, VOCAB, before).tolist()] if before else []
        starts = []
        for length in after:
            starts.append(len(prompt))
            prompt += [IMAGE_TOKEN, *rng.integers(3, VOCAB, length).tolist()]
        prompts.append(prompt)
        spans.append([*starts, len(prompt)])
    images, longest = max(len(after) for _, after in LAYOUTS), max(map(len, prompts))
    shape = (len(prompts), images, tiles)
    pixels = torch.zeros((*shape, 3, vision.image_size, vision.image_size))
    ids, mask = torch.zeros(shape[:2], dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    mask[..., 0] = 1
    sight = torch.zeros((len(prompts), longest, images, tiles), dtype=torch.int64)
    for row, (_, after) in enumerate(LAYOUTS):
        for image in range(len(after)):
            ratio = len(vision.supported_aspect_ratios) - 1 - (row + 2 * image) % len(vision.supported_aspect_ratios)
            rows, columns = vision.supported_aspect_ratios[ratio]
            count = rows * columns
            ids[row, image] = ratio + 1
            mask[row, image, :count] = 1
            pixels[row, image, :count] = torch.from_numpy(
                rng.standard_normal((count, *pixels.shape[3:])).astype(np.float32)
            )
            sight[row, spans[row][image] : spans[row][image + 1], image, :count] = 1
    return Shown(prompts, pixels, ids, mask, sight)


def cached_logits(model: MllamaForConditionalGeneration, shown: Shown, row: int, forced: Sequence[int]) -> Tensor:
    """[1 + steps, V]: transformers alone on one row, after its prompt and after each forced token, with its cache.

    Without it where the first layer is cross attention: transformers' cache then counts vision tokens instead of text.
    """
    pictures, prompt = shown.row(row), shown.prompts[row]
    with torch.no_grad():
        if 0 in model.config.text_config.cross_attention_layers:
            if pictures:
                mask = pictures["cross_attention_mask"]
                pictures["cross_attention_mask"] = torch.cat([mask] + [mask[:, -1:]] * len(forced), dim=1)
            return model(torch.tensor([[*prompt, *forced]]), **pictures).logits[0, len(prompt) - 1 :]
        out = model(torch.tensor([shown.prompts[row]]), **pictures, use_cache=True)
        logits = [out.logits[0, -1]]
        last = {"cross_attention_mask": pictures["cross_attention_mask"][:, -1:]} if pictures else {}
        for token in forced:
            out = model(torch.tensor([[token]]), **last, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


def save(model: MllamaForConditionalGeneration, folder: Path) -> Path:
    """The checkpoint as transformers writes it."""
    model.save_pretrained(folder)
    return folder
