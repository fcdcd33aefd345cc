"""The tables of benchmarks/README.md, made from the results in JSON.

python benchmarks/readme_tables.py

Each stands in the README between `<!-- NAME -->` and `<!-- /NAME -->`, and is replaced there.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from shapes import SHAPES, on_paper
from tabulate import tabulate

from balf_fx.engine.memory import bytes_of

README = Path(__file__).with_name("README.md")
_RESULTS = Path(__file__).with_name("results")
_NEAR = 0.03  # of shares kept

METHODS: Mapping[str, str] = {
    "svd": "SVD of the weights",
    "svd-llm": "SVD-LLM(W), uniform ranks",
    "air": "AIR preset, label-free",
    "reference": "BALF, reference implementation",
    "balf": "BALF preset",
    "fast": 'balf_fx, `effort="fast"`',
    "fast+separable": "balf_fx, fast, `separable=True`",
    "balanced": 'balf_fx, `effort="balanced"`',
    "ranks+refit": "balf_fx, `widths=False`",
    "separable": "balf_fx, `separable=True`",
    "ours": "**balf_fx**",
}
"""The methods of accuracy.py in the order in which tables show them, and what they are called there."""

PUBLISHED: Sequence[tuple[str, str, str, str, Sequence[tuple[float, float]]]] = (
    (
        *("resnet20", "ResNet-20: FVRCP", "flops", "He et al., ACCV 2020"),
        [(20, 2.5), (30, 5.8), (49, 24.9), (71, 54.6)],
    ),
    (
        *("resnet20", "ResNet-20: ALDS", "params", "[arXiv 2107.11442](https://arxiv.org/abs/2107.11442)"),
        [(24, 1.5), (41, 7.4), (50, 25.2)],
    ),
    (
        *("resnet20", "ResNet-20: torch-pruning 1.6, BatchNorm recalibrated", "flops"),
        "method: [arXiv 2301.12900](https://arxiv.org/abs/2301.12900)",
        [(10, 1.7), (30, 9.5), (50, 39.1), (70, 76)],
    ),
    (
        *("mobilenetv2", "MobileNetV2: SVD-NAS", "flops", "[arXiv 2208.10404](https://arxiv.org/abs/2208.10404)"),
        [(12.5, 15.1)],
    ),
)
"""Model, method, what is saved, source, and for each result the percent saved and the points of top-1 lost."""

_Rows = Sequence[Mapping[str, Any]]


def markdown(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text())
    return found


def _select(rows: _Rows, **wanted: Any) -> _Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _figure(rows: _Rows, metric: str, digits: int, **wanted: Any) -> str:
    """The metric of the only such row; empty where there is none."""
    found = _select(rows, **wanted)
    return f"{found[0][metric]:,.{digits}f}" if found else ""


def accuracy(name: str, images: int, digits: int = 2) -> str:
    """Methods x budgets: top-1 in percent or perplexity, on the same calibration samples."""
    found = _read(f"accuracy_{name}")
    rows, metric = found["results"], found["metric"]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    reference = {float(share): top1 for share, top1 in found["reference"].items()}
    lines = []
    for method, title in METHODS.items():
        own = _select(rows, method=method, images=images, seed=0)
        cells = [_figure(own, metric, digits, budget=budget) for budget in budgets]
        if method == "reference":
            cells = [_nearest(reference, budget, digits) for budget in budgets]
        if any(cells):
            lines.append((title, *cells))
    title = f"{'top-1, %' if metric == 'top1' else 'perplexity'} (dense: {found['dense'][metric]:.2f})"
    return markdown(lines, (title, *(f"{budget:g}" for budget in budgets)))


def llama() -> str:
    """Methods x budgets: the perplexity of a model that was trained here."""
    found = _read("llama")
    rows = found["results"]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    titles = {**METHODS, "air, labels": "AIR preset, with the loss of training", "mlp": "balf_fx, narrower MLPs alone"}
    lines = [
        (titles[method], *(_figure(rows, "perplexity", 2, method=method, budget=budget) for budget in budgets))
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    title = f"perplexity (dense: {found['dense']['perplexity']:.2f})"
    return markdown(lines, (title, *(f"{budget:g}" for budget in budgets)))


def _nearest(reference: Mapping[float, float], budget: float, digits: int) -> str:
    """The reference's figure at a budget, or at a share that is close to it, which is then shown, too."""
    near = {share: top1 for share, top1 in reference.items() if abs(share - budget) < _NEAR}
    if not near:
        return ""
    share = min(near, key=lambda share: abs(share - budget))
    return f"{near[share]:.{digits}f}{'' if share == budget else f' (at {share:g})'}"


