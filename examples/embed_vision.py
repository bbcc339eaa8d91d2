"""Pictures and questions in a program of one's own: numpy, Pillow, onnxruntime and tokenizers, no torch.

    python examples/embed_vision.py ARTIFACT "<|image|>how many squares?" examples/tiny_vision/picture.png

The vision encoder runs once; its keys and values stay where they are while the answer is decoded, token by token.
"""

import sys

import numpy as np

from runtimes.artifact import open_artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.generation import read_stop_ids
from runtimes.images import ImageProcessor
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer


def main(folder: str, text: str, pictures: list[str], max_new_tokens: int = 32) -> None:
    """Print the greedy continuation of the text, whose every <|image|> stands for one of the pictures."""
    artifact = open_artifact(folder)  # checks the SHA-256 of every file
    tokenizer = Tokenizer(artifact.folder)
    stop_ids = read_stop_ids(artifact.folder)
    prompt = tokenizer.encode(text)
    # pixels, tiles, and which token sees which tile; rows of a batch may have any number of pictures
    images = ImageProcessor.of(artifact).batch([prompt], [pictures])
    ids: list[int] = []
    with open_runner(artifact) as runner:
        decoding = Decoding(runner)
        logits = decoding.prefill([prompt], images)
        while len(ids) < max_new_tokens:
            token = int(np.argmax(logits[0]))  # float32 [rows, vocab_size]: any sampling goes here
            if token in stop_ids:
                break
            ids.append(token)
            logits = decoding.decode(np.array([token]))
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    try:
        if len(sys.argv) < 3:
            raise FeedError("expected an artifact, a text and its pictures: embed_vision.py ARTIFACT TEXT PICTURE...")
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (ArtifactError, FeedError, RuntimeMissingError) as error:
        print(f"embed: {error}", file=sys.stderr)
        sys.exit(2)
