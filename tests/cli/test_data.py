"""Data for the command line: what is read, and that images are prepared as the libraries prepare them."""

import pytest
import torch

pytest.importorskip("PIL")

import numpy as np
from PIL import Image

from balf_fx.cli.data import Array, Preprocessing, choose, open_samples, read_labels
from balf_fx.errors import CalibrationError, OptionError

PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def picture(height=20, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, and something else."""
    (tmp_path / "cats").mkdir()
    for index, name in enumerate(("b.png", "cats/a.png", "cats/c.PNG")):
        picture(seed=index).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(20, 30), (33, 21), (16, 16)])
def test_images_are_prepared_as_torchvision_does(interpolation, shape):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*shape)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    steps = [
        transforms.Resize(18, transforms.InterpolationMode(interpolation)),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    given = Preprocessing(16, 18, mean, std, interpolation)(image)
    torch.testing.assert_close(given, transforms.Compose(steps)(image))


def test_without_a_size_images_stay_as_they_are():
    image = picture()
    assert torch.equal(PLAIN(image), torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_one_mean_makes_images_grey():
    image = picture()
    grey = Preprocessing(mean=(0.5,), std=(0.25,))(image)
    wanted = (torch.from_numpy(np.array(image.convert("L"))) / 255 - 0.5) / 0.25
    torch.testing.assert_close(grey, wanted.unsqueeze(0))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (1.0, 1.0, 1.0)), ((0.0, 0.0), (1.0, 1.0)), ((0.0,), (0.0,))])
def test_means_that_fit_no_image_are_an_error(mean, std):
    with pytest.raises(OptionError, match="three numbers each"):
        Preprocessing(mean=mean, std=std)


def test_a_folder_is_searched_and_read_in_order(folder):
    found = open_samples(folder)
    assert found.holds_images
    assert [path.name for path in found.paths] == ["b.png", "a.png", "c.PNG"]
    assert torch.equal(found.read([2, 0], PLAIN), torch.stack([PLAIN(picture(seed=2)), PLAIN(picture(seed=0))]))


def test_images_of_several_sizes_need_one(folder):
    picture(40, 40).save(folder / "large.png")
    found = open_samples(folder)
    with pytest.raises(CalibrationError, match="--image-size"):
        found.read(range(4), PLAIN)
    assert found.read(range(4), Preprocessing(8)).shape == (4, 3, 8, 8)


def test_damaged_images_and_empty_folders_are_errors(folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"broken\.jpg"):
        open_samples(folder).read(range(4), PLAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no images"):
        open_samples(tmp_path / "empty")
    with pytest.raises(OptionError, match="folder of images"):
        open_samples(folder, "x")


def test_bytes_are_images_whichever_way_channels_lie(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    for layout in (pixels, pixels.transpose(0, 3, 1, 2)):
        found = open_samples(save(tmp_path / "x.npz", x=layout))
        assert found.holds_images
        assert torch.equal(found.read(range(5), PLAIN), wanted)
    grey = Preprocessing(mean=(0.0,), std=(1.0,))
    for layout in (pixels[..., 0], pixels[..., :1], pixels[..., :1].transpose(0, 3, 1, 2)):
        assert torch.equal(Array(layout).read(range(5), grey), wanted[:, :1])


@pytest.mark.parametrize(
    ("given", "wanted"), [("float64", torch.float32), ("float16", torch.float32), ("int32", torch.int64)]
)
def test_other_arrays_are_taken_as_they_are(tmp_path, given, wanted):
    values = np.arange(12).reshape(4, 3).astype(given)
    found = open_samples(save(tmp_path / "x.npz", x=values))
    assert not found.holds_images
    read = found.read([3, 1], PLAIN)
    assert read.dtype == wanted
    assert read.tolist() == [[9, 10, 11], [3, 4, 5]]


def test_arrays_go_by_their_names(tmp_path):
    path = save(tmp_path / "two.npz", x=np.zeros((2, 3)), y=np.ones((2, 3)))
    assert open_samples(path, "y").values.sum() == 6
    with pytest.raises(OptionError, match="contains x, y: choose one with --array"):
        open_samples(path)
    with pytest.raises(OptionError, match="the arrays are: x, y"):
        open_samples(path, "z")


def test_what_is_no_data_is_an_error(tmp_path):
    (tmp_path / "text.npz").write_text("nothing of the kind")
    with pytest.raises(CalibrationError, match=r"neither an \.npz file nor a folder"):
        open_samples(tmp_path / "text.npz")
    with pytest.raises(CalibrationError, match="cannot read"):  # it would have to be unpickled
        open_samples(save(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object)))
    for values in (np.zeros(3), np.zeros((0, 3)), np.array([["a", "b"]])):
        with pytest.raises(CalibrationError, match="array of numbers"):
            open_samples(save(tmp_path / "x.npz", x=values))


def test_images_have_a_number_of_channels_that_images_have(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 5, 8, 8), np.uint8))
    with pytest.raises(CalibrationError, match=r"1 to 4 channels, but the array is \(2, 5, 8, 8\)"):
        open_samples(tmp_path / "data.npz").read([0], Preprocessing())


def test_only_files_of_arrays_have_labels(tmp_path):
    with pytest.raises(OptionError, match=r"labels are an array in the .* is no \.npz file"):
        read_labels(tmp_path, "y")


def test_labels_are_whole_numbers(tmp_path):
    path = save(tmp_path / "x.npz", y=np.array([2, 0], dtype=np.uint8), z=np.array([0.5]))
    labels = read_labels(path, "y")
    assert (labels.dtype, labels.tolist()) == (torch.int64, [2, 0])
    with pytest.raises(OptionError, match="whole numbers"):
        read_labels(path, "z")


def test_choices_follow_the_seed_and_a_longer_one_goes_on():
    assert choose(100, 10, 0) == choose(100, 30, 0)[:10] != choose(100, 10, 1)
    assert sorted(choose(20, 50, 0)) == list(range(20))