def samples() -> str:
    """What balf_fx reaches with other calibration data."""
    titles = {"resnet20": "ResNet-20", "vit_tiny": "ViT-Tiny", "mobilenetv2": "MobileNetV2", "stories": "stories260K"}
    lines = []
    for name, title in titles.items():
        found = _read(f"accuracy_{name}")
        rows = _select(found["results"], method="ours")
        settings = sorted({(row["images"], row["seed"]) for row in rows})
        varied = {row["budget"] for row in rows if (row["images"], row["seed"]) != settings[0]}
        for images, seed in settings if varied else ():
            own = _select(rows, images=images, seed=seed)
            figures = [
                f"{row[found['metric']]:.1f} at {row['budget']:g}"
                for row in sorted(own, key=lambda row: -row["budget"])
                if row["budget"] in varied
            ]
            lines.append((title, f"{images:,}", str(seed), ", ".join(figures)))
    return markdown(lines, ("model", "samples", "seed", "top-1, %, or perplexity, at what is kept"))


def published() -> str:
    """What others report without fine-tuning, beside the rows of balf_fx that save most nearly as much."""
    lines = []
    for model, method, measure, source, results in PUBLISHED:
        found = _read(f"accuracy_{model}")
        default = max(row["images"] for row in _select(found["results"], method="svd"))
        ours = _select(found["results"], method="ours", images=default, seed=0)
        for saved, lost in results:
            near = min(ours, key=lambda row: abs(100 * (1 - row[f"{measure}_kept"]) - saved))
            own_lost, own_saved = found["dense"]["top1"] - near["top1"], 100 * (1 - near[f"{measure}_kept"])
            theirs = f"{saved:g} % of {'FLOPs' if measure == 'flops' else 'parameters'}"
            lines.append((method, theirs, f"{lost:g}", f"{round(own_lost, 1) + 0.0:.1f} at {own_saved:.0f} %", source))
    return markdown(lines, ("", "saved", "points lost", "balf_fx, same model", "source"))


def costs() -> str:
    """The time of each method in forward passes."""
    rows = _select(_read("accuracy_resnet20")["results"], images=1024, seed=0)
    lines = []
    for method, title in METHODS.items():
        passes = [row["seconds"] / row["forward_seconds"] for row in _select(rows, method=method)]
        if passes:
            lines.append((title, f"{statistics.median(passes):.1f}"))
    return markdown(lines, ("method", "time in forward passes"))


def allocation() -> str:
    """Weightings x budgets, with and without a refit."""
    rows = _read("allocation_resnet20")["results"]
    columns = [(budget, refit) for refit in (False, True) for budget in (0.5, 0.3)]
    lines = [
        (name, *(_figure(rows, "top1", 2, weighting=name, budget=budget, refit=refit) for budget, refit in columns))
        for name in dict.fromkeys(row["weighting"] for row in rows)
    ]
    return markdown(lines, ("top-1, %", *(f"{budget:g}{', refit' if refit else ''}" for budget, refit in columns)))


