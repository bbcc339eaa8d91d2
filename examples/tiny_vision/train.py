"""Make the tiny Llama Vision of this folder: its tokenizer, its trained weights and its score on held-out problems.

python examples/tiny_vision/train.py -o OUT              train, write a Hugging Face checkpoint to OUT, score it
python examples/tiny_vision/train.py --score CHECKPOINT  score a checkpoint only
"""

import argparse
import json
import math
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0, 1, 2, 3
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
PIECE = r" ?[a-z]+|[^a-z]"  # what the text is cut into: a word with the space before it, or one other character
WORDS = sorted(
    {
        word
        for texts in (*tasks.QUESTIONS.values(), *tasks.ANSWERS.values())
        for text in texts
        for word in re.findall(PIECE, text)
        if len(word) > 1
    }
)
# Printable ASCII in code order, the two control characters that plain text has, and each word that the tasks use.
VOCAB = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *map(chr, range(0x20, 0x7F)), "\n", "\t", *WORDS))}
IMAGE_ID = len(
    VOCAB
)  # as in Llama 3.2 Vision: the first of the eight rows that the embedding has and the output has not

TILES = 4
VISION_HIDDEN = 64
# The key style of the Llama 3.2 Vision checkpoints; transformers 5 would write rope_parameters and dtype instead.
CONFIG = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": IMAGE_ID,
    "model_type": "mllama",
    "text_config": {
        "bos_token_id": BOS_ID,
        "cross_attention_layers": [1, 3],
        "dropout": 0,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.06,
        "intermediate_size": 192,
        "max_position_embeddings": 128,
        "model_type": "mllama_text_model",
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(VOCAB),
    },
    "torch_dtype": "float32",
    "vision_config": {
        "attention_heads": 4,
        "hidden_act": "gelu",
        "hidden_size": VISION_HIDDEN,
        "image_size": tasks.TILE_PIXELS,
        "initializer_range": 0.06,
        "intermediate_layers_indices": [0, 1],
        "intermediate_size": 192,
        "max_num_tiles": TILES,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 1,
        "num_hidden_layers": 3,
        "patch_size": 12,
        "supported_aspect_ratios": [list(ratio) for ratio in tasks.TILE_ROWS_COLUMNS],
        "torch_dtype": "float32",
        "vision_output_dim": 3 * VISION_HIDDEN,  # of the last layer and of each of the intermediate ones
    },
}
GENERATION_CONFIG = {"bos_token_id": BOS_ID, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
SPECIAL_TOKENS_MAP = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = {
    **SPECIAL_TOKENS_MAP,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}

PICTURES = 64  # in one step, with a question of each task about every one
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
FIRST_GATE = 0.7  # at zero, where transformers starts it, a gate lets nothing of the picture through
IGNORE = -100  # the label that the loss passes over


def write_json(path: Path, data: dict) -> None:
    """Write `data` to `path` as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words and characters: encode() prepends <s>, and decode(encode(text)) is the text again."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    # As in Llama 3, a piece that is in the vocabulary is one token, with no merges needed; without merges, any other
    # piece is one token per character.
    tokenizer = Tokenizer(models.BPE(vocab=VOCAB, merges=[], unk_token="<unk>", ignore_merges=True))
    special = (*SPECIAL_TOKENS, tasks.IMAGE_TOKEN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert tokenizer.token_to_id(tasks.IMAGE_TOKEN) == IMAGE_ID
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS_ID)]
    )
    tokenizer.decoder = decoders.Fuse()  # without a decoder, tokens would be joined by spaces
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS_MAP)


def write_image_processor(folder: Path) -> None:
    """Write preprocessor_config.json: tiles of the vision encoder's size, four at most, and pixels from -1 to 1."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    size = {"height": tasks.TILE_PIXELS, "width": tasks.TILE_PIXELS}
    MllamaImageProcessorPil(size=size, max_image_tiles=TILES).save_pretrained(folder)


def encode(text: str) -> list[int]:
    """Return the ids of a text of the tasks, an image token in front of it or not, without <s>."""
    question = text.removeprefix(tasks.IMAGE_TOKEN)
    return [IMAGE_ID] * (question != text) + [VOCAB[piece] for piece in re.findall(PIECE, question)]


def image_inputs(processor: "MllamaImageProcessorPil", pictures: list) -> tuple[dict[str, "Tensor"], list[list[int]]]:
    """Return what the vision model takes, one picture to a row, and the number of tiles of each."""
    inputs = processor([[picture] for picture in pictures], return_tensors="pt")
    tiles = inputs.pop("num_tiles")
    return dict(inputs), tiles


def cross_attention_mask(rows: list[list[int]], tiles: list[list[int]]) -> "Tensor":
    """Return [rows, tokens, 1, TILES]: from the image token on, text sees the tiles that its picture has."""
    import torch
    from transformers.models.mllama import processing_mllama

    ranges = [processing_mllama.get_cross_attention_token_mask(row, IMAGE_ID) for row in rows]
    length = max(map(len, rows))
    return torch.from_numpy(
        processing_mllama.convert_sparse_cross_attention_mask_to_dense(ranges, tiles, TILES, length)
    )


def batches(processor: "MllamaImageProcessorPil", *, seed: int) -> Iterator[dict]:
    """Yield pictures, and for each a question of every task; a loss on its answer and </s> alone.

    Rows start with <s>, as at inference, and are padded on the right: a causal model needs no mask for that.
    """
    import torch

    stream = tasks.training_scenes(seed=seed)
    while True:
        scenes = list(islice(stream, PICTURES))
        images, tiles = image_inputs(processor, [scene.draw() for scene in scenes])
        rows, labels = [], []
        for scene in scenes:
            for problem in map(scene.problem, tasks.TASKS):
                prompt_ids = [BOS_ID, *encode(problem.prompt)]
                answer_ids = [*encode(problem.answer), EOS_ID]
                rows.append(prompt_ids + answer_ids)
                labels.append([IGNORE] * len(prompt_ids) + answer_ids)
        width = max(map(len, rows))
        rows = [row + [PAD_ID] * (width - len(row)) for row in rows]
        yield {
            "images": images,
            "input_ids": torch.tensor(rows),
            "cross_attention_mask": cross_attention_mask(rows, [t for t in tiles for _ in tasks.TASKS]),
            "labels": torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]),
        }


