"""Every figure in the text of the READMEs follows from the results or from the code, and so do its claims.

Tables have tests of their own.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
from torch import nn

from balf_fx.cli.demo import Demo, Figures
from balf_fx.dynamo.options import BackendOptions
from balf_fx.engine.settings import Settings
from balf_fx.graph.site import _ADDED, MOVE

ROOT = Path(__file__).parents[2]
FRONT, PASSES, MEASUREMENTS = (ROOT / "README.md", ROOT / "passes" / "README.md", ROOT / "benchmarks" / "README.md")
NAMES = re.compile(
    r"ResNet-\d+|MobileNetV2|CIFAR-10|ViT-Tiny/16|stories260K|b?float(?:16|32|64)|int8|AVX2|AVX-512|AMX|PT2E"
    r"|[Tt]op-1|Python 3\.\d+|PyTorch 2\.\d+"
)
WORDS = {3: "three", 6: "six", 8: "eight"}


def prose(path):
    """The text in one line, without code, tables and links."""
    text = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", text)
    return " ".join(text.split()).replace("*", "")


def left_over(text, claims):
    """The words with figures that none of the claims has, names left aside; each claim is in the text."""
    for claim in claims:
        assert claim in text, claim
        text = text.replace(claim, "")
    return re.findall(r"\S*\d\S*", NAMES.sub("", text))


@pytest.fixture
def read(load_benchmark):
    return load_benchmark("readme_tables")._read


@pytest.fixture
def rows(read):
    """The rows of a file of accuracies by method and budget, for the model's own calibration data."""

    def find(name):
        found = read(name)["results"]
        images = max(row["images"] for row in found if row["method"] == "svd")
        return {
            (row["method"], row["budget"]): row for row in found if row["images"] == images and not row["seed"]
        }, images

    return find


def test_figures_of_the_front_page(read, rows):
    resnet, demo, memory = read("accuracy_resnet20"), read("demo"), read("memory")
    (small,) = (row for row in memory["results"] if row["batch_size"] == 32)
    losses = re.search(r"loses .*? % FLOPs", prose(FRONT))[0]  # compared in test_readme_tables.py
    claims = [
        f"{resnet['dense']['top1']:.2f} %) on {resnet['answers']:,} test images",
        f"the same {rows('accuracy_resnet20')[1]:,} unlabelled images",
        losses,
        f'("{demo["budget"]:.0%}'.replace("%", " % of the FLOPs"),
        f"compresses it to {demo['budget']:.0%}".replace("%", " % of its FLOPs"),
        "in at most 2 % of its predictions",  # an example
        f"certified at {Settings(flops=0.5).confidence:.0%}".replace("%", " %"),
        f"takes about {small['seconds'] / 60:.0f} minutes for a ResNet-50 and {small['images']} images of 224 x 224",
        f"({BackendOptions(Settings(flops=0.5)).calibration_steps})",
    ]
    assert left_over(prose(FRONT), claims) == []
    assert left_over(prose(PASSES), []) == []


def test_the_front_page_shows_the_demo(read):
    found = {name: value for name, value in read("demo").items() if name in Demo.__dataclass_fields__}
    models = {name: Figures(**found[name]) for name in ("dense", "compressed")}
    table = "\n".join(line.rstrip() for line in str(Demo(**{**found, **models})).splitlines())
    shown = "\n".join(line.rstrip() for line in FRONT.read_text().splitlines())
    assert f"```\n{table}\n```" in shown


