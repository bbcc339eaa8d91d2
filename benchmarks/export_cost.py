"""Time and peak memory of one export, on a checkpoint made on the spot.

    python benchmarks/export_cost.py                        # 250M parameters, each precision, export alone
    python benchmarks/export_cost.py --parameters 1000 --precision bf16 --verify

Peak memory is the largest resident set of the export-llm process, as the operating system counted it (mapped files
included). Results are a table on stdout, or JSON with --json.
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

import numpy as np

VOCAB_SIZE = 32000
LAYERS = 16


def write_checkpoint(folder: Path, millions: float) -> int:
    """A random float32 Llama checkpoint of about `millions` million parameters, written tensor by tensor."""
    hidden = 64
    while _parameters(hidden) < millions * 1e6:
        hidden += 64
    shapes = _shapes(hidden)
    entries, end = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            if "norm" in name:
                file.write(np.ones(shape, np.float32).tobytes())
            else:
                file.write((rng.standard_normal(shape, np.float32) * 0.02).tobytes())
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return _parameters(hidden)


def _shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    mlp = hidden * 11 // 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def _parameters(hidden: int) -> int:
    return sum(int(np.prod(shape)) for shape in _shapes(hidden).values())


def measure(checkpoint: Path, out: Path, precision: str, verify: bool, target: str) -> dict[str, float | str]:
    """Run one export in a process of its own."""
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "-o", str(out), "--quiet"]
    command += ["--precision", precision, "--target", target, "--verify" if verify else "--no-verify"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return {
        "precision": precision,
        "target": target,
        "verify": "yes" if verify else "no",
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=250, help="in millions")
    parser.add_argument("--precision", action="append", help="fp32, fp16, bf16, int8, int4, ..; may be repeated")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        parameters = write_checkpoint(checkpoint, arguments.parameters)
        rows = [
            measure(checkpoint, Path(scratch) / precision, precision, arguments.verify, arguments.target)
            for precision in arguments.precision or ("fp32", "fp16", "bf16")
        ]
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        print(json.dumps({"parameters": parameters, "machine": machine, "rows": rows}, indent=1))
        return
    print(f"{parameters / 1e6:.0f}M parameters, float32 checkpoint of {parameters * 4 / 1e6:.0f} MB")
    print(f"{'precision':10} {'target':14} {'verify':7} {'seconds':>8} {'peak MB':>8}")
    for row in rows:
        print(f"{row['precision']:10} {row['target']:14} {row['verify']:7} {row['seconds']:8} {row['peak_mb']:8}")


if __name__ == "__main__":
    main()
