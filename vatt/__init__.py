"""VATT: video, audio and text into common spaces, from raw signals."""

from pathlib import Path
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from vatt.data.clips.text import Vocabulary
    from vatt.model.vatt import VATT, Classifier

__version__ = "0.2.0"


def load(folder: Path | str) -> Union["VATT", "Classifier"]:
    """The model of a checkpoint folder, in eval mode, ready to be called.

    `folder` may be an address to which `vattctl push` copied one (s3://..., hf://..., https://...).
    """
    from vatt import checkpoint

    return checkpoint.load(_local(folder))


def vocabulary(folder: Path | str) -> "Vocabulary":
    """The words of a checkpoint folder: `.encode(sentence, words)` makes the ids (L,) of a text.

    Raises DataError for a folder without a word list, whose model takes ids alone.
    """
    from vatt import checkpoint
    from vatt.data.clips.text import Vocabulary
    from vatt.errors import DataError

    words = _local(folder) / checkpoint.VOCABULARY
    if not words.exists():
        raise DataError(
            f"{folder} has no {checkpoint.VOCABULARY}, so words have no ids",
            hint="import the checkpoint with --vocab FILE",
        )
    return Vocabulary.load(words)


def _local(folder: Path | str) -> Path:
    if "://" not in str(folder):
        return Path(folder)
    from vatt.export import local_copy

    return local_copy(str(folder))
