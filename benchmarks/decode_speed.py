"""Speed of a random Llama beside other runtimes: the figures of docs/performance.md.

    python benchmarks/decode_speed.py                      # 250M parameters, fp32 and int4, every peer that is there
    python benchmarks/decode_speed.py --precision int4 --layout genai --against onnxruntime-genai -- --repeats 9

Makes the checkpoint, exports it once for each precision and layout, and runs `export-llm bench` on the first layout
against the others and the peers. What follows -- goes to `export-llm bench`. Writes bench_PRECISION.json and .png.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import write_checkpoint

RESULTS = Path(__file__).parent / "results"
MLP_MULTIPLE = 64
# Which runtime runs which layout: ours has its own runners, and `genai` is made for that client.
RUNTIMES = {"portable": "onnxruntime", "genai": "onnxruntime-genai"}


def compare(
    checkpoint: Path, precision: str, layouts: list[str], peers: list[str], scratch: Path, out: Path, options: list[str]
) -> None:
    """Export and measure in one precision."""
    artifacts = {layout: scratch / f"{layout}-{precision}" for layout in layouts}
    for layout, folder in artifacts.items():
        settings = ["--layout", layout, "--precision", precision, "--no-verify", "--quiet"]
        _run("export", checkpoint, "-o", folder, *settings)
    first, *others = layouts
    command = ["bench", artifacts[first], "--runtime", RUNTIMES[first], "--checkpoint", checkpoint]
    for layout in others:
        command += ["--against", f"{artifacts[layout]}@{RUNTIMES[layout]}"]
    for peer in peers:
        command += ["--against", peer]
    stem = out / f"bench_{precision.partition(':')[0]}"
    _run(*command, "-o", stem.with_suffix(".json"), "-o", stem.with_suffix(".png"), *options)


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "exporter.cli", *map(str, command)], check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=250, help="in millions")
    parser.add_argument("--precision", action="append", help="may be repeated")
    parser.add_argument("--layout", action="append", choices=RUNTIMES, help="may be repeated")
    parser.add_argument("--against", action="append", help="a peer, or all; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", help="for export-llm bench")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, arguments.parameters, mlp_multiple=MLP_MULTIPLE)
        for precision in arguments.precision or ["fp32", "int4"]:
            layouts = arguments.layout or list(RUNTIMES)
            peers = arguments.against or ["all"]
            compare(checkpoint, precision, layouts, peers, scratch, arguments.out, arguments.options)


if __name__ == "__main__":
    main()