def padding() -> str:
    """What is lost at two budgets with padding on either side, left out or counted."""
    found = [_read(name)["results"] for name in ("padding_80", "padding_40")]
    lines = []
    for side, counts in (("none", False), ("right", False), ("right", True), ("left", False), ("left", True)):
        title = side if side == "none" else f"{side}, {'counted' if counts else 'left out'}"
        lines.append((title, *(_figure(rows, "nats_lost", 3, side=side, counts=counts) for rows in found)))
    return markdown(lines, ("nats lost; padding", "0.8", "0.4"))


def quantization() -> str:
    """Sizes and figures of dense and compressed models in each format, and what the format alone costs."""
    lines = []
    for model in _read("quantization")["models"]:
        for row in model["results"]:
            (plain,) = _select(model["results"], variant=row["variant"], quantization="none")
            rise = "" if row is plain else f"{round(row['perplexity'] / plain['perplexity'] - 1, 3) + 0.0:+.1%}"
            figures = (f"{row['bytes'] / 1e3:,.0f}", f"{row['top1']:.2f}", f"{row['perplexity']:.3f}", rise)
            lines.append((model["title"], row["variant"], row["quantization"], *figures))
    headers = ("model", "", "quantization", "KB on disk", "top-1, %", "perplexity", "rise by quantization")
    return markdown(lines, headers)


def representative() -> str:
    """Top-1 on classes that calibration has seen, and on others, for each kind of calibration data and each effort."""
    lines = [
        (
            row["calibration"] or "dense",
            row["effort"] if row["calibration"] else "",
            f"{row['seen']:.2f}",
            f"{row['others']:.2f}",
        )
        for row in _read("representative")["results"]
    ]
    return markdown(lines, ("calibrated on", "effort", "top-1, first five classes", "top-1, other five"))


def residual() -> str:
    """Divergence against size, for formats with and without a correction."""
    vit = [row for name in ("", "_rows") for row in _read(f"residual_vit_tiny{name}")["results"]]
    stories = _read("residual_stories")["results"]
    formats = [("dense", 3, 32, 0), ("compressed", 4, 32, 0), ("dense", 3, 32, 8), ("dense", 4, 32, 0)]
    formats += [("dense", 4, 0, 8), ("dense", 4, 32, 8), ("dense", 5, 0, 0)]
    lines = []
    for model, bits, group, rank in formats:
        cells = []
        for rows, budget in ((vit, "flops 0.9"), (stories, "params 0.8")):
            name = budget if model == "compressed" else model
            (row,) = _select(rows, model=name, bits=bits, group=group, rank=rank)
            cells.append(f"{row['bytes'] / 1e3:,.0f}: {row['kl']:.3f}")
        scale = f"{group} a scale" if group else "a scale a row"
        correction = f", correction of rank {rank}" if rank else ""
        lines.append((f"{model}, {bits} bits, {scale}{correction}", *cells))
    return markdown(lines, ("KB: KL divergence in nats", "ViT-Tiny", "stories260K"))


def zoo() -> str:
    """Counts by source."""
    found = _read("zoo")
    lines = []
    for source in ("torchvision", "timm", "transformers"):
        rows = _select(found["results"], source=source)
        shares = [row["flops_in_sites"] for row in rows if row["flops_in_sites"] is not None]
        captured = [row["captured"] for row in rows]
        lines.append(
            (
                f"{source} {found['versions'][source]}",
                str(len(rows)),
                str(sum(not row["problems"] for row in rows)),
                f"{captured.count('symbolic_trace')} / {captured.count('export')}",
                f"{statistics.median(shares):.1%} ({min(shares):.1%})",
            )
        )
    headers = ("", "examined", "without a problem", "traced / exported", "FLOPs in sites, median (least)")
    return markdown(lines, headers)


