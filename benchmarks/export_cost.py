"""What an export costs: wall time and peak memory, on checkpoints made on the spot.

    python benchmarks/export_cost.py                                # 250M parameters, beside other exporters, in turn
    python benchmarks/export_cost.py --alone --precision bf16 --verify
    python benchmarks/export_cost.py --shape 70b                    # Llama 3.1's shape; weights are holes of the files

Each run is a process of its own, and rounds run every contestant once, A B C A B C. Peak memory is that of the whole
process tree, mapped files included (process_cost.py). The checkpoint's files are read once before, so that the
operating system holds them for all. --shape exports in place (--weights reference --no-verify). Results are a table
on stdout, or JSON with --json, which -o writes to a file.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export_peers import EXPORTERS, OURS, ROOT, Exporter, dress
from process_cost import Cost, run_measured
from random_checkpoint import write_checkpoint
from sparse_checkpoint import SHAPES, write_sparse_checkpoint

MLP_MULTIPLE = 32  # as of published Llamas: blocks of quantized weights are that long
CHUNK_BYTES = 1 << 24


def compare(scratch: Path, millions: float, precisions: Sequence[str], rounds: int, more: Sequence[str]) -> Any:
    """Every exporter that is installed and has the precision, in turn; with `more` options, ours alone."""
    checkpoint = scratch / "checkpoint"
    checkpoint.mkdir()
    parameters = write_checkpoint(checkpoint, millions, mlp_multiple=MLP_MULTIPLE)
    dress(checkpoint)
    wanted = {OURS: EXPORTERS[OURS]} if more else EXPORTERS
    there = {name: each for name, each in wanted.items() if each.python.exists()}
    costs: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(rounds):
        for precision in precisions:
            for name, exporter in there.items():
                if precision in exporter.precisions:
                    cost = _run(exporter, checkpoint, scratch / "out", precision, more)
                    costs.setdefault((precision, name), []).append(cost)
                    _tell(f"{precision} {name}: {cost.seconds:.1f} s, {cost.peak_bytes / 1e6:.0f} MB")
    rows = [{"precision": precision, "exporter": name, **_row(each)} for (precision, name), each in costs.items()]
    return {"parameters": parameters, "rows": rows, "not_installed": sorted(wanted.keys() - there.keys())}


def _run(exporter: Exporter, checkpoint: Path, out: Path, precision: str, more: Sequence[str]) -> Cost:
    _read_once(checkpoint)
    try:
        return run_measured([*exporter.command(checkpoint, out, precision), *more], folder=ROOT)
    finally:
        for folder in (out, out.with_name("builder-cache")):
            shutil.rmtree(folder, ignore_errors=True)


def _read_once(folder: Path) -> None:
    """Have the operating system hold the files in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass


def export_sparse(scratch: Path, shape: str, rounds: int) -> Any:
    """A checkpoint of that shape exported in place."""
    checkpoint = scratch / shape
    checkpoint.mkdir()
    parameters = write_sparse_checkpoint(checkpoint, shape)
    options = ["-o", str(checkpoint), "--weights", "reference", "--no-verify", "--force"]
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), *options]
    costs = [run_measured(command, folder=ROOT) for _ in range(rounds)]
    stages = [[round(seconds, 1), stage] for seconds, stage in costs[-1].progress]
    row = {"precision": "bf16", "exporter": f"{OURS} --weights reference", **_row(costs)}
    graph_bytes = (checkpoint / "decoder.onnx").stat().st_size
    return {"shape": shape, "parameters": parameters, "rows": [row], "graph_bytes": graph_bytes, "last_stages": stages}


def _row(costs: Sequence[Cost]) -> dict[str, Any]:
    seconds, peaks = [cost.seconds for cost in costs], [cost.peak_bytes / 1e6 for cost in costs]
    return {"seconds": _spread(seconds, 1), "peak_mb": _spread(peaks, 0), "runs": len(costs)}


def _spread(samples: Sequence[float], digits: int) -> dict[str, float]:
    facts = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return {name: round(value, digits) for name, value in facts.items()}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=250, help="in millions")
    parser.add_argument("--precision", action="append", help="fp32, fp16, bf16, int8, int4; may be repeated")
    parser.add_argument("--alone", action="store_true", help="export-llm only")
    parser.add_argument("--target", default="onnx", help="of export-llm alone")
    parser.add_argument("--verify", action="store_true", help="of export-llm alone")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="instead: Llama 3.1's shape, exported in place")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    more = ["--target", arguments.target, "--verify"] if arguments.verify else ["--target", arguments.target]
    alone = arguments.alone or arguments.verify or arguments.target != "onnx"
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.shape:
            result = export_sparse(Path(scratch), arguments.shape, arguments.rounds)
        else:
            precisions = arguments.precision or ("fp32", "int4")
            result = compare(Path(scratch), arguments.parameters, precisions, arguments.rounds, more if alone else ())
    load = [round(each, 1) for each in os.getloadavg()]
    result |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load_average_at_the_end": load}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.json:
        print(text, end="")
        return
    print(f"{result['parameters'] / 1e6:,.0f}M parameters")
    print(f"{'precision':10} {'exporter':32} {'seconds':>22} {'peak MB':>22}")
    for row in result["rows"]:
        spreads = (f"{s['median']} ({s['min']}-{s['max']})" for s in (row["seconds"], row["peak_mb"]))
        print(f"{row['precision']:10} {row['exporter']:32} " + " ".join(f"{spread:>22}" for spread in spreads))


if __name__ == "__main__":
    main()
