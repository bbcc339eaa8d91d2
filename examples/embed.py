"""An artifact in a program of one's own: numpy, onnxruntime and tokenizers, no torch.

    python examples/embed.py ARTIFACT "27+58=" "reverse planet=" [--max-new-tokens 32]

The prompts are decoded as one ragged batch, token by token, so that the loop can be changed to one's liking.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from runtimes.artifact import open_artifact
from runtimes.decoding import Decoding, limit_new_tokens
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.generation import read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer


def decode_greedily(
    decoding: Decoding, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The new token ids of each row, up to its stop id."""
    outputs: list[list[int]] = [[] for _ in prompts]
    active = np.ones(len(prompts), bool)
    logits = decoding.prefill(prompts)
    for step in range(1, max_new_tokens + 1):
        tokens = logits.argmax(axis=-1)  # float32 [rows, vocab_size]: any sampling goes here
        active &= ~np.isin(tokens, stop_ids)
        for row in np.flatnonzero(active):
            outputs[row].append(int(tokens[row]))
        if not active.any() or step == max_new_tokens:
            break
        logits = decoding.decode(tokens, active)
    return outputs


def main(folder: str, texts: list[str], max_new_tokens: int) -> None:
    """Print each text with its greedy continuation."""
    artifact = open_artifact(folder)  # checks the SHA-256 of every file
    tokenizer = Tokenizer(artifact.folder)
    prompts = [tokenizer.encode(text) for text in texts]
    with open_runner(artifact) as runner:
        limit_new_tokens(runner.cache_spec.max_len, prompts, max_new_tokens)  # refuses what the cache cannot hold
        outputs = decode_greedily(Decoding(runner), prompts, read_stop_ids(artifact.folder), max_new_tokens)
    for prompt, ids in zip(prompts, outputs, strict=True):
        print(tokenizer.decode([*prompt, *ids]))  # as one: alone, a word at the start would lose its space


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("texts", nargs="+", metavar="text")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        main(arguments.artifact, arguments.texts, arguments.max_new_tokens)
    except (ArtifactError, FeedError, RuntimeMissingError) as error:
        print(f"embed: {error}", file=sys.stderr)
        sys.exit(2)
