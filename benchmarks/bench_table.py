"""Results of `export-llm bench` as a Markdown table.

python benchmarks/bench_table.py benchmarks/results/bench_*.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "contestant",
    "precision",
    "prompt",
    "first token",
    "prefill",
    "decode",
    "times the first",
    "of memory",
    "peak",
)


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One for each contestant and prompt length."""
    return [
        (
            result["name"],
            result["precision"],
            str(each["prompt_tokens"]),
            f"{1000 * each['first_token_s']['median']:.0f} ms",
            _rate(each["prefill_tokens_per_s"]),
            _rate(each["decode_tokens_per_s"]),
            f"{each['prefill_ratio']['median']:.2f}, {each['decode_ratio']['median']:.2f}",
            "" if each["bandwidth_share"] is None else f"{100 * each['bandwidth_share']:.0f} %",
            f"{result['peak_bytes'] / 1e6:,.0f} MB",
        )
        for result in report["results"]
        for each in result["lengths"]
    ]


def _rate(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['q1']:.1f}-{spread['q3']:.1f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().files]
    for line in (COLUMNS, ("---",) * len(COLUMNS), *(row for report in reports for row in rows(report))):
        print(f"| {' | '.join(line)} |")
    for report in reports:
        machine, plan = report["machine"], report["plan"]
        memory = report["bandwidth_bytes_per_s"]["median"] / 1e9
        versions = "; ".join(dict.fromkeys(result["description"] for result in report["results"]))
        print(
            f"\n{machine['date'][:10]}, {machine['cpu']}, {plan['threads']} threads, batch {plan['batch_size']},"
            f" {plan['new_tokens']} new tokens, {plan['repeats']} rounds, memory {memory:.1f} GB/s. {versions}."
        )


if __name__ == "__main__":
    main()
