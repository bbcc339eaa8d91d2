"""Prompts with pictures for every runner of a model that sees; needs Pillow."""

import numpy as np
import pytest

from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.images import ImageBatch, ImageProcessor
from runtimes.runner import Runner
from runtimes.tokenizer import Tokenizer

QUESTIONS = ["<|image|>how many circles?", "<|image|><|image|>which shape is red?", "how many circles?"]
SIZES = [[(60, 60)], [(40, 150), (200, 100)], []]


def asked(artifact: Artifact, rows: int = 3, seed: int = 0) -> tuple[list[list[int]], ImageBatch]:
    """Prompts, and random pictures for them: one, two, none."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(seed)
    prompts = [Tokenizer(artifact.folder).encode(text) for text in QUESTIONS[:rows]]
    pictures = [
        [image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
        for sizes in SIZES[:rows]
    ]
    images = ImageProcessor.of(artifact).batch(prompts, pictures)
    assert images is not None
    return prompts, images


def steps(runner: Runner, prompts: list[list[int]], images: ImageBatch | None, count: int = 6) -> np.ndarray:
    """[1 + count, B, V]: logits after the prompts, and after each of some tokens."""
    decoding = Decoding(runner)
    logits = [decoding.prefill(prompts, images)]
    logits += [decoding.decode(np.arange(len(prompts)) + 5 + step) for step in range(count)]
    return np.stack(logits)