def losses_by_task(model: "MllamaForConditionalGeneration", batch: dict) -> "Tensor":
    """Return the mean loss of each task, [len(tasks.TASKS)]; a picture's questions share one pass of the encoder."""
    from torch.nn import functional as F

    seen = model.model.vision_model(**batch["images"]).last_hidden_state  # [pictures, 1, tiles, patches, features]
    states = model.model.multi_modal_projector(seen).flatten(1, 3)
    logits = model(
        input_ids=batch["input_ids"],
        cross_attention_states=states.repeat_interleave(len(tasks.TASKS), dim=0),
        cross_attention_mask=batch["cross_attention_mask"],
        use_cache=False,
    ).logits
    losses = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], ignore_index=IGNORE, reduction="none")
    answers = (batch["labels"] != IGNORE).sum(1)
    return (losses.sum(1) / answers).view(-1, len(tasks.TASKS)).mean(0)


def start_gates_and_places(model: "MllamaForConditionalGeneration") -> None:
    """Open the gates, and let every patch start from its place in the whole picture: both are trained from there on."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.shape == (1,):
            assert "gate" in name, name
            torch.nn.init.constant_(parameter, FIRST_GATE)
    places = model.model.vision_model.gated_positional_embedding
    side = math.isqrt(places.num_patches - 1)
    down, across = torch.randn(2, places.hidden_size)
    table_RTPH = places.tile_embedding.weight.detach().view(-1, TILES, places.num_patches, places.hidden_size)
    within = (torch.arange(side) + 0.5) / side
    for ratio_id, (rows, columns) in enumerate(tasks.TILE_ROWS_COLUMNS, start=1):  # 0 is for no picture
        for tile in range(rows * columns):
            y = 2 * (tile // columns + within) / rows - 1  # from -1 to 1 in the picture
            x = 2 * (tile % columns + within) / columns - 1
            place = y[:, None, None] * down + x[None, :, None] * across
            table_RTPH[ratio_id, tile, 1:] += place.flatten(0, 1)  # 1: the class token is nowhere


def train(
    config: "MllamaConfig", processor: "MllamaImageProcessorPil", *, steps: int, seed: int
) -> "MllamaForConditionalGeneration":
    """Return a model trained for `steps` steps: AdamW, linear warm-up, cosine to zero."""
    import torch
    from transformers import MllamaForConditionalGeneration

    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config).train()
    start_gates_and_places(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    stream, start_s = batches(processor, seed=seed), time.perf_counter()
    for step in range(1, steps + 1):
        losses = losses_by_task(model, next(stream))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            shown = "  ".join(f"{task} {loss:.4f}" for task, loss in zip(tasks.TASKS, losses.tolist(), strict=True))
            print(f"step {step}/{steps}  {time.perf_counter() - start_s:.0f} s  loss: {shown}", flush=True)
    return model.eval()


def write_weights(model: "MllamaForConditionalGeneration", folder: Path) -> None:
    """Write model.safetensors in float32, under the names that Llama 3.2 Vision checkpoints have."""
    with TemporaryDirectory() as saved:  # save_pretrained writes configs beside the weights, in transformers 5's keys
        model.save_pretrained(saved)
        shutil.copyfile(Path(saved) / "model.safetensors", folder / "model.safetensors")


def load_answerer(folder: Path) -> tasks.AnswerFn:
    """Load a checkpoint with transformers; return the function that completes prompts about pictures, greedily."""
    import torch
    from transformers import AutoTokenizer, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = MllamaImageProcessorPil.from_pretrained(folder)
    model = MllamaForConditionalGeneration.from_pretrained(folder)

    def answer(asked: list) -> list[str]:
        alike = defaultdict(list)  # prompts of one length, all with a picture or all without, need no padding
        for i, (picture, prompt) in enumerate(asked):
            alike[len(tokenizer(prompt).input_ids), picture is None].append(i)
        completions = [""] * len(asked)
        for (length, without_picture), group in alike.items():
            prompt_ids = tokenizer([asked[i][1] for i in group], return_tensors="pt").input_ids
            seen = {}
            if not without_picture:
                seen, tiles = image_inputs(processor, [asked[i][0] for i in group])
                seen["cross_attention_mask"] = cross_attention_mask(prompt_ids.tolist(), tiles)
            ids = model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=False,
                max_new_tokens=tasks.MAX_ANSWER_TOKENS + 1,
                **seen,
            )
            texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
            for i, text in zip(group, texts, strict=True):
                completions[i] = text
        return completions

    return answer


def main() -> None:
    """Train a checkpoint and score it, or score one only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("-o", "--out", type=Path, help="folder to write the checkpoint to")
    action.add_argument("--score", type=Path, metavar="CHECKPOINT", help="score this checkpoint; train nothing")
    parser.add_argument("--steps", type=int, default=3500, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the pictures (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.score is not None and not (args.score / "config.json").is_file():
        parser.error(f"--score {args.score}: expected a folder with a config.json; make one with -o OUT")

    import torch
    from transformers import AutoConfig
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(args.out)
        write_image_processor(args.out)
        write_json(args.out / "config.json", CONFIG)
        write_json(args.out / "generation_config.json", GENERATION_CONFIG)
        # Config and image processor are read back, so that what is trained is what the files say.
        config = AutoConfig.from_pretrained(args.out)
        processor = MllamaImageProcessorPil.from_pretrained(args.out)
        write_weights(train(config, processor, steps=args.steps, seed=args.seed), args.out)
    answer = load_answerer(args.out or args.score)
    for images in ("right", "wrong", "none"):
        accuracy = tasks.score(answer, images=images)
        shown = "  ".join(f"{task} {share:.1%}" for task, share in accuracy.items())
        print(f"{images:5} picture of {tasks.MAX_PROBLEMS} held-out problems a task: {shown}")


if __name__ == "__main__":
    main()
