"""ImageNet's (ILSVRC 2012) images -> clips of one frame, one of 1,000 classes each.

Files: LOC_synset_mapping.txt (names too) or imagenet_synsets.txt; for a flat val folder one of
LOC_val_solution.csv, imagenet_2012_validation_synset_labels.txt, or
ILSVRC2012_validation_ground_truth.txt with the devkit's meta.mat; imagenet_real_labels.json, if
there, gives several correct labels for an image (label `real`). The images are in train/<synset>/
and val/ (flat or in <synset>/) of data.location, or in folders as Kaggle's or the original
archives name them. The val split is used for testing: the test labels are not public.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vatt.config import DataParams
from vatt.data.clips.files import IMAGES, list_files, skipped_as
from vatt.data.clips.manifest import LABEL_SEPARATOR, Clip
from vatt.data.sources.official import file_clip
from vatt.data.sources.textfiles import MANGLED, Faults, csv_rows, published_lines, read_json
from vatt.errors import DataError

LABEL, REAL = "class", "real"
BASES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
FOLDERS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC2012_img_val"),
}
SYNSETS = ("LOC_synset_mapping.txt", "imagenet_synsets.txt")
KAGGLE = "LOC_val_solution.csv"
BY_NUMBER = "imagenet_2012_validation_synset_labels.txt"  # a synset a line, in the images' order
DEVKIT, DEVKIT_IDS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
REASSESSED = "imagenet_real_labels.json"
_SYNSET = re.compile(r"n\d{8}")
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_imagenet(folder: Path, data: DataParams) -> Iterator[Clip]:
    """All images of train/, and all that val/ should hold."""
    assert data.location is not None  # the schema asks for it
    classes = read_classes(folder)
    real = read_real(folder, classes)
    train, val = (_folder(data.location, split) for split in FOLDERS)
    if train is None and val is None:
        raise DataError(
            f"neither train nor val in {data.location}",
            hint="unpack the archives there: train/n01440764/..., val/ILSVRC2012_val_00000001.JPEG",
        )
    if train is not None:
        for synset, name in _images(data.location, train, classes):
            yield file_clip(name, "imagenet", "train", {LABEL: classes[synset]})
    if val is not None:
        for synset, name in _val_images(folder, data.location, val, classes):
            yield file_clip(name, "imagenet", "test", _val_labels(name, classes[synset], real))


def read_classes(folder: Path) -> dict[str, str]:
    """Synsets in the official order, with what they are called: n01440764 -> n01440764 tench."""
    path = next((folder / name for name in SYNSETS if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"not one of {', '.join(SYNSETS)} in {folder}",
            hint="docs/data-sources.md says where to get them",
        )
    faults = Faults(path, hint=MANGLED)
    classes: dict[str, str] = {}
    for line, text in published_lines(path):
        synset, _, names = text.strip().replace(" : ", " ", 1).partition(" ")
        if not _SYNSET.fullmatch(synset):
            faults.add(line, f"'{synset}' is not a synset")
        elif synset in classes:
            faults.add(line, f"{synset} appears twice")
        classes[synset] = f"{synset} {names.partition(',')[0]}".strip()
    faults.check()
    return classes


def read_real(folder: Path, classes: dict[str, str]) -> list[str] | None:
    """The reassessed labels of each val image, joined; "" where no class is right."""
    path = folder / REASSESSED
    if not path.is_file():
        return None
    names = list(classes.values())
    known = dict(enumerate(names))  # unlike a list, without places below 0
    try:
        return [LABEL_SEPARATOR.join(known[n] for n in right) for right in read_json(path)]
    except (TypeError, KeyError) as error:
        reason = f"no class has the number {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is broken: {reason}", hint=MANGLED) from None


def read_val(folder: Path) -> dict[int, str] | None:
    """The synset of each val image by its number; None when there is no file with them."""
    if (folder / KAGGLE).is_file():
        rows = csv_rows(folder / KAGGLE, ("ImageId", "PredictionString"))
        return {
            _number(row["ImageId"], folder / KAGGLE, line): row["PredictionString"].split(" ")[0]
            for line, row in rows
        }
    if (folder / BY_NUMBER).is_file():
        return {line: synset.strip() for line, synset in published_lines(folder / BY_NUMBER)}
    if (folder / DEVKIT).is_file():
        synset_of = _devkit_ids(folder / DEVKIT_IDS)
        lines = published_lines(folder / DEVKIT)
        return {number: synset_of.get(line.strip(), line) for number, line in lines}
    return None


def _devkit_ids(path: Path) -> dict[str, str]:
    """The devkit numbers the classes in an order of its own, which is in its MATLAB file."""
    if not path.is_file():
        raise DataError(f"{path} is missing", hint="it lies in the devkit's data folder")
    from scipy.io import loadmat  # slow to import, and seldom needed

    try:
        rows = loadmat(str(path), squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except (
        ValueError, TypeError, LookupError, OSError, EOFError, MemoryError, NotImplementedError,
        AttributeError, zlib.error,
    ) as error:  # fmt: skip
        raise DataError(f"{path} is broken: {error}", hint=MANGLED) from None


def _number(name: str, path: Path, line: int) -> int:
    match = _VAL.fullmatch(name)
    if match is None:
        raise DataError(f"{path}:{line}: '{name}' is not a val image", hint=MANGLED)
    return int(match[1])


def _folder(location: Path, split: str) -> Path | None:
    """The folder of a split, with its name in lower or upper case."""
    places = (
        path
        for base in BASES
        for name in FOLDERS[split]
        for path in _entries(location / base)
        if path.name.lower() == name.lower() and path.is_dir()
    )
    return next(places, None)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, less what systems leave there; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if skipped_as(path.name) is None)


def _images(location: Path, place: Path, classes: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Synsets and names of the images in a folder with one folder a class."""
    for folder in filter(Path.is_dir, _entries(place)):
        if folder.name not in classes:
            raise DataError(
                f"{folder} does not have the name of a class of ImageNet",
                hint="move it away, or use `vattctl finetune folder` for classes of your own",
            )
        for name in list_files(folder).files:  # Tiny ImageNet has them in a folder `images`
            if PurePosixPath(name).suffix.lower() in IMAGES:
                yield folder.name, (folder.relative_to(location) / name).as_posix()


def _val_images(
    folder: Path, location: Path, place: Path, classes: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """In folders by class, or flat with a file that names the classes."""
    if any(_SYNSET.fullmatch(path.name) for path in _entries(place)):
        yield from _images(location, place, classes)
        return
    synsets = read_val(folder)
    if synsets is None:
        raise DataError(
            f"{place} is flat, and no file in {folder} names its classes",
            hint=f"add {KAGGLE} (Kaggle), {BY_NUMBER}, or {DEVKIT} and {DEVKIT_IDS} (the devkit)",
        )
    unknown = sorted(set(synsets.values()) - set(classes))
    if unknown:
        file = next(
            folder / name for name in (KAGGLE, BY_NUMBER, DEVKIT) if (folder / name).is_file()
        )
        raise DataError(f"{file}: '{unknown[0][:40]}' is not a class", hint=MANGLED)
    for number, synset in synsets.items():
        name = place / f"ILSVRC2012_val_{number:08d}.JPEG"
        yield synset, name.relative_to(location).as_posix()


def _val_labels(name: str, label: str, real: list[str] | None) -> dict[str, str]:
    match = _VAL.fullmatch(Path(name).stem)
    number = int(match[1]) if match else 0
    right = real[number - 1] if real is not None and 1 <= number <= len(real) else ""
    return {LABEL: label} | ({REAL: right} if right else {})
