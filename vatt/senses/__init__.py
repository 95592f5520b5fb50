"""The senses, in their order everywhere: each is one file of this folder."""

import posixpath
from dataclasses import replace
from pathlib import Path

from vatt.config import ModelParams, PreprocessParams
from vatt.data.clips.files import exists
from vatt.data.clips.storage import Storage
from vatt.senses.audio import Audio
from vatt.senses.depth import Depth
from vatt.senses.form import Sense
from vatt.senses.motion import Motion
from vatt.senses.text import Text
from vatt.senses.video import Video

# A sense may follow how an earlier one was shown: the video comes first.
_ALL = (Video(), Audio(), Text(), Motion(), Depth())
SENSES: dict[str, Sense] = {sense.name: sense for sense in _ALL}
ANCHOR = next(sense for sense in SENSES.values() if sense.is_anchor)


def senses_of(model: ModelParams) -> list[Sense]:
    """The senses that a model has."""
    return [sense for sense in SENSES.values() if sense.section(model) is not None]


def storage_of(params: PreprocessParams) -> Storage:
    """How shards are stored that hold the senses of the settings."""
    facts = {name: sense.stored(params) for name, sense in SENSES.items()}
    own = {name: fact for name, fact in facts.items() if fact is not None}
    return replace(Storage.of(params), senses=own)


def files_beside(folder: Path, media: str) -> dict[str, str]:
    """The files in which senses of a media file of the folder lie, by sense; names as in it."""
    above, stem = posixpath.split(posixpath.splitext(media)[0])
    found: dict[str, str] = {}
    for name, sense in SENSES.items():
        for place in sense.places:
            there = posixpath.normpath(posixpath.join(above, place.replace("{stem}", stem)))
            path = folder / there
            # Opening a pipe would wait for ever.
            is_there = exists(path, Path.is_file) or exists(path, Path.is_dir)
            if is_there and not there.startswith("../"):
                found.setdefault(name, there)
    return found