def compression() -> str:
    """Forward passes that each effort takes, in all and by stage."""
    stages = ("capturing", "calibrating", "scoring", "trying allocations", "solving layers")
    lines = []
    for case in _read("compression")["benchmarks"]:
        model, _, effort = case["name"].partition("[")[2].rstrip("]").rpartition("-")
        own = {stage: ratios["forward passes"]["median"] for stage, ratios in case["extra_info"]["stages"].items()}
        whole = case["extra_info"]["ratios"]["forward passes"]["median"]
        rest = sum(passes for stage, passes in own.items() if stage not in stages)
        cells = [whole, *(own.get(stage) for stage in stages), rest]
        lines.append((f'{model}, `"{effort}"`', *("" if cell is None else f"{cell:.1f}" for cell in cells)))
    return markdown(lines, ("forward passes", "in all", *stages, "rewriting"))


def scaling() -> str:
    """The seconds of each stage and the efficiency, measured in one process and in two and computed for more."""
    found = _read("scaling")
    lines = []
    for stage in found["measured"]:
        lines.append((stage["name"], "1", f"{stage['alone']:.2f}", "", "measured"))
        cells = (str(stage["processes"]), f"{stage['together']:.2f}", f"{stage['efficiency']:.2f}")
        lines.append((stage["name"], *cells, "measured"))
        for each in _select(found["simulated"], name=stage["name"]):
            cells = (str(each["processes"]), f"{each['seconds']:.2f}", f"{each['efficiency']:.2f}")
            lines.append((stage["name"], *cells, "computed"))
    return markdown(lines, ("stage", "processes", "seconds", "efficiency", ""))


def memory() -> str:
    """Time and resident memory for each size of batches."""
    figures = ("forward_seconds", "seconds", "before_gib", "peak_gib")
    lines = [(str(row["batch_size"]), *(f"{row[key]:,.1f}" for key in figures)) for row in _read("memory")["results"]]
    headers = ("images a batch", "forward passes, s", "compression, s", "GiB before", "GiB at the peak")
    return markdown(lines, headers)


def blocks() -> str:
    """Resident memory for each effort and bound, with weights in memory and in files."""
    lines = [
        (
            row["effort"],
            row["memory"],
            "files" if row["files"] else "memory",
            *(f"{1024 * row[key]:,.0f}" for key in ("weights", "above")),
            f"{row['seconds']:,.0f}",
        )
        for row in _read("blocks")["results"]
    ]
    headers = ("effort", "`memory=`", "weights in", "weights, MiB", "above what was before, MiB", "compression, s")
    return markdown(lines, headers)


def targets() -> str:
    """Budgets of time, and the shares of the time that the models take."""
    rows = [
        [
            f"{row['model']}, {row['runner']}{'' if row['effort'] == 'fast' else ', ' + row['effort']}",
            row["threads"],
            f"{row['asked']:g}{'' if row['reached'] else ', out of reach'}",
            *(f"{row[name]:.2f}" for name in ("by_operations", "predicted", "measured", "again", "flops_kept")),
        ]
        for row in _read("targets")["results"]
    ]
    columns = ["asked for", "by operations", "predicted", "measured", "measured again", "FLOPs kept"]
    return markdown(rows, ["share of the time", "threads", *columns])


def bounds() -> str:
    """Resident memory for each model and effort, as a share of its bound."""
    lines = [
        (
            row["model"],
            f'`"{row["effort"]}"`',
            row["memory"],
            f"{1024 * row['above']:,.0f}",
            f"{2**30 * row['above'] / bytes_of(row['memory']):.2f}",
        )
        for row in _read("bounds")["results"]
    ]
    return markdown(lines, ("model", "effort", "`memory=`", "above what was before, MiB", "share of the bound"))


