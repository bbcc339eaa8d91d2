"""Time and peak memory of exporting the graphs of Llama 3.2 Vision 11B, from its config alone.

    python benchmarks/vision_export.py
    python benchmarks/vision_export.py --image-size 448 --json   # the base model's tiles, not the instruct model's

The checkpoint is config.json and a safetensors file of the right size that holds no data (a hole on disk that reads as
zeros), and the command is `export-llm export --weights reference --no-verify`: both graphs are traced, lowered, checked
and written beside the file. Peak memory is the largest resident set of that process. The last stage hashes the file,
21 GB of zeros, at the speed of this machine's disk and processor, so it is timed apart.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sparse_checkpoint import ROPE_SCALING

from graphs.families import find_family
from graphs.loading import expected_shapes

CONFIG = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "text_config": {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": ROPE_SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "vision_config": {
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 7680,
    },
}


def write_checkpoint(folder: Path, image_size: int) -> int:
    """config.json and a bfloat16 model.safetensors whose data is a hole; return the number of parameters."""
    raw = CONFIG | {"vision_config": CONFIG["vision_config"] | {"image_size": image_size}}
    (folder / "config.json").write_text(json.dumps(raw))
    family = find_family(raw)
    entries, end = {}, 0
    for name, shape in expected_shapes(family, family.parse_config(raw)).items():
        nbytes = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return end // 2


def measure(checkpoint: Path) -> tuple[float, float, float]:
    """(seconds until the graphs are written, seconds of hashing, peak memory in MB), in a process of its own."""
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "-o", str(checkpoint)]
    command += ["--weights", "reference", "--no-verify"]
    start = written = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # not a terminal: a line for each stage as it begins
        if line.strip() == "hash files":
            written = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return written - start, time.perf_counter() - written, usage.ru_maxrss / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=560, help="of a tile, in pixels (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "llama-3.2-11b-vision"
        checkpoint.mkdir()
        parameters = write_checkpoint(checkpoint, arguments.image_size)
        graphs_s, hashing_s, peak_mb = measure(checkpoint)
        sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.onnx")}
    facts = {
        "parameters": parameters,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds_until_graphs_are_written": round(graphs_s, 1),
        "seconds_of_hashing": round(hashing_s, 1),
        "peak_mb": round(peak_mb),
        "graph_bytes": sizes,
    }
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{parameters / 1e9:.2f}B parameters, bfloat16, both graphs: {', '.join(sizes)}")
    print(f"{graphs_s:.1f} s until they are written, {hashing_s:.1f} s of hashing; peak memory {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