def test_figures_of_the_measurements(read, rows, load_benchmark):
    resnet, vit = read("accuracy_resnet20"), read("accuracy_vit_tiny")
    padding, unlike, memory = read("padding_80"), read("representative"), read("memory")
    quantized = {found["model"]: found for found in read("quantization")["models"]}
    zoo, texts, tuned, blocks = read("zoo"), load_benchmark("stories"), read("finetune"), read("blocks")
    sources = [row["source"] for row in zoo["results"]]
    architectures = {
        row["name"].removesuffix(load_benchmark("zoo_transformers").UNMASKED)
        for row in zoo["results"]
        if row["source"] == "transformers"
    }
    (problem,) = (row for row in zoo["results"] if row["problems"])
    (grown,) = re.findall(r"in float64 by (\S+)", problem["problems"][0])
    share = vit["dense"]["top1"] / 100
    error = 100 * math.sqrt(share * (1 - share) / vit["answers"])
    settings, large = padding["options"], read("large")
    small, billion = large["results"]
    (_, paper, *_) = load_benchmark("shapes").on_paper(small)
    longer = 3600 * paper["hours"] / billion["seconds"]
    pivots = [(case["group"], case["extra_info"]["ratios"]) for case in read("pivots")["benchmarks"]]
    slowest = {rival: max(ratios[rival]["median"] for _, ratios in pivots) for rival in ("dense", "pairs")}
    amd = {case["group"]: case["extra_info"]["ratios"]["pairs"]["median"] for case in read("pivots_amd")["benchmarks"]}
    single = {group for group in amd if "ViT-Tiny" in group and ", 1 images" in group}
    alone, rest = (max(amd[group] for group in groups) for groups in (single, amd.keys() - single))
    images, many = (load_benchmark("subjects").SUBJECTS[f"ResNet-50{more}"]() for more in ("", ", 256 images"))
    times = load_benchmark("targets").BATCHES
    writer, shape = load_benchmark("bench_generation"), load_benchmark("subjects")._LARGE
    wide, hidden = shape["hidden_size"], shape["intermediate_size"]
    weights = 2 * 32_000 * wide + shape["num_hidden_layers"] * wide * (4 * wide + 3 * hidden)
    claims = [
        f"A Llama of {weights / 1e6:.0f} million random weights",
        f"to read a prompt of {writer.PROMPT} tokens, and to write {writer.WRITTEN} tokens",
        "more than 3 % longer than pairs",
        f"up to {alone:.2f} of the pairs' time for ViT-Tiny with one image, and up to {rest:.2f} otherwise",
        f"pivots from a rank of {MOVE * _ADDED:.0f} only",
        f"batches of {times['ViT-Tiny']} images, or of {times['ResNet-20']} for ResNet-20",
        "Llama in bfloat16",  # of `large.build`
        f"{small['shape']}, {billion['shape']} would take {longer:.1f} times as long as it does",
        f"at {100 * large['params']:.0f} % of the parameters",
        f"{large['options']['sequences']} sequences of {large['options']['length']} tokens",
        f"top-1 on {resnet['answers']:,} test images",
        f"the same {rows('accuracy_resnet20')[1]:,} training images",
        f"top-1 on {vit['answers']:,} validation images after calibration on {rows('accuracy_vit_tiny')[1]} training",
        f"(standard error {error:.1f} points)",
        f"perplexity on {texts.EVALUATION_STORIES} stories",
        f"calibrated on {rows('accuracy_stories')[1]} sequences of {texts.LENGTH} tokens",
        f"calibrated on {settings['sequences']} sequences of {settings['length']} tokens",
        f"padded to {4 * settings['length']} tokens",
        f"of {texts.EVALUATION_STORIES} other stories",
        f"calibrated on {unlike['options']['images']:,} images of all classes",
        f"compressed to {100 * memory['flops']:.0f} % of its FLOPs with a refit",
        f"{memory['results'][0]['images']} images of 224 x 224",
        f"A Llama shape of {blocks['results'][0]['weights'] * 2**30 / 4e6:.0f} million random weights",
        f"at {100 * blocks['flops']:.0f} % of the FLOPs",
        "as much memory as batches of 32",
        f"{sum(map(len, images.calibration))} images of 224 x 224 or",
        f"{sum(map(len, many.calibration))} images where it says so",
        f"a model to {100 * read('bounds')['flops']:.0f} % of its FLOPs, above",
        f"at {100 * load_benchmark('subjects').FLOPS:.0f} % of the FLOPs",
        f"is compressed to {quantized['resnet20']['flops']:g} and ViT-Tiny to {quantized['vit_tiny']['flops']:g} of",
        f"to {quantized['stories']['params']:g} of its parameters",
        f"judged by {quantized['resnet20']['answers']:,} and {quantized['vit_tiny']['answers']} images",
        f"compressed to {100 * zoo['budget']:.0f} % of their FLOPs",
        f"at budget 1, finite outputs and the counted FLOPs at {zoo['budget']:g}",
        f"of at most {load_benchmark('zoo_subject').LARGEST / 1e6:.0f} million parameters",
        f"of each of {sources.count('timm')} families",
        f"of transformers {len(architectures)} architectures",
        f"grows to {float(grown):.0e}".replace("e-0", "e-"),
        f"on {tuned['images']} held-out handwritten digits",
        f"of rank {load_benchmark('finetune').RANK} on the layers",
    ]
    assert left_over(prose(MEASUREMENTS), claims) == []
    assert slowest["dense"] < 1
    assert slowest["pairs"] < 1.03
    threads = {
        "realised": 1,
        "realised_large": 1,
        "realised_avx512": 1,
        "realised_bfloat16": 1,
        "int8": 1,
        "int8_amx": 1,
        "generation": 1,
        "compression": 1,
        "pivots": 2,
        "pivots_amd": 2,
    }
    assert {name: read(name)["machine_info"]["threads"] for name in threads} == threads
    assert writer.SHARE == 0.5
    assert {case["extra_info"]["cache"] for case in read("generation")["benchmarks"]} == {1.0}
    assert f"{WORDS[tuned['options']['tune']]} epochs, of all parameters" in prose(MEASUREMENTS)
    assert f"The one with a problem is `{problem['name']}`" in MEASUREMENTS.read_text()
    assert rows("accuracy_mobilenetv2")[1] == rows("accuracy_vit_tiny")[1]
    assert read("accuracy_mobilenetv2")["answers"] == vit["answers"]
    assert (unlike["flops"], unlike["options"]["images"]) == (0.5, rows("accuracy_resnet20")[1])