def large() -> str:
    """What each shape of Llama takes, measured and on paper."""
    found = _read("large")["results"]
    complete = {row["shape"]: row for row in found if row["layers"] == SHAPES[row["shape"]].layers}
    paper = {base: {row["shape"]: row for row in on_paper(complete[base])} for base in complete}
    sizes = paper[next(iter(complete))]  # the same from each
    lines = [
        (
            name,
            *(f"{sizes[name][f'{key}, GiB']:,.1f}" for key in ("weights", "statistics")),
            *(f"{complete[name][key]:,.1f}" if name in complete else "" for key in ("peak", "forward")),
            f"{complete[name]['seconds'] / 60:,.1f}" if name in complete else "",
            *(f"{60 * rows[name]['hours']:,.1f}" for rows in paper.values()),
        )
        for name in SHAPES
    ]
    measured = ("GiB above the model", "forward passes, s", "compression, min")
    computed = (f"from {base}, min" for base in paper)
    return markdown(lines, ("shape", "weights, GiB", "statistics, GiB", *measured, *computed))


def finetune() -> str:
    """Top-1 after compression, and after training everything, or adapters alone."""
    found = _read("finetune")
    lines = [
        (row["case"], f"{row['flops_kept']:.2f}", *(f"{row[key]:.1f}" for key in ("compressed", "trained", "adapted")))
        for row in found["results"]
    ]
    headers = ("FLOPs kept", "compressed", "all parameters trained", "adapters alone")
    return markdown(lines, (f"top-1, % (dense: {found['dense']:.1f})", *headers))


def timings() -> str:
    """Times of all cases, and their ratios to what they were measured in turn with."""
    lines = []
    for case in sorted(_read("timings")["benchmarks"], key=lambda case: case["group"]):
        ratios = case["extra_info"].get("ratios", {})
        compared = "; ".join(f"{found['median']:.2f} x {name}" for name, found in ratios.items())
        milliseconds = 1000 * case["stats"]["median"]
        name = re.sub(r"^test_", "", case["name"])
        lines.append((case["group"], f"`{name}`", f"{milliseconds:,.1f}", compared))
    return markdown(lines, ("group", "case", "median, ms", "median ratio"))


