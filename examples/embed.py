"""An artifact in a program of one's own: numpy, onnxruntime and tokenizers, no torch.

    python examples/embed.py ARTIFACT "27+58=" "reverse planet="

The prompts are decoded as one ragged batch, token by token, so that the loop can be changed to one's liking.
"""

import sys

import numpy as np

from runtimes.artifact import open_artifact
from runtimes.decoding import Decoding
from runtimes.generation import read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer


def main(folder: str, texts: list[str], max_new_tokens: int = 32) -> None:
    """Print the greedy continuation of each text."""
    artifact = open_artifact(folder)  # checks the SHA-256 of every file
    tokenizer = Tokenizer(artifact.folder)
    stop_ids = read_stop_ids(artifact.folder)
    outputs: list[list[int]] = [[] for _ in texts]
    active = np.ones(len(texts), bool)
    with open_runner(artifact) as runner:
        decoding = Decoding(runner)
        logits = decoding.prefill([tokenizer.encode(text) for text in texts])
        for _ in range(max_new_tokens):
            tokens = logits.argmax(axis=-1)  # float32 [rows, vocab_size]: any sampling goes here
            active &= ~np.isin(tokens, stop_ids)
            if not active.any():
                break
            for row in np.flatnonzero(active):
                outputs[row].append(int(tokens[row]))
            logits = decoding.decode(tokens, active)
    for text, ids in zip(texts, outputs, strict=True):
        print(text + tokenizer.decode(ids))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
