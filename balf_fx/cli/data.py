"""Data for the command line: a folder of images, or an array in an .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from balf_fx.errors import CalibrationError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

try:
    import numpy as np
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise MissingExtraError('the command line needs numpy and pillow: pip install "balf-fx[cli]"') from error


_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images for a model; the defaults are those of most models for ImageNet.

    Attributes:
        size: the side of the square crop at the centre; None keeps images as they are.
        resize: the size to which the shorter side is resized first; None for `size`.
        mean, std: mean and standard deviation of the channels, for values in [0, 1]: three for colour, one for grey.
        interpolation: the interpolation of the resizing, by pillow's name in lower case.
    """

    size: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise OptionError(
                f"mean and std must be three numbers each, or one for grey, not {self.mean} and {self.std}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as [channels, height, width]."""
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        if self.size is not None:
            image = _centre(image, self.size, self.resize or self.size, self.interpolation)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(image.height, image.width, -1) / 255
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageFolder:
    """Image files."""

    paths: tuple[Path, ...]
    holds_images = True

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int], preprocessing: Preprocessing, progress: bool = False) -> Tensor:
        """The images as [samples, channels, height, width]."""
        bar = tqdm(indices, desc="reading images", unit="image", disable=not progress, leave=False)
        return _stack([preprocessing(_open(self.paths[index])) for index in bar])


@dataclass(frozen=True)
class Array:
    """An array of samples: images of type uint8, [N, H, W], [N, H, W, C] or [N, C, H, W], or inputs of the model."""

    values: NDArray[Any]

    @property
    def holds_images(self) -> bool:
        """Whether the samples are images that need preprocessing."""
        return self.values.dtype == np.uint8 and self.values.ndim in (3, 4)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Sequence[int], preprocessing: Preprocessing, progress: bool = False) -> Tensor:
        """The samples as [samples, ...], float32 or int64."""
        chosen = self.values[list(indices)]
        if self.holds_images:
            if chosen.ndim == 4 and chosen.shape[-1] not in (1, 3):
                chosen = chosen.transpose(0, 2, 3, 1)
            if chosen.ndim == 4 and chosen.shape[-1] > 4:
                raise CalibrationError(
                    f"images of type uint8 have 1 to 4 channels, but the array is {self.values.shape}: pass inputs of "
                    "the model as an array of float32"
                )
            if chosen.ndim == 4 and chosen.shape[-1] == 1:
                chosen = chosen[..., 0]
            bar = tqdm(chosen, desc="reading images", unit="image", disable=not progress, leave=False)
            return _stack([preprocessing(Image.fromarray(pixels)) for pixels in bar])
        whole = np.issubdtype(chosen.dtype, np.integer)
        return torch.from_numpy(chosen.astype(np.int64 if whole else np.float32))


Samples = ImageFolder | Array


def open_samples(path: Path, name: str | None = None) -> Samples:
    """Open the samples at a path.

    Args:
        path: a folder, searched recursively, or an .npz file.
        name: the name of the array in the file; None for the only one.

    Raises:
        CalibrationError: there are no samples, or they cannot be read.
        OptionError: the name is missing, or there is no such array.
    """
    if path.is_dir():
        if name is not None:
            raise OptionError(f"{path} is a folder of images, and has no array {name!r}")
        found = tuple(sorted(each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES))
        if not found:
            raise CalibrationError(f"there are no images in {path}: files may end in {', '.join(_SUFFIXES)}")
        return ImageFolder(found)
    values = _read_array(path, name)
    if values.ndim < 2 or len(values) == 0 or not np.issubdtype(values.dtype, np.number):
        raise CalibrationError(
            f"calibration requires an array of numbers [samples, ...], not {values.dtype} {values.shape}"
        )
    return Array(values)


def read_labels(path: Path, name: str) -> Tensor:
    """The array of classes [N] in an .npz file, as int64.

    Raises:
        OptionError: there is no such array, or it cannot be used as labels.
    """
    if not zipfile.is_zipfile(path):
        raise OptionError(f"labels are an array in the .npz file of the data, but {path} is no .npz file")
    values = _read_array(path, name)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise OptionError(f"labels must be whole numbers, one for each sample, not {values.dtype} {values.shape}")
    return torch.from_numpy(values.astype(np.int64))


def choose(available: int, count: int, seed: int) -> list[int]:
    """The indices of `count` random samples, or of all if there are fewer, in the order in which they are drawn."""
    order = torch.randperm(available, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return [int(index) for index in order[:count]]


def _read_array(path: Path, name: str | None) -> NDArray[Any]:
    if not zipfile.is_zipfile(path):
        raise CalibrationError(f"{path} is neither an .npz file nor a folder")
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays.files)
        if name is None and len(names) != 1:
            raise OptionError(f"{path} contains {', '.join(names) or 'nothing'}: choose one with --array")
        if name is not None and name not in names:
            raise OptionError(f"there is no array {name!r} in {path}; the arrays are: {', '.join(names)}")
        try:
            return np.asarray(arrays[name or names[0]])
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise CalibrationError(f"cannot read {name or names[0]!r} of {path}: {error}") from error


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise CalibrationError(f"cannot read the image {path}: {error}") from error
    return image


def _stack(images: Sequence[Tensor]) -> Tensor:
    if len({image.shape for image in images}) > 1:
        raise CalibrationError("the images differ in size: pass --image-size to resize them")
    return torch.stack(list(images))


def _centre(image: Image.Image, size: int, resize: int, interpolation: str) -> Image.Image:
    """Resize the shorter side to `resize`, and crop a square of `size` at the centre."""
    scale = max(resize, size) / min(image.size)
    width, height = (max(int(side * scale), size) for side in image.size)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
