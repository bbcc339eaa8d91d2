"""Prefill and decode rates in one picture."""

import importlib.util
from pathlib import Path

from exporter.bench.report import Report
from exporter.errors import ExportError
from runtimes.errors import RuntimeMissingError

RATES = {"prefill_tokens_per_s": "prefill", "decode_tokens_per_s": "decode"}


def require_matplotlib() -> None:
    """RuntimeMissingError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeMissingError("the picture needs matplotlib: pip install 'export-llm[plot]'")


def draw(report: Report, path: Path) -> None:
    """Bars of medians with quartiles, for each contestant and prompt length, in the format that the ending names.

    Raises:
        RuntimeMissingError: matplotlib is not installed.
        ExportError: the ending is none that matplotlib writes.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(report.results)
    for axes, (rate, title) in zip(figure.subplots(1, 2), RATES.items(), strict=True):
        for index, result in enumerate(report.results):
            spreads = [getattr(each, rate) for each in result.lengths]
            middles = [spread.median for spread in spreads]
            below = [spread.median - spread.q1 for spread in spreads]
            above = [spread.q3 - spread.median for spread in spreads]
            places = [place + (index - (len(report.results) - 1) / 2) * width for place in range(len(spreads))]
            axes.bar(places, middles, width, yerr=(below, above), capsize=2, label=f"{result.name}, {result.precision}")
        axes.set_xticks(range(len(report.plan.prompt_tokens)), [str(length) for length in report.plan.prompt_tokens])
        axes.set(title=title, xlabel="prompt tokens", ylabel="tokens a second: median, quartiles")
        axes.grid(axis="y", alpha=0.3)
    threads, cpu = report.machine["threads"], report.machine["cpu"]
    figure.suptitle(f"{cpu}, threads: {threads}, rows: {report.plan.batch_size}", fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ExportError(f"{path} cannot be drawn: {error}") from None
