import json

import pytest
import torch


@pytest.mark.slow
def test_calibration_data_differ_and_are_judged_apart(load_benchmark, data_folder, tmp_path):
    representative, testing = load_benchmark("representative"), load_benchmark("click.testing")
    output = tmp_path / "results.json"
    arguments = ["--images", "16", "--evaluate", "64", "--flops", "0.8", "--effort", "fast"]
    arguments += ["--data", str(data_folder), "--json", str(output)]
    result = testing.CliRunner().invoke(representative.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    dense, *rows = json.loads(output.read_text())["results"]
    assert dense["calibration"] == ""
    assert [row["calibration"] for row in rows] == ["all classes", "the first five classes", "noise"]
    assert {row["effort"] for row in rows} == {"fast"}
    assert all(row["flops_kept"] <= 0.8 for row in rows)


def test_only_images_of_the_first_classes_are_taken(load_benchmark):
    representative, task = load_benchmark("representative"), load_benchmark("task")
    images = torch.zeros(40, 3, 2, 2)
    images[:, 0, 0, 0] = torch.arange(40) % 10  # the class

    def model(batch):
        return torch.nn.functional.one_hot(batch[:, 0, 0, 0].long(), 10).float()

    one = task.Task("", model, images.split(8), 40, [(images, images[:, 0, 0, 0].long())], "top1", "flops", ())
    found = representative.calibrations(one, 15)
    assert torch.cat(found["the first five classes"])[:, 0, 0, 0].unique().tolist() == [0, 1, 2, 3, 4]
    assert {name: sum(map(len, batches)) for name, batches in found.items()} == dict.fromkeys(found, 15)
    turned = lambda batch: model(batch).roll(5 * int(batch[0, 0, 0, 0] > 9), -1)  # noqa: E731
    assert representative.top1(turned, one) == (100.0, 100.0)
    assert representative.top1(lambda batch: model(batch.clamp(max=4)), one) == (100.0, 0.0)
