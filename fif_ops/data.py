"""Labelled images for the demo: scikit-learn's bundled digits, or any folder of class folders.

Images are kept as one uint8 tensor and transformed a batch at a time in the order of the CIFAR-10 course (S1, 7.1):
normalise, random crop with padding 4, random horizontal flip. Because the crop pads after the normalisation, its border
has the training set's mean colour and is not black.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CROP_PADDING = 4  # pixels, S1 7.1
SPLIT_SEED = 0  # apart from the training seed, so that runs with different seeds share one test set
TEST_SHARE = 0.2
DECODE_CHUNK = 256  # files between two reports of progress

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` while images are decoded."""


class DataError(ValueError):
    """The images asked for cannot be used; the message says which and what would be right."""


class Images(NamedTuple):
    """Decoded images and their labels."""

    pixels: Tensor  # uint8 [N, 3, size, size]
    labels: Tensor  # int64 [N]


class Splits(NamedTuple):
    """A training set and a test set over the same classes."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    flip: bool  # whether a mirrored image still shows its class
    unreadable: tuple[str, ...] = ()  # files left out, relative to the folder asked for


class Statistics(NamedTuple):
    """Mean and standard deviation of each colour channel on the scale 0 to 1, float32 [3] each."""

    mean: Tensor
    std: Tensor


class ImageBatches(Dataset):
    """Serves normalised float32 batches of ``images``; with ``augment`` cropped (and mirrored) at random.

    Fetched through a DataLoader a whole batch is made at once. ``generator`` drives the augmentation only, so the crops
    do not depend on how much of torch's global random state the training uses.
    """

    def __init__(
        self,
        images: Images,
        statistics: Statistics,
        *,
        augment: bool = False,
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.images = images
        self.mean = (255.0 * statistics.mean).view(1, 3, 1, 1)
        self.std = (255.0 * statistics.std).view(1, 3, 1, 1)
        self.augment = augment
        self.flip = flip
        self.generator = generator

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, labels = self.__getitems__([index])
        return pixels[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        batch = (self.images.pixels[chosen].float() - self.mean) / self.std
        if self.augment:
            batch = random_crop(batch, CROP_PADDING, self.generator)
            if self.flip:
                batch = random_flip(batch, self.generator)
        return batch, self.images.labels[chosen]


def random_crop(batch: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Zero-pads [B, C, H, W] by ``padding`` on every side and cuts an H x W window at its own place for each image."""
    count, _, height, width = batch.shape
    windows = F.pad(batch, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2p+1, 2p+1, H, W]
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, top, left]


