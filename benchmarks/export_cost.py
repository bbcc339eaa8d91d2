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

from random_checkpoint import write_checkpoint


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