def _by_budget(*files: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What was measured for each model and runner, by budget, and the number of images."""
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, None] = {}
    for case in (case for file in files for case in _read(file)["benchmarks"]):
        _, model, *budget, count, runner = case["group"].split(", ")
        counts[count] = None
        rows.setdefault(f"{model}, {runner}", {})[budget[0]] = case["extra_info"]
    return rows, ", ".join(counts)


def realised() -> str:
    """What is left for each budget, how much of what FLOPs promise is real, and how much of the time budgets reach."""
    rows, images = _by_budget("realised", "realised_large")
    lines = []
    for name, found in rows.items():
        flops, latency = found["flops"], found.get("latency")
        cells = [flops["flops_kept"], flops["ratios"]["dense"]["median"], flops["realised"]]
        if latency is not None:
            cells = [latency["in_sites"], *cells, latency["flops_kept"], latency["ratios"]["dense"]["median"]]
        shown = [f"{cell:.2f}" for cell in cells]
        lines.append((name, *(shown if latency is not None else ["", *shown, "", ""])))
    headers = ("dense time in sites", "0.5 of FLOPs: FLOPs", "time", "realised", "0.5 of time: FLOPs", "time")
    return markdown(lines, (images, *headers))


def processors() -> str:
    """The same on a processor with AVX-512, and of FLOPs in bfloat16 with AMX."""
    (rows, images), (half, _) = _by_budget("realised_avx512", "realised_avx512_large"), _by_budget("realised_bfloat16")
    lines = []
    for name, found in rows.items():
        flops, latency = found["flops"], found["latency"]
        cells = [flops["ratios"]["dense"]["median"], flops["realised"]]
        cells += [latency["flops_kept"], latency["ratios"]["dense"]["median"]]
        if name in half:
            cells += [half[name]["flops"]["ratios"]["dense"]["median"], half[name]["flops"]["realised"]]
        lines.append((name, *(f"{cell:.2f}" for cell in cells), *[""] * (6 - len(cells))))
    headers = (
        "0.5 of FLOPs: time",
        "realised",
        "0.5 of time: FLOPs",
        "time",
        "bfloat16, 0.5 of FLOPs: time",
        "realised",
    )
    return markdown(lines, (images, *headers))


def int8() -> str:
    """The times of models compressed, with 8 bits, and both, relative to the dense ones in float32."""
    lines = []
    for processor, name in (("AVX2", "int8"), ("AMX", "int8_amx")):
        for case in _read(name)["benchmarks"]:
            _, model, form, _ = case["group"].split(", ")
            both = {rival: found["median"] for rival, found in case["extra_info"]["ratios"].items()}
            compressed, bits = (both["dense"] / both[rival] for rival in ("compressed", "dense, int8"))
            cells = (compressed, bits, compressed * bits, both["dense"])
            lines.append((f"{processor}: {model}, {form}", *(f"{cell:.2f}" for cell in cells)))
    return markdown(lines, ("time, 16 images, inductor", "compressed", "int8", "their product", "both, measured"))


def generation() -> str:
    """The times of a compressed language model relative to the dense one's."""
    lines: dict[str, list[str]] = {}
    headers: dict[str, None] = {}
    for case in _read("generation")["benchmarks"]:
        _, effort, task, count = case["group"].split(", ")
        found = case["extra_info"]
        lines.setdefault(effort, [f"{found['flops_kept']:.2f}"])
        lines[effort].append(f"{found['ratios']['dense']['median']:.2f}")
        headers[f"{task}, {count.replace('1 sequences', '1 sequence')}"] = None
    return markdown(
        [(f'`effort="{effort}"`', *cells) for effort, cells in lines.items()],
        ("x dense", "FLOPs", *headers),
    )


def pivots(name: str = "pivots") -> str:
    """The times of models with pivots relative to those of plain pairs of the same FLOPs, and to the dense models'."""
    lines: dict[str, list[str]] = {}
    headers: dict[str, None] = {}
    for case in _read(name)["benchmarks"]:
        _, model, count, _ = case["group"].split(", ")
        for rival, found in sorted(case["extra_info"]["ratios"].items(), reverse=True):
            lines.setdefault(model, []).append(f"{found['median']:.2f}")
            headers[f"x {rival}, {count.replace('1 images', '1 image')}"] = None
    return markdown([(model, *cells) for model, cells in lines.items()], ("time of pivots, inductor", *headers))


TABLES: Mapping[str, Callable[[], str]] = {
    "resnet20": lambda: accuracy("resnet20", 1024),
    "vit_tiny": lambda: accuracy("vit_tiny", 512, digits=1),
    "mobilenetv2": lambda: accuracy("mobilenetv2", 512, digits=1),
    "stories": lambda: accuracy("stories", 160, digits=1),
    "stories_flops": lambda: accuracy("stories_flops", 160, digits=1),
    "llama": llama,
    "samples": samples,
    "padding": padding,
    "published": published,
    "representative": representative,
    "costs": costs,
    "allocation": allocation,
    "quantization": quantization,
    "residual": residual,
    "zoo": zoo,
    "compression": compression,
    "bounds": bounds,
    "targets": targets,
    "memory": memory,
    "blocks": blocks,
    "timings": timings,
    "realised": realised,
    "processors": processors,
    "int8": int8,
    "generation": generation,
    "pivots": pivots,
    "pivots_amd": lambda: pivots("pivots_amd"),
    "finetune": finetune,
    "large": large,
    "scaling": scaling,
}


def filled(text: str) -> str:
    """The README with every table made anew.

    Raises:
        click.ClickException: a table has no place in it.
    """
    for name, table in TABLES.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            raise click.ClickException(f"there is no place for the table {name}: <!-- {name} --> and <!-- /{name} -->")
        made = table()
        text = place.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    return text


@click.command()
def main() -> None:
    """Replace the tables in benchmarks/README.md."""
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
