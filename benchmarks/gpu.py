"""Prefill and decode speed of every runtime that runs on this machine's GPU, on a checkpoint made on the spot.

    python benchmarks/gpu.py                       # 1000M parameters, float16; writes benchmarks/results/<GPU>.json
    python benchmarks/gpu.py --runtimes eager onnxruntime       # without those that compile for minutes
    python benchmarks/gpu.py --parameters 30 --device cpu --out /tmp/cpu.json    # the same without a GPU

`export-llm bench` compares runtimes on the CPU, each in a process of its own. Here they take turns in one process, and
what the host needs for a step is part of it: every step's logits come back to it.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import VOCAB_SIZE, write_checkpoint

from exporter.bench.machine import machine_facts
from exporter.bench.spread import spread_of
from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.torch_runners import MODULE_RUNNERS
from runtimes.artifact import Artifact, open_artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.runner import Runner, open_runner

RESULTS = Path(__file__).parent / "results"
# {runtime: the export target it needs}
RUNTIMES = {
    "eager": "onnx",
    "compiled": "onnx",
    "onnxruntime": "onnx",
    "aoti": "torch",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}
UNAVAILABLE = (RuntimeMissingError, ArtifactError, ExportError)


def open_on(artifact: Artifact, runtime: str, device: str) -> Runner:
    """The artifact's runner."""
    if runtime in MODULE_RUNNERS:
        return MODULE_RUNNERS[runtime](artifact, device)
    if runtime.startswith("tensorrt"):
        return open_runner(artifact, runtime)
    return open_runner(artifact, runtime, device=device)


def run_once(runner: Runner, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of one token after it."""
    decoding = Decoding(runner)
    start = time.perf_counter()
    logits = decoding.prefill([prompt])
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = decoding.decode(logits.argmax(-1))
    return prefilled - start, (time.perf_counter() - prefilled) / new_tokens


def measure(runners: dict[str, Runner], prompt: list[int], new_tokens: int, rounds: int) -> dict[str, Any]:
    """{runtime: what it took}; the first run of each, which compiles and captures, is not among them."""
    for runner in runners.values():
        run_once(runner, prompt, new_tokens)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            runs[name].append(run_once(runner, prompt, new_tokens))
    return {
        name: {
            "description": runners[name].description,
            "prefill_tokens_per_s": dataclasses.asdict(spread_of([len(prompt) / first for first, _ in each])),
            "decode_tokens_per_s": dataclasses.asdict(spread_of([1 / step for _, step in each])),
        }
        for name, each in runs.items()
    }


def gpu_name() -> str:
    """As the driver's own tool gives it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise SystemExit("there is no NVIDIA GPU here: give --device cpu and --out to try the program") from None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1000, help="in millions")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<GPU>.json")
    options = parser.parse_args()
    name = gpu_name() if options.device == "cuda" else "cpu"
    out = options.out or RESULTS / f"{name.lower().replace(' ', '_')}.json"

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        (scratch / "checkpoint").mkdir()
        parameters = write_checkpoint(scratch / "checkpoint", options.parameters, mlp_multiple=32)
        make = functools.cache(functools.partial(_export, scratch, options))
        runners, not_run = _open_all(make, options.runtimes, options.device, stack)
        prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, options.prompt_tokens).tolist()
        results = measure(runners, prompt, options.new_tokens, options.rounds)
    plan = {key: value for key, value in vars(options).items() if key not in ("out", "parameters")}
    report = {
        "machine": machine_facts(threads=0) | {"gpu": name},
        "plan": plan | {"parameters": parameters},
        "results": results,
        "not_run": not_run,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'runtime':14} {'prefill tok/s':>14} {'decode tok/s':>14}")
    for runtime, each in results.items():
        speeds = [each[f"{what}_tokens_per_s"]["median"] for what in ("prefill", "decode")]
        print(f"{runtime:14} {speeds[0]:14.1f} {speeds[1]:14.1f}")
    for runtime, reason in not_run.items():
        print(f"not run: {runtime}: {reason}")
    print(f"written: {out}")


def _export(scratch: Path, options: argparse.Namespace, target: str) -> Artifact:
    request = ExportRequest(
        checkpoint=scratch / "checkpoint",
        out=scratch / target,
        targets=(target,),
        precision=options.precision,
        max_len=options.prompt_tokens + options.new_tokens,
        verify=False,
    )
    export(request)
    return open_artifact(request.out, check_hashes=False)


def _open_all(
    make: Callable[[str], Artifact], runtimes: Sequence[str], device: str, stack: contextlib.ExitStack
) -> tuple[dict[str, Runner], dict[str, str]]:
    """The runners that there are, and why the others are not."""
    runners: dict[str, Runner] = {}
    not_run = {}
    for runtime in runtimes:
        try:
            runners[runtime] = stack.enter_context(open_on(make(RUNTIMES[runtime]), runtime, device))
        except UNAVAILABLE as error:
            not_run[runtime] = str(error)
    return runners, not_run


if __name__ == "__main__":
    main()