def test_what_is_said_of_accuracy(read, rows, load_benchmark):
    found, _ = rows("accuracy_resnet20")
    once = ("svd", "svd-llm", "air", "balf", "fast")
    assert found["ours", 0.3]["top1"] > 75
    assert all(found[method, 0.3]["top1"] < 25 for method in once)
    (found, _), dense = rows("accuracy_vit_tiny"), read("accuracy_vit_tiny")["dense"]["top1"]
    assert 2 < dense - found["ours", 0.8]["top1"] < 3  # points
    assert all(dense - found[method, 0.8]["top1"] > 50 for method in ("svd", "svd-llm", "air", "balf"))
    (found, _), dense = rows("accuracy_mobilenetv2"), read("accuracy_mobilenetv2")["dense"]["top1"]
    assert all(found[method, 0.8]["top1"] < 10 for method in ("svd", "svd-llm", "air", "balf"))
    assert dense - found["ours", 0.8]["top1"] < 5
    (found, _), dense = rows("accuracy_stories"), read("accuracy_stories")["dense"]["perplexity"]
    for method, budget in itertools.product(("svd", "svd-llm", "air", "balf"), (0.8, 0.6, 0.4)):
        ours = found["ours", budget]["perplexity"] - dense
        assert 0 < ours < (found[method, budget]["perplexity"] - dense) / 3
    texts = load_benchmark("stories")
    layers = {name: layer for name, layer in texts.Llama().named_modules() if isinstance(layer, nn.Linear)}
    queries = [layer for name, layer in layers.items() if name.endswith("wq")]
    products = sum(2 * texts.LENGTH * layer.out_features for layer in queries)  # for each position
    assert products > sum(layer.weight.numel() for layer in layers.values())


def test_what_is_said_of_other_calibration_data(read):
    ours = [row for row in read("accuracy_resnet20")["results"] if row["method"] == "ours"]
    top1 = {(row["images"], row["seed"], row["budget"]): row["top1"] for row in ours}
    gains = [top1[1024, 0, budget] - top1[64, 0, budget] for budget in (0.7, 0.5, 0.3)]
    assert gains == sorted(gains)
    changes = [abs(top1[1024, 1, budget] - top1[1024, 0, budget]) for budget in (0.7, 0.5, 0.3)]
    assert max(changes[:2]) < 1 < changes[2] < 2


def test_what_is_said_of_padding(read):
    lost = {
        budget: {(row["side"], row["counts"]): row["nats_lost"] for row in read(f"padding_{budget}")["results"]}
        for budget in (80, 40)
    }
    for own in lost.values():
        assert own["right", False] == pytest.approx(own["none", False], abs=1e-3)
        assert own["left", False] == pytest.approx(own["none", False], abs=1e-3)
    costs = [own[side, True] - own["none", False] for own in lost.values() for side in ("right", "left")]
    assert sum(cost < 0 for cost in costs) == 1


def test_what_is_said_of_memory(read):
    peaks = {row["batch_size"]: row["peak_gib"] for row in read("memory")["results"]}
    assert peaks[256] == pytest.approx(peaks[32], rel=0.01)  # a batch is run in pieces


