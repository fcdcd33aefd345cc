"""A report as one self-contained HTML file: totals, the plots of `reporting.plots`, and the tables."""

from __future__ import annotations

from balf_fx.errors import MissingExtraError
from balf_fx.graph.certificate import Certificate
from balf_fx.reporting.curve import Sweep
from balf_fx.reporting.plots import plot_certificate, plot_report, plot_sweep, to_svg
from balf_fx.reporting.report import Report, certificate_in_words, numbers, timing_in_words
from balf_fx.version import __version__

try:
    import jinja2
except ImportError as error:
    raise MissingExtraError('the HTML report needs jinja2: pip install "balf-fx[plot]"') from error


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 84rem; margin: 2rem auto;
         padding: 0 1.5rem; }
  h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
  dl { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0; }
  dl div { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem 1rem; }
  dt { color: #555; font-size: .85rem; } dd { margin: 0; } dd strong { font-size: 1.5rem; color: #0072B2; }
  figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
  .sites svg { min-width: 60rem; }
  .table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
  th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #eee; }
  th { border-bottom: 2px solid #bbb; } .number { text-align: right; font-variant-numeric: tabular-nums; }
  tbody tr:hover { background: #f3f8fb; } footer { color: #777; font-size: .85rem; margin: 3rem 0 1rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>
{% for name, value, detail in totals %}  <div>
    <dt>{{ name }}</dt>
    <dd><strong>{{ value }}</strong> {{ detail }}</dd>
  </div>
{% endfor %}</dl>
{% for name, heading, meaning, picture in pictures %}<h2>{{ heading }}</h2>
<figure class="{{ name }}" role="img" aria-label="{{ meaning }}">
{{ picture | safe }}
</figure>
{% endfor %}
{% for heading, note, headers, rows in tables %}<h2>{{ heading }}</h2>
<p>{{ note }}</p>
<div class="table"><table>
<thead><tr>
{% for header, numeric in headers %}  <th scope="col"{% if numeric %} class="number"{% endif %}>{{ header }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row -%}
<td{% if headers[loop.index0][1] %} class="number"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}<footer>balf_fx {{ version }}</footer>
</body>
</html>
"""


_Total = tuple[str, str, str]
"""A label, its value, and an additional explanation."""


_Table = tuple[str, str, list[tuple[str, bool]], list[list[str]]]
"""A heading, a note, headers (each with whether its column is numeric), and rows."""


def render(report: Report, sweep: Sweep | None = None) -> str:
    """The page as text, with the curve over budgets if there is one."""
    drawn = [("sites", "Picture", "Rank, cost and energy of each site", plot_report(report))]
    tables = [_sites(report), _widths(report), _refused(report)]
    if report.certificate is not None:
        if report.certificate.tried:
            meaning = "Mistakes and their upper bound at each budget that was tried"
            drawn.append(("mistakes", "Certified mistakes", meaning, plot_certificate(report.certificate)))
        tables.insert(0, _tried(report.certificate))
    if sweep is not None:
        meaning = "Predictions and their divergence at each budget"
        drawn.append(("budgets", "Accuracy and budget", meaning, plot_sweep(sweep)))
        tables.insert(0, _points(sweep))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE).render(
        title="What balf_fx did to the model",
        totals=_totals(report),
        pictures=[(name, *words, to_svg(figure, name)) for name, *words, figure in drawn],
        tables=[table for table in tables if table[3]],
        version=__version__,
    )


def _totals(report: Report) -> list[_Total]:
    asked = "no budget" if report.target is None else f"{report.measure} {report.target:g}"
    found = [("Parameters", f"{report.params_kept:.1%}", f"{report.params_before:,} → {report.params_after:,}")]
    if report.flops_kept is not None:
        found.insert(0, ("FLOPs", f"{report.flops_kept:.1%}", f"{report.flops_before:,} → {report.flops_after:,}"))
    found.append(("Budget", asked, f"allocation {report.method}"))
    bound = "" if report.bound is None else f"dual bound {report.bound:.4g}, gap {report.gap:.2g}"
    found.append(("Loss of the allocation", f"{report.primal:.4g}", bound))
    if report.timing is not None:
        found.append(("Time", f"{report.timing.measured:.1%}", timing_in_words(report.timing)))
    if report.certificate is not None:
        limit = f"{report.certificate.limit:g}"
        found.append((f"Limit of {report.certificate.mistakes}", limit, certificate_in_words(report.certificate)))
    return found


def _tried(certificate: Certificate) -> _Table:
    headers = [(f"{certificate.measure} kept", True), ("observed", True), ("upper bound", True)]
    rows = [[f"{each.share:g}", f"{each.observed:.3%}", f"{each.bound:.3%}"] for each in certificate.tried]
    note = "Budgets from mild to hard, up to the first that misses the limit, on samples that nothing else has seen."
    return "Certified mistakes", note, headers, rows


def _points(sweep: Sweep) -> _Table:
    headers, *rows = sweep.rows()
    return "Budgets", sweep.note, [(header, True) for header in headers], [list(row) for row in rows]


def _sites(report: Report) -> _Table:
    headers = [("site", False), ("kind", False), ("O x D x groups", False), ("rank", True)]
    headers += [(f"{name} {when}", True) for name in ("FLOPs", "parameters") for when in ("before", "after")]
    rows = [
        [
            *(row.name, row.kind, row.shape, row.rank_in_words),
            *numbers(row.flops_before, row.flops_after, row.params_before, row.params_after),
            f"{row.energy_kept:.2%}",
        ]
        for row in report.sites
    ]
    note = "Layers that can be replaced by a product of two thin layers. The energy is that of the layer's output."
    return "Sites", note, [*headers, ("energy kept", True)], rows


def _widths(report: Report) -> _Table:
    names = ("features before", "features after", "heads", "energy kept")
    headers = [("width", False), ("kind", False), *((name, True) for name in names)]
    rows = [
        [
            *(row.name, row.kind),
            *numbers(row.features_before, row.features_after, row.heads),
            f"{row.energy_kept:.2%}",
        ]
        for row in report.widths
    ]
    return (
        "Widths",
        "Features between layers whose number was reduced; for attention, the features of each head.",
        headers,
        rows,
    )


def _refused(report: Report) -> _Table:
    headers = [("layer", False), ("kind", False), ("reason", False), ("FLOPs", True)]
    rows = [[row.name, row.kind, row.reason, *numbers(row.flops)] for row in report.refused]
    return "Not a site", "Layers with parameters that no rank makes smaller, or that were excluded.", headers, rows
