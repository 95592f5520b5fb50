"""The form that every sense has: video, audio and text, and whatever is added.

A sense is one file. It says how a raw signal becomes tokens, which common space it joins, how it
is stored in a shard, what is shown of it, and what the training device does with it. The model,
the loading, the training and the evaluation go through the list in `vatt.senses`.
docs/add-a-modality.md adds one.

B clips, T H W C frames, height, width, channels, S audio samples, K candidate texts, L words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from vatt.config import AugmentationParams, ModelParams, PreprocessParams
from vatt.data.clips.manifest import Caption
from vatt.data.clips.samples import IndexRow, Window
from vatt.data.clips.storage import Box, FrameStream, Storage
from vatt.data.clips.text import Vocabulary

if TYPE_CHECKING:  # what writes shards needs no torch, which is slow to import
    import torch
    from torch import Tensor

Space = Literal["va", "vt"]
ArrayShapes = Mapping[str, tuple[tuple[int, ...], type]]  # of one clip: name -> shape, type


@dataclass(frozen=True, slots=True)
class Cutting:
    """Tokens that are patches: for each axis of the signal its name, its size and a patch's."""

    axes: tuple[str, ...]
    positions: tuple[str, ...]  # the names of the position tables, one for each axis
    sizes: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int | None  # None: the signal has no axis of channels


@dataclass(frozen=True, slots=True)
class Words:
    """Tokens that are words."""

    length: int  # of a text, at most
    vocabulary: int


class SampleStore(Protocol):
    """Where samples are read from: the shards, or decoded samples kept in memory."""

    def captions(self, row: IndexRow) -> tuple[Caption, ...]:
        """The captions; their times count from the start of the sample."""

    def each_frame(self, row: IndexRow, indices: Sequence[int], box: Box) -> FrameStream:
        """The part of the frames in the box, each (H, W, C) with its place in `indices`."""

    def audio(self, row: IndexRow, first: int, last: int) -> np.ndarray:
        """(S,), shorter where the clip ends."""

    def signal(self, row: IndexRow, name: str) -> np.ndarray:
        """All that is stored of a sense with a member of its own."""


class SamplingLike(Protocol):
    """The size and form of a model's input, as vatt/data/loading/sampling.py reads it."""

    @property
    def frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def frame_size(self) -> tuple[int, int]: ...
    @property
    def samples(self) -> int: ...
    @property
    def audio_hz(self) -> int | None: ...
    @property
    def candidates(self) -> int: ...
    @property
    def words(self) -> int: ...
    @property
    def augmentation(self) -> AugmentationParams | None: ...
    @property
    def still(self) -> bool: ...
    @property
    def mel_bins(self) -> int | None: ...
    @property
    def more(self) -> Mapping[str, Any]: ...
    def shapes(self) -> ArrayShapes: ...


@dataclass(frozen=True, slots=True)
class View:
    """The part of a clip that evaluation shows: one of `windows` in time, one of `crops`."""

    window: int = 0
    windows: int = 1
    crop: int = 0
    crops: int = 1


CENTRE = View()


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Stored samples, and the form in which a model is shown all of them."""

    stored: SampleStore
    storage: Storage
    sampling: SamplingLike
    vocabulary: Vocabulary | None


@dataclass(slots=True)
class Framing:
    """How the picture of a clip is cut out of its frames."""

    box: Box
    stored: tuple[int, int]  # height and width of the frames that the box is of
    flip: bool


@dataclass(slots=True)
class Showing:
    """What one row of a batch shows of a sample: from `start` seconds on, until `end`."""

    row: IndexRow
    source: SampleSource
    start: float
    end: float
    view: View
    generator: torch.Generator | None  # None: evaluation, nothing is drawn
    framing: Framing | None = None  # the video's; senses after it may follow


@dataclass(frozen=True, slots=True)
class Cutout:
    """What a window of a clip holds of a sense: the bytes of its member, and how many values."""

    data: bytes
    count: int  # samples, or frames


class Sense:
    """What the rest of the code asks of a sense. Each is one object, in the list of the package."""

    name: ClassVar[str]
    space: ClassVar[Space] = "va"  # the common space that its head leads to
    is_anchor: ClassVar[bool] = False  # every other sense is compared with it
    # Whether clips that lack it are left out of the statistics of its head's batch norm.
    skips_absent: ClassVar[bool] = True
    change: ClassVar[tuple[str, tuple[float, ...]] | None] = None  # see `arrays`
    # The state of a clip that lacks it although `data.require` names it.
    lacking: ClassVar[str]
    # Its own file of a clip, from the folder of the media `{stem}.mp4`; none: it is in the media.
    places: ClassVar[tuple[str, ...]] = ()
    loss: ClassVar[str]  # the name of its loss with the anchor; the anchor has none

    def section(self, model: ModelParams) -> Any:
        """Its settings in `model`; None where it is off."""
        return getattr(model, self.name)

    def tokens(self, section: Any) -> Cutting | Words:
        """How its signal becomes tokens."""
        raise NotImplementedError

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """Its arrays in a batch: its name, has_<name>, and the numbers of `change`.

        `change` names what the training device does with each clip, and the numbers that do
        nothing. A sense that is not read has arrays without values, or none.
        """
        raise NotImplementedError

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """Fill its arrays of one clip; zeros where the clip lacks it."""
        raise NotImplementedError

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """Its array of a batch as the model takes it."""
        raise NotImplementedError

    def energy(self, values: Tensor) -> Tensor:
        """How much there is in each value of its array: whole numbers, equal on every device.

        DropToken may keep the patches whose sum is largest.
        """
        raise NotImplementedError

    def present(self, values: Tensor, flags: Tensor | None) -> Tensor:
        """Which clips of a batch have it: (B,), or (B, K) for several candidates."""
        assert flags is not None
        return flags

    def stored(self, params: PreprocessParams) -> dict[str, int] | None:
        """What the index must say of its members; None where the shards hold none of its own."""
        return None

    def cut(
        self, path: Path, windows: Sequence[Window], params: PreprocessParams
    ) -> tuple[list[Cutout | None], str]:
        """Its part of each window of a file, and a complaint where something is missing."""
        raise NotImplementedError

    def member(self, key: str) -> str:
        """The name of its member in a shard."""
        raise NotImplementedError

    def decode(self, data: bytes, count: int) -> np.ndarray:
        """A member, as `SampleStore.signal` returns it; damage is a BrokenMediaError."""
        raise NotImplementedError

    def decoded_bytes(self, extent: tuple[int, int, int]) -> int:
        """The memory of a decoded member, by its offset, size and number of values in the index."""
        return extent[1]

    def check(self, section: Any, storage: Storage) -> None:
        """Raise a SettingsError where the shards cannot give what the model takes."""