def test_what_is_said_of_allocations(read):
    rows = read("allocation_resnet20")["results"]
    columns = [(0.5, False), (0.3, False), (0.5, True), (0.3, True)]
    tables = [
        {row["weighting"]: row["top1"] for row in rows if (row["budget"], row["refit"]) == column} for column in columns
    ]
    for table in tables:
        del table["as measured"]
    best = [max(table, key=table.get) for table in tables]
    assert best[0] != best[1]  # it differs from budget to budget,
    assert best[:2] != best[2:]  # and what is best before a refit is not after it
    for column in columns:  # three lowest divergences on test images
        lost = {row["weighting"]: row["kl"] for row in rows if (row["budget"], row["refit"]) == column}
        own = lost.pop("as measured")
        assert sum(other < own for other in lost.values()) <= 2


def test_what_is_said_of_quantization(read):
    top1, rise = {}, {}
    for model in read("quantization")["models"]:
        rows = {(row["variant"], row["quantization"]): row for row in model["results"]}
        for (variant, how), row in rows.items():
            plain = rows[variant, "none"]
            top1[model["model"], variant, how] = plain["top1"] - row["top1"]
            rise[model["model"], variant, how] = row["perplexity"] / plain["perplexity"] - 1
    for (model, variant, how), lost in top1.items():
        if variant == "compressed" and "8" in how:
            assert abs(lost) < 0.6
            assert abs(top1[model, "dense", how]) < 0.6
            assert model == "resnet20" or rise[model, variant, how] < 0.005
            assert model != "resnet20" or rise[model, variant, how] > rise[model, "dense", how]
        if variant == "compressed" and "4" in how:
            assert lost > 1.5 * top1[model, "dense", how]


def test_what_is_said_of_times_in_bfloat16(read):
    times = {}
    for name in ("realised_avx512", "realised_avx512_large", "realised_bfloat16"):
        for case in read(name)["benchmarks"]:
            _, model, budget, *_, runner = case["group"].split(", ")
            if budget == "flops" and runner == "inductor":
                times.setdefault(model, []).append(case["extra_info"]["ratios"]["dense"]["median"])
    both = {model: found for model, found in times.items() if len(found) == 2}
    assert both.keys() == {"MobileNetV2", "SqueezeNet", "ResNet-18", "ResNet-50", "ViT-Tiny", "Swin-T"}
    for model, (single, half) in both.items():
        assert abs(half - single) < 0.06 if "ResNet" in model else half > 1.1 * single


@pytest.mark.parametrize(("name", "slower"), [("int8", 1.1), ("int8_amx", 1.05)])
def test_what_is_said_of_the_time_of_int8(read, name, slower):
    bits = {}
    for case in read(name)["benchmarks"]:
        _, model, form, count = case["group"].split(", ")
        both = {rival: found["median"] for rival, found in case["extra_info"]["ratios"].items()}
        product = both["dense"] ** 2 / (both["compressed"] * both["dense, int8"])
        bits[model, form] = both["compressed"]
        assert count == "16 images"
        assert case["extra_info"]["flops_kept"] == pytest.approx(0.5, abs=0.01)
        lost = both["dense"] / product
        if name == "int8":
            assert (lost < 1.1) if form == "pairs" else (lost > 1.03)
            continue
        assert lost > 1.1
        assert "ResNet" not in model or 6.5 < both["dense, int8"] / both["dense"] < 8.5
        assert form == "pivots" or (0.95 if model == "SqueezeNet" else 0) < both["dense, int8"] < 1
    models = {model for model, _ in bits}
    assert len(bits) == 2 * len(models)
    for model in models:
        assert bits[model, "pivots"] > slower * bits[model, "pairs"]


def test_what_is_said_of_corrections(read):
    """Another bit, or smaller groups, lose less at no more bytes than a correction, or as few bytes more as do not."""
    for names in (("residual_vit_tiny", "residual_vit_tiny_rows"), ("residual_stories",)):
        dense = [row for name in names for row in read(name)["results"] if row["model"] == "dense"]
        plain = [row for row in dense if not row["rank"]]
        for corrected in (row for row in dense if row["rank"] and row["bits"] == 4):
            assert any(row["kl"] < corrected["kl"] and row["bytes"] < 1.02 * corrected["bytes"] for row in plain)


def test_what_is_said_of_fine_tuning(read):
    found = read("finetune")
    for row in found["results"]:
        for after in ("trained", "adapted"):
            assert row[after] - row["compressed"] > (found["dense"] - row["compressed"]) / 2


def test_what_is_said_of_classes_that_calibration_never_saw(read):
    dense, *found = read("representative")["results"]
    unlike = [row for row in found if row["calibration"] == "the first five classes"]
    assert {row["effort"] for row in unlike} == {"fast", "balanced", "best"}
    assert all(dense["others"] - row["others"] > 1.5 * (dense["seen"] - row["seen"]) for row in unlike)
