"""A client of Triton Inference Server, for models that `export-llm package` wrote: numpy, tritonclient, tokenizers.

    python examples/triton_client.py ARTIFACT "27+58=" "reverse planet=" --model demo --url localhost:8001

ARTIFACT lends its tokenizer. The cache stays in the server: each text is a Triton sequence, whose first request brings
the prompt and whose others bring one token each. The last one says so, which frees the cache for another text.
"""

import argparse
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from runtimes.tokenizer import Tokenizer

# Triton batches requests of equal shapes. A fixed cache may be masked further than it is filled, so that texts of
# different lengths have masks of equal length now and then.
MASK_STEP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a client needs to know; all of it is in the model's configuration."""

    name: str
    inputs: tuple[str, ...]
    max_len: int
    stop_ids: frozenset[int]
    empty_slots: int  # at the front of a cache that grows: they hold nothing, and are masked
    mask_step: int


def describe(client: triton.InferenceServerClient, name: str) -> Model:
    """Ask the server for the model's configuration."""
    config = client.get_model_config(name).config
    texts = {key: value.string_value for key, value in config.parameters.items()}
    return Model(
        name=name,
        inputs=tuple(each.name for each in config.input),
        max_len=int(texts["max_len"]),
        stop_ids=frozenset(int(number) for number in texts["stop_ids"].split(",") if number),
        empty_slots=int(texts["empty_slots"]),
        mask_step=MASK_STEP if texts["layout"] == "portable" else 1,
    )


def step_arrays(model: Model, tokens: Sequence[int], length: int) -> dict[str, np.ndarray]:
    """The inputs of a request that appends `tokens` to a text of `length` tokens, as a batch of one row."""
    count = len(tokens)
    seen = model.empty_slots + length + count
    mask = np.zeros((1, min(-(-seen // model.mask_step) * model.mask_step, model.empty_slots + model.max_len)))
    mask[:, model.empty_slots : seen] = 1
    known = {
        "input_ids": [tokens],
        "position_ids": [range(length, length + count)],
        "write_indices": [[length]],
        "attention_mask": mask,
        "logit_indices": [[count - 1]],
    }
    if unknown := set(model.inputs) - set(known):
        raise SystemExit(
            f"{model.name} takes {', '.join(sorted(unknown))}: this client is for models that read text only"
        )
    return {name: np.asarray(known[name], np.int64) for name in model.inputs}


def request(
    client: triton.InferenceServerClient,
    model: Model,
    arrays: Mapping[str, np.ndarray],
    sequence_id: int,
    *,
    start: bool,
    end: bool,
) -> np.ndarray:
    """One request of a sequence; the logits after its last token, float32 [vocab_size]."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    answer = client.infer(
        model.name,
        inputs,
        outputs=[triton.InferRequestedOutput("logits")],
        sequence_id=sequence_id,
        sequence_start=start,
        sequence_end=end,
    )
    return answer.as_numpy("logits")[0, -1]


def generate(
    client: triton.InferenceServerClient, model: Model, prompt: Sequence[int], max_new_tokens: int = 32
) -> list[int]:
    """The greedy continuation of a prompt, up to a stop id."""
    budget = min(max_new_tokens, model.max_len - len(prompt) + 1)  # the last token is never written
    if not prompt or budget < 1:
        raise SystemExit(f"the prompt has {len(prompt)} tokens; {model.name} holds 1 to {model.max_len}")
    sequence_id = secrets.randbits(63) | 1  # 0 means no sequence
    made: list[int] = []
    tokens, length = list(prompt), 0
    while True:
        last = len(made) + 1 == budget
        arrays = step_arrays(model, tokens, length)
        logits = request(client, model, arrays, sequence_id, start=length == 0, end=last)
        length += len(tokens)
        tokens = [int(logits.argmax())]  # any sampling goes here
        made += tokens
        if last:
            return made
        if tokens[0] in model.stop_ids:  # frees the cache now rather than after the server's idle timeout
            request(client, model, step_arrays(model, tokens, length), sequence_id, start=False, end=True)
            return made


def main() -> None:
    """Print the greedy continuation of each text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.artifact)
    with triton.InferenceServerClient(args.url) as client:
        model = describe(client, args.model)
        for text in args.texts:
            print(text + tokenizer.decode(generate(client, model, tokenizer.encode(text), args.max_new_tokens)))


if __name__ == "__main__":
    main()
