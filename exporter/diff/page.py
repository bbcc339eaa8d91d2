"""One self-contained page about a comparison: the finding, a picture of errors along the depth, and every operator."""

from html import escape
from pathlib import Path
from string import Template

from exporter.diff.report import Comparison, DiffReport, Row
from exporter.diff.svg import draw
from exporter.errors import ExportError

COLUMNS = ("layer", "operator", "node", "weights", "own error", "limit", "added up", "limit", "largest number", "")
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>First divergence: $title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --faint: #d5dae1; --added: #2166ac; --own: #5b6675;
  --limit: #8a6d00; --bad: #c0182b; --wash: #fbe5e7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --faint: #343c47; --added: #74add1;
  --own: #9aa5b4; --limit: #d6b656; --bad: #ff6b7a; --wash: #3a1d22; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1160px; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
.finding { font-size: 1.1rem; font-weight: 600; } .finding.bad { color: var(--bad); }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid, .layer { stroke: var(--faint); } .layer { stroke-dasharray: 2 3; }
polyline { fill: none; stroke-width: 1.6; } .added { stroke: var(--added); } .limit { stroke: var(--limit);
  stroke-dasharray: 5 4; } .own { fill: var(--own); } .bad { fill: var(--bad); }
.key span::before { content: "\\25A0"; margin: 0 .3em 0 1em; } .key .added::before { color: var(--added); }
.key .limit::before { color: var(--limit); } .key .own::before { color: var(--own); }
.key .bad::before { color: var(--bad); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; } th, td { text-align: left;
  padding: 2px 10px 2px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.bad td { background: var(--wash); }
</style>
</head>
<body>
<h1>First divergence: $title</h1>
$sections
</body>
</html>
""")
_SECTION = Template("""<section>
<h2>$runtime</h2>
<p class="finding $verdict">$sentence</p>
<p>Reference: $reference. Errors are drawn in parts of the largest number of their value.</p>
<p class="key"><span class="added">error added up since the inputs</span><span class="limit">its limit</span>
<span class="own">what the operator adds itself</span><span class="bad">diverges</span></p>
$picture
<details open><summary>All $count operators, in the order of execution</summary>
<div class="table"><table>
<thead><tr>$head</tr></thead>
<tbody>
$body
</tbody>
</table></div></details>
</section>""")


def check_page(path: Path | None) -> None:
    """ExportError where the page could not be written: before minutes of work, and not after them."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ExportError(f"--html {path} cannot be written: {path.parent} is no folder; make it first")
    if path is not None and path.is_dir():
        raise ExportError(f"--html {path} is a folder: pass the name of a file, such as diff.html")


def write_page(report: DiffReport, path: Path) -> None:
    """Write the page; it needs nothing beside itself."""
    path.write_text(render(report), encoding="utf-8")


def render(report: DiffReport) -> str:
    """The page's text."""
    sections = "\n".join(_section(comparison) for comparison in report.comparisons)
    return _PAGE.substitute(title=escape(Path(report.artifact).name), sections=sections)


def _section(comparison: Comparison) -> str:
    return _SECTION.substitute(
        runtime=escape(comparison.runtime),
        verdict="" if comparison.first is None else "bad",
        sentence=escape(comparison.sentence()),
        reference=escape(comparison.reference),
        picture=draw(comparison),
        count=len(comparison.rows),
        head="".join(f"<th>{column}</th>" for column in COLUMNS),
        body="\n".join(map(_row, comparison.rows)),
    )


def _row(row: Row) -> str:
    layer = row.layer if row.graph == "decoder" else f"{row.graph} {row.layer}"
    operator = f"{row.operator} ({row.computes})" if row.computes else row.operator
    texts = (layer, operator, row.node, ", ".join(row.weights))
    numbers = (row.own_error, row.own_limit, row.error, row.limit, row.magnitude)
    cells = [f"<td>{escape(text)}</td>" for text in texts]
    cells += [f'<td class="number">{number:.2e}</td>' for number in numbers]
    cells.append(f"<td>{escape('ok' if row.passed else ('diverges ' + row.note).strip())}</td>")
    return f"<tr{'' if row.passed else ' class=bad'}>{''.join(cells)}</tr>"
