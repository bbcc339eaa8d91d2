"""A report as tables of text: {title: header and rows}."""

from exporter.bench.report import AtLength, Report
from exporter.bench.spread import Spread

SPEED_COLUMNS = ("contestant", "prompt", "first token", "prefill", "x", "decode", "x", "of memory", "same tokens")
COST_COLUMNS = ("contestant", "precision", "load", "first run", "loaded", "peak", "weights read", "runs on")


def tables(report: Report) -> dict[str, list[tuple[str, ...]]]:
    """What the command prints."""
    plan, machine = report.plan, report.machine
    rate = report.bandwidth_bytes_per_s
    speed = (
        f"{machine['cpu']}, threads: {plan.threads}, rows: {plan.batch_size}, new tokens: {plan.new_tokens}, rounds:"
        f" {plan.repeats}; memory {rate.median / 1e9:.1f} GB/s ({rate.q1 / 1e9:.1f}-{rate.q3 / 1e9:.1f})\n"
        f"tokens a second: median (quartiles); x: times {report.results[0].name}, round by round"
    )
    rows = [(result.name, *_speed(each, plan.new_tokens)) for result in report.results for each in result.lengths]
    costs = [
        (
            result.name,
            result.precision,
            f"{result.load_s.median:.2f} s",
            f"{max(each.warmup_s for each in result.lengths):.2f} s",
            f"{result.loaded_bytes / 1e6:,.0f} MB",
            f"{result.peak_bytes / 1e6:,.0f} MB",
            f"{result.weight_bytes / 1e6:,.1f} MB",
            result.description,
        )
        for result in report.results
    ]
    return {speed: [SPEED_COLUMNS, *rows], "what it costs": [COST_COLUMNS, *costs]}


def _speed(each: AtLength, new_tokens: int) -> tuple[str, ...]:
    first = each.first_difference
    same = "" if first is None else f"all {new_tokens}" if first < 0 else f"the first {first}"
    return (
        str(each.prompt_tokens),
        f"{1000 * each.first_token_s.median:,.0f} ms",
        _with_quartiles(each.prefill_tokens_per_s),
        f"{each.prefill_ratio.median:.2f}",
        _with_quartiles(each.decode_tokens_per_s),
        f"{each.decode_ratio.median:.2f}",
        "" if each.bandwidth_share is None else f"{100 * each.bandwidth_share:.0f} %",
        same,
    )


def _with_quartiles(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.q1:,.1f}-{spread.q3:,.1f})"
