"""The trained models answer as they should, so that weights, preprocessing and data belong together."""

import itertools
import struct

import pytest
import torch
from click.testing import CliRunner


def test_missing_data_is_a_clean_error(load_benchmark, tmp_path):
    for name in load_benchmark("models").MODELS:
        result = CliRunner().invoke(load_benchmark("accuracy").main, ["--model", name, "--data", str(tmp_path)])
        assert result.exit_code == 1
        assert "--data" in result.output
        assert "Traceback" not in result.output


def test_weights_of_another_model_are_a_clean_error(load_benchmark, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    result = CliRunner().invoke(load_benchmark("accuracy").main, ["--weights", str(tmp_path / "other.pth")])
    assert result.exit_code == 1
    assert "holds no weights of ResNet20" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("resnet20", 88), ("vit_tiny", 75), ("mobilenetv2", 75)])
def test_image_classifiers_are_mostly_right(load_benchmark, load_task, name, least):
    task = load_task(name, images=8, evaluate=64)
    judge = load_benchmark("evaluation").Judge(task)
    assert judge.answers == 64
    assert judge.dense.top1 >= least
    assert judge.dense.kl == pytest.approx(0, abs=1e-6)
    assert sum(len(batch) for batch in task.calibration) == task.samples == 8


def test_the_language_model_has_its_perplexity(load_benchmark, load_task):
    judge = load_benchmark("evaluation").Judge(load_task("stories"))
    assert judge.dense.perplexity == pytest.approx(3.53, abs=0.01)


def test_calibration_text_is_the_stories_and_nothing_else(load_benchmark, load_task):
    stories, task = load_benchmark("stories"), load_task("stories")
    assert all(batch.shape[1] == stories.LENGTH for batch in task.calibration)
    assert task.samples == sum(len(batch) for batch in task.calibration)
    texts = [[1, 2, 3], [4] * (stories.LENGTH - 3), [5] * stories.LENGTH]
    found = stories.cut(texts, seed=0)
    assert found.flatten().sort().values.tolist() == sorted(token for text in texts for token in text)
    assert not torch.equal(found, stories.cut(texts, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vit_tiny", "mobilenetv2"])
def test_no_image_that_judges_is_calibrated_on(load_task, name):
    task = load_task(name, images=64, evaluate=64)
    seen = {image.numpy().tobytes() for batch in task.calibration for image in batch}
    judged = {image.numpy().tobytes() for batch, _ in task.evaluation for image in batch}
    assert len(seen) == len(judged) == 64
    assert seen.isdisjoint(judged)


def test_no_story_that_judges_is_calibrated_on(load_task):
    task = load_task("stories")
    seen = [" ".join(map(str, batch.flatten().tolist())) for batch in task.calibration]
    for batch, _ in itertools.islice(task.evaluation, 20):
        for row in batch[:, :64].tolist():
            assert not any(" ".join(map(str, row)) in text for text in seen)


@pytest.mark.parametrize("name", ["resnet20", "vit_tiny", "stories"])
def test_the_seed_decides_on_the_calibration_data(load_task, name):
    first, same, other = (load_task(name, images=8, evaluate=1, seed=seed).calibration[0] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["resnet20", "vit_tiny", "stories"])
def test_more_calibration_data_than_there_is_is_a_clean_error(load_benchmark, load_task, name):
    with pytest.raises(load_benchmark("click").ClickException, match="--images 20000"):
        load_task(name, images=20_000)


def test_a_tokenizer_merges_the_best_pair_first(load_benchmark, tmp_path):
    pieces = [b"", b"<s>", b"</s>", *(b"<%d>" % byte for byte in range(256))]
    scores = {b" ": 0.0, b"a": 0.0, b"b": 0.0, b"ab": 1.0, b"ba": 2.0, b" a": 0.5}
    pieces += scores
    entries = (struct.pack("<fi", scores.get(piece, 0.0), len(piece)) + piece for piece in pieces)
    (tmp_path / "tokens.bin").write_bytes(bytes(4) + b"".join(entries))
    tokenizer = load_benchmark("stories").Tokenizer(tmp_path / "tokens.bin")
    assert [pieces[token] for token in tokenizer.encode("aba")] == [b"<s>", b" a", b"ba"]
    assert [pieces[token] for token in tokenizer.encode("é")] == [b"<s>", b" ", b"<195>", b"<169>"]


def test_resnet20_has_the_published_size(load_benchmark):
    model = load_benchmark("cifar").ResNet20()
    convolutions_and_head = sum(p.numel() for name, p in model.named_parameters() if "bn" not in name)
    assert convolutions_and_head == 268_346


def test_divergence_is_kullback_and_leiblers(load_benchmark):
    wanted, given = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    kl = load_benchmark("evaluation").divergence([wanted.log()], [given[:1].log(), given[1:].log()])
    assert kl == pytest.approx(float((wanted * (wanted / given).log()).sum() / 2))