def random_flip(batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirrors each image of [B, C, H, W] left to right with probability one half."""
    mirrored = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)


def channel_statistics(pixels: Tensor) -> Statistics:
    """Statistics of uint8 ``pixels`` [N, 3, H, W], exact, from a histogram: no floating-point copy of the images."""
    counts = torch.stack([torch.bincount(pixels[:, channel].reshape(-1), minlength=256) for channel in range(3)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (shares * levels).sum(1)
    variance = (shares * (levels - mean[:, None]) ** 2).sum(1)
    # A set of one flat colour has no spread: half a grey level keeps the division finite.
    return Statistics(mean.float(), variance.sqrt().clamp(min=0.5 / 255).float())


def training_batches(splits: Splits, statistics: Statistics, batch_size: int, seed: int) -> DataLoader:
    """Shuffled, augmented batches; the order and the crops depend on ``seed`` alone. Incomplete batches are dropped."""
    dataset = ImageBatches(
        splits.train,
        statistics,
        augment=True,
        flip=splits.flip,
        generator=torch.Generator().manual_seed(seed + 1),
    )
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_as_is,
    )


def evaluation_batches(images: Images, statistics: Statistics, batch_size: int) -> DataLoader:
    """Normalised batches in the images' order, the last one as long as it is."""
    return DataLoader(ImageBatches(images, statistics), batch_size=batch_size, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch  # ImageBatches makes whole batches; there is nothing left to collate


def digits(size: int = 32, limit: int | None = None) -> Splits:
    """The 1,797 scanned digits that scikit-learn carries, 8x8, enlarged to ``size`` and repeated over three channels.

    ``limit`` keeps at most so many images of each class. No horizontal flip: a mirrored 2 is no 2.
    """
    bundle = load_digits()
    scans = torch.from_numpy(bundle.images).float()[:, None] * (255 / 16)  # grey levels 0 to 16
    enlarged = F.interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    pixels = enlarged.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bundle.target).long()
    if limit is not None:
        kept = torch.cat([(labels == digit).nonzero()[:limit, 0] for digit in range(10)])
        pixels, labels = pixels[kept], labels[kept]
    train, test = stratified_split(Images(pixels.contiguous(), labels), [str(digit) for digit in range(10)])
    return Splits("digits", tuple(str(digit) for digit in range(10)), train, test, flip=False)


def class_folders(
    root: str | Path, size: int = 32, limit: int | None = None, progress: Progress | None = None
) -> Splits:
    """Images of ``root/<class>/*``, or of ``root/train/<class>/*`` and ``root/test/<class>/*``, cut to squares of
    ``size`` pixels and decoded once.

    Without train and test folders a fixed stratified fifth becomes the test set. ``limit`` keeps at most so many images
    of each class folder. Files that cannot be read are left out and named in ``unreadable``.
    Raises DataError for a folder that is missing, holds no class folders, a class without images or a single class.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data folder {str(root)!r} does not exist; give a folder that holds one folder per class")
    train_root, test_root = root / "train", root / "test"
    if not (train_root.is_dir() and test_root.is_dir()):
        classes = _class_names(root)
        images, _, unreadable = _decode(_listing(root, classes, limit), size, root, progress)
        train, test = stratified_split(images, classes)
        return Splits(root.resolve().name, classes, train, test, True, unreadable)
    classes = _class_names(train_root)
    strangers = sorted(set(_class_names(test_root)) - set(classes))
    if strangers:
        raise DataError(f"{str(test_root)!r} has class folders that {str(train_root)!r} lacks: {', '.join(strangers)}")
    tested = [name for name in classes if (test_root / name).is_dir()]
    train_files = _listing(train_root, classes, limit)
    test_files = [(path, classes.index(tested[label])) for path, label in _listing(test_root, tested, limit)]
    images, origin, unreadable = _decode(train_files + test_files, size, root, progress)
    train, test = (
        Images(images.pixels[part], images.labels[part])
        for part in (origin < len(train_files), origin >= len(train_files))
    )
    if len(train.labels) < 2 or len(test.labels) == 0:
        raise DataError(f"{str(root)!r}: {len(train.labels)} training and {len(test.labels)} test images were readable")
    return Splits(root.resolve().name, classes, train, test, True, unreadable)


def stratified_split(images: Images, classes: Sequence[str]) -> tuple[Images, Images]:
    """Splits ``images`` into training and test sets with every class in both, the same way each time.

    Raises DataError when a class has fewer than two images.
    """
    counts = torch.bincount(images.labels, minlength=len(classes))
    rare = [name for name, count in zip(classes, counts.tolist(), strict=True) if count < 2]
    if rare:
        raise DataError(f"too few readable images to split into training and test (2 are needed): {', '.join(rare)}")
    test_count = max(round(TEST_SHARE * len(images.labels)), len(classes))
    train, test = train_test_split(
        torch.arange(len(images.labels)).numpy(),
        test_size=test_count,
        stratify=images.labels.numpy(),
        random_state=SPLIT_SEED,
    )
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    return Images(images.pixels[train], images.labels[train]), Images(images.pixels[test], images.labels[test])


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    if not names:
        raise DataError(f"data folder {str(root)!r} holds no class folders; expected {root!s}/<class>/<image>")
    if len(names) == 1:
        raise DataError(f"data folder {str(root)!r} holds one class folder, {names[0]!r}; two or more are needed")
    return tuple(names)


def _listing(root: Path, classes: Iterable[str], limit: int | None) -> list[tuple[Path, int]]:
    endings = Image.registered_extensions()
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        found = [path for path in (root / name).rglob("*") if path.suffix.lower() in endings and path.is_file()]
        if not found:
            raise DataError(f"class folder {str(root / name)!r} holds no image files (such as .jpg or .png)")
        files += [(path, label) for path in sorted(found, key=str)[:limit]]
    return files


class _Files(Dataset):
    """Decodes one file an index: a uint8 [3, size, size] tensor, or the reason why there is none."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            with Image.open(self.files[index][0]) as image:
                image.draft("RGB", (self.size, self.size))
                upright = ImageOps.exif_transpose(image).convert("RGB")
        # Pillow reports a broken PNG as SyntaxError, a malformed header as ValueError or one of the others.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        if upright.size != (self.size, self.size):
            upright = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.BILINEAR)
        flat = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
        return flat.view(self.size, self.size, 3).permute(2, 0, 1)


def _decode(
    files: Sequence[tuple[Path, int]], size: int, root: Path, progress: Progress | None
) -> tuple[Images, Tensor, tuple[str, ...]]:
    """Decodes ``files``: the readable images, the index of each one's file, and the names of the unreadable files."""
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    origin: list[int] = []
    unreadable: list[str] = []
    done = 0
    for chunk in DataLoader(_Files(files, size), batch_size=DECODE_CHUNK, collate_fn=list):
        for index, item in enumerate(chunk, start=done):
            if isinstance(item, str):
                unreadable.append(f"{files[index][0].relative_to(root)} ({item})")
            else:
                pixels[len(origin)] = item
                origin.append(index)
        done += len(chunk)
        if progress is not None:
            progress(done, len(files))
    labels = torch.tensor([files[index][1] for index in origin], dtype=torch.int64)
    return Images(pixels[: len(origin)], labels), torch.tensor(origin, dtype=torch.int64), tuple(unreadable)
