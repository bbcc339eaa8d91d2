"""Make the tiny Llama of this folder: its tokenizer, its trained weights and its score on held-out problems.

python examples/tiny_llama/train.py -o OUT              train, write a Hugging Face checkpoint to OUT, score it
python examples/tiny_llama/train.py --score CHECKPOINT  score a checkpoint only
"""

import argparse
import json
import math
import string
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
UNK_ID, BOS_ID, EOS_ID = range(3)
# Printable ASCII in code order, then the two control characters that plain text has.
VOCAB = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *map(chr, range(0x20, 0x7F)), "\n", "\t"))}
assert set(string.ascii_letters + string.digits + string.punctuation + " \n\t") <= set(VOCAB)

# The key style that most Llama checkpoints carry; transformers 5 would write rope_parameters and dtype instead.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.04,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": len(VOCAB),
}
GENERATION_CONFIG = {"bos_token_id": BOS_ID, "do_sample": False, "eos_token_id": EOS_ID}
SPECIAL_TOKENS_MAP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = {
    **SPECIAL_TOKENS_MAP,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}

ROWS_PER_TASK = 64  # in one step
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
IGNORE = -100  # the label that LlamaForCausalLM's loss passes over


def write_json(path: Path, data: dict) -> None:
    """Write `data` to `path` as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a character-level tokenizer: encode() prepends <s>, and decode(encode(text)) is the text again."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    # BPE without merges is one token per character, spaces included, and needs no pre-tokenizer.
    tokenizer = Tokenizer(models.BPE(vocab=VOCAB, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS_ID)]
    )
    tokenizer.decoder = decoders.Fuse()  # without a decoder, tokens would be joined by spaces
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS_MAP)


def batches(*, seed: int) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Yield (input_ids, labels), each [rows, tokens]: one problem per row, and a loss on its answer and </s> alone.

    Rows start with <s>, as at inference, and are padded on the right: a causal model needs no mask for that.
    Each task has its own batch, in turn, because padding a short sum to the length of a long word wastes time.
    """
    import torch

    streams = [tasks.training_problems(task, seed=seed) for task in tasks.TASKS]
    while True:
        for stream in streams:
            rows, labels = [], []
            for problem in islice(stream, ROWS_PER_TASK):
                prompt_ids = [BOS_ID, *(VOCAB[char] for char in problem.prompt)]
                answer_ids = [*(VOCAB[char] for char in problem.answer), EOS_ID]
                rows.append(prompt_ids + answer_ids)
                labels.append([IGNORE] * len(prompt_ids) + answer_ids)
            width = max(map(len, rows))
            yield (
                torch.tensor([row + [EOS_ID] * (width - len(row)) for row in rows]),
                torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]),
            )


def train(config: "LlamaConfig", *, steps: int, seed: int) -> "LlamaForCausalLM":
    """Return a model trained for `steps` steps of one batch per task: AdamW, linear warm-up, cosine to zero."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    stream, start_s = batches(seed=seed), time.perf_counter()
    for step in range(1, steps + 1):
        losses = {}
        for task in tasks.TASKS:
            input_ids, labels = next(stream)
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
            losses[task] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            shown = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
            print(f"step {step}/{steps}  {time.perf_counter() - start_s:.0f} s  loss: {shown}", flush=True)
    return model.eval()


def write_weights(model: "LlamaForCausalLM", folder: Path) -> None:
    """Write model.safetensors in float32; the tied lm_head is left out, as transformers does."""
    from safetensors.torch import save_file

    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def score_checkpoint(folder: Path) -> dict[str, float]:
    """Load a checkpoint with transformers and return its held-out exact-match accuracy per task, decoding greedily."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)

    def answer(prompts: list[str]) -> list[str]:
        same_length = defaultdict(list)  # prompts of one length make a batch without padding
        for prompt in prompts:
            same_length[len(prompt)].append(prompt)
        completions = {}
        for group in same_length.values():
            prompt_ids = tokenizer(group, return_tensors="pt").input_ids
            ids = model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=False,
                max_new_tokens=tasks.MAX_ANSWER_CHARS + 1,
                pad_token_id=EOS_ID,
            )
            texts = tokenizer.batch_decode(ids[:, prompt_ids.shape[1] :], skip_special_tokens=True)
            completions.update(zip(group, texts, strict=True))
        return [completions[prompt] for prompt in prompts]

    return tasks.score(answer)


def main() -> None:
    """Train a checkpoint and score it, or score one only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("-o", "--out", type=Path, help="folder to write the checkpoint to")
    action.add_argument("--score", type=Path, metavar="CHECKPOINT", help="score this checkpoint; train nothing")
    parser.add_argument("--steps", type=int, default=2500, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the text (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.score is not None and not (args.score / "config.json").is_file():
        parser.error(f"--score {args.score}: expected a folder with a config.json; make one with -o OUT")

    import torch
    from transformers import AutoConfig

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(args.out)
        write_json(args.out / "config.json", CONFIG)
        write_json(args.out / "generation_config.json", GENERATION_CONFIG)
        # The config is read back, so that what is trained is what the file says.
        write_weights(train(AutoConfig.from_pretrained(args.out), steps=args.steps, seed=args.seed), args.out)
    for task, accuracy in score_checkpoint(args.out or args.score).items():
        print(f"{task:8}{accuracy:7.1%} of {tasks.MAX_PROBLEMS} held-out problems")


if __name__ == "__main__":
    main()
