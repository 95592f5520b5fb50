"""Motion: inertial sensors, C channels at f Hz, by the clock of the picture.

A clip's file lies next to its media: `clip.motion.csv`, whose header is `t` (seconds from the start
of the media) and a name for each channel, or `imu/<clip>.csv` in the layout of Ego4D, whose times
are `canonical_timestamp_ms`. Units are the file's own; the model sees asinh of them, which is
linear for small values and logarithmic for large ones.
"""

from __future__ import annotations

import csv
import io
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vatt.config import MotionParams, MotionStorageParams, PreprocessParams
from vatt.data.clips.media import BrokenMediaError
from vatt.data.clips.samples import Window
from vatt.data.clips.storage import Storage
from vatt.errors import SettingsError
from vatt.senses.form import ArrayShapes, Cutout, Cutting, SamplingLike, Sense, Showing

if TYPE_CHECKING:
    from torch import Tensor

LEVELS, LARGEST_VALUE = 256, 2**15  # steps of 1; with both, sums of squares are exact
LARGEST = 2**29  # bytes of a file: ten hours of six channels at 200 Hz
LONGEST_LINE = 2**16
DELIMITERS = (",", ";", "\t")
HEADER_BYTES, CHECKSUM_BYTES = 128, 4  # of a stored member: NumPy's header, a CRC-32 at the end
TIME, EGO4D_TIME = "t", "canonical_timestamp_ms"
NOT_A_CHANNEL = {TIME, EGO4D_TIME, "component_idx", "component_timestamp_ms"}

Floats = NDArray[np.float64]


class Motion(Sense):
    """Accelerometers, gyroscopes, or any channels that are recorded with a video."""

    name, loss, lacking = "motion", "nce_motion", "no-motion"
    places = ("{stem}.motion.csv", "imu/{stem}.csv", "../imu/{stem}.csv")

    def tokens(self, section: MotionParams) -> Cutting:
        """Segments of all channels."""
        return Cutting(
            axes=("samples",),
            positions=("temporal",),
            sizes=(section.samples,),
            patch=(section.patch,),
            channels=section.channels,
        )

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """Samples as they are stored, in the file's units."""
        section = sampling.more.get(self.name)
        if section is None:
            return {}
        shape = (section.samples, section.channels)
        return {"motion": (shape, np.float32), "has_motion": ((), np.bool_)}

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """The samples from the start on; zeros after the end of the clip."""
        values, row = out["motion"], shown.row
        values[:] = 0
        out["has_motion"][()] = self.name in row.senses
        if out["has_motion"]:
            first = round(shown.start * shown.source.storage.senses[self.name]["hz"])
            part = shown.source.stored.signal(row, self.name)[first : first + len(values)]
            values[: len(part)] = part[:, : values.shape[1]]

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """Small values stay what they are; large ones grow with their logarithm."""
        return values.asinh()

    def energy(self, values: Tensor) -> Tensor:
        """The square of each value."""
        steps = values.clamp(-LARGEST_VALUE, LARGEST_VALUE) * LEVELS
        return steps.round().long().square()

    def stored(self, params: PreprocessParams) -> dict[str, int] | None:
        """The rate and the number of channels."""
        if params.motion is None:
            return None
        return {"hz": params.motion.hz, "channels": params.motion.channels}

    def cut(
        self, path: Path, windows: Sequence[Window], params: PreprocessParams
    ) -> tuple[list[Cutout | None], str]:
        """The channels at a constant rate in each window, and why they are not in others."""
        assert params.motion is not None
        try:
            facts = path.stat()
            if not path.is_file():
                raise BrokenMediaError("not a file")
            times, values, remark = _read(path, facts.st_size, facts.st_mtime_ns)
            if values.shape[1] < params.motion.channels:
                raise BrokenMediaError(
                    f"{values.shape[1]} channels, preprocess.motion.channels is "
                    f"{params.motion.channels}"
                )
        except (BrokenMediaError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            return [None] * len(windows), f"no motion: {path.name}: {why}"
        pieces: list[Cutout | None] = []
        gaps = []
        for window in windows:
            gap = longest_gap(times, window)
            if gap[1] - gap[0] > params.motion.longest_gap:
                gaps.append(f"no motion from {gap[0]:.2f} to {gap[1]:.2f} s")
                pieces.append(None)
            else:
                part = resampled(times, values[:, : params.motion.channels], window, params.motion)
                pieces.append(Cutout(_encode(part), len(part)))
        more = [f"{len(gaps) - 1} more gaps"] if len(gaps) > 1 else []
        return pieces, "; ".join(filter(None, [remark, *gaps[:1], *more]))

    def member(self, key: str) -> str:
        """A NumPy file, and after its end the CRC-32 of its bytes."""
        return f"{key}.motion.npy"

    def decode(self, data: bytes, count: int) -> np.ndarray:
        """(samples, C) float32."""
        size = len(data) - HEADER_BYTES - CHECKSUM_BYTES
        if count == 0 or size <= 0 or size % (4 * count):
            raise BrokenMediaError(f"{len(data)} bytes cannot hold {count} rows of its motion")
        values = np.frombuffer(data, np.float32, size // 4, HEADER_BYTES).reshape(count, -1)
        # No byte is trusted: a header may claim any size, and numbers show no damage.
        if _encode(values) != data or not np.isfinite(values).all():
            raise BrokenMediaError("its motion is damaged")
        return values

    def check(self, section: MotionParams, storage: Storage) -> None:
        """The shards must hold motion with at least as many channels."""
        held = storage.senses.get(self.name)
        if held is None:
            raise SettingsError(
                "model.motion is on, but the shards hold no motion",
                hint="set preprocess.motion='{hz: 50, channels: 6}', or model.motion=null",
            )
        if held["channels"] < section.channels:
            raise SettingsError(
                f"model.motion.channels is {section.channels}, but the shards have "
                f"{held['channels']}",
                hint="lower it, or raise preprocess.motion.channels",
            )


def _encode(values: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=(1, 0), allow_pickle=False)
    content = file.getvalue()
    return content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES)


# --- a file ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> tuple[Floats, Floats, str]:
    """Times (n,) in seconds, ascending, the values (n, C), and what was wrong with the rows."""
    if size > LARGEST:
        raise BrokenMediaError(f"larger than {LARGEST // 2**20} MiB")
    table, lost = _table(path)
    if not len(table):
        raise BrokenMediaError("no row with a time and a number for each channel")
    times = table[:, 0]
    order = np.argsort(times, kind="stable")
    is_sorted = bool((np.diff(times) >= 0).all())
    times, values = times[order], table[order, 1:]
    fresh = np.diff(times, prepend=-np.inf) > 0  # of equal times the first one counts
    remarks = [
        f"{lost} rows of {path.name} are not finite numbers" if lost else "",
        "" if is_sorted else f"the rows of {path.name} are not in the order of time",
    ]
    return times[fresh], values[fresh], "; ".join(filter(None, remarks))


def _table(path: Path) -> tuple[Floats, int]:
    """Rows of time and channels, and how many rows could not be used."""
    numbers, lost = array("d"), 0  # a list of Python's numbers would take four times the memory
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = _rows(file)
        header = [name.strip().lower() for name in next(rows, [])]
        clock, unit = _clock(header)
        columns = [k for k, name in enumerate(header) if name and name not in NOT_A_CHANNEL]
        if not columns:
            raise BrokenMediaError("no column but the time")
        for row in rows:
            found = _numbers(row, [clock, *columns])
            if found is None:
                lost += bool(row)
            else:
                numbers.extend((found[0] * unit, *found[1:]))
    return np.asarray(numbers, np.float64).reshape(-1, 1 + len(columns)), lost


def _rows(file: io.TextIOBase) -> Iterator[list[str]]:
    """The fields of each line: a quote that is left open ends with its line.

    The first line shows whether commas, semicolons or tabs separate them.
    """
    delimiter = None
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise BrokenMediaError(f"a line of {LONGEST_LINE} characters or more")
        delimiter = delimiter or max(DELIMITERS, key=line.count)
        try:
            yield from csv.reader([line], delimiter=delimiter)
        except csv.Error as error:
            raise BrokenMediaError(f"not a csv file: {error}") from None


def _clock(header: Sequence[str]) -> tuple[int, float]:
    """The column of the time, and its unit in seconds."""
    for name, unit in ((TIME, 1.0), (EGO4D_TIME, 1e-3)):
        if name in header:
            return header.index(name), unit
    raise BrokenMediaError(f"no column {TIME} or {EGO4D_TIME} in its first line")


def _numbers(row: Sequence[str], columns: Sequence[int]) -> list[float] | None:
    """The row's numbers; None unless all are there and finite as 32-bit numbers."""
    try:
        numbers = [float(row[column]) for column in columns]
    except (ValueError, IndexError):
        return None
    most = float(np.finfo(np.float32).max)
    return numbers if all(abs(number) <= most for number in numbers) else None


def longest_gap(times: Floats, window: Window) -> Window:
    """The longest time without a sample that touches a window; its ends may lie outside."""
    inside = times[(times > window[0]) & (times < window[1])]
    edges = np.concatenate([[window[0]], inside, [window[1]]])
    if (times <= window[0]).any():
        edges[0] = times[times <= window[0]].max()
    if (times >= window[1]).any():
        edges[-1] = times[times >= window[1]].min()
    place = int(np.argmax(np.diff(edges)))
    return float(edges[place]), float(edges[place + 1])


def resampled(
    times: Floats, values: Floats, window: Window, params: MotionStorageParams
) -> NDArray[np.float32]:
    """The values at a constant rate from the start of the window on: (samples, C).

    Between two samples values change linearly. A faster recording is averaged over the time of a
    stored sample, so that what is too fast for the rate does not appear as something slower.
    """
    step = 1 / params.hz
    count = round((window[1] - window[0]) * params.hz)
    wanted: Floats = window[0] + np.arange(count, dtype=np.float64) * step
    is_faster = len(times) > 1 and np.median(np.diff(times)) < step / 1.5
    found = np.empty((len(wanted), values.shape[1]), np.float32)
    for channel, series in enumerate(values.T):
        if is_faster:
            areas: Floats = _area(times, series, wanted + step / 2) - _area(
                times, series, wanted - step / 2
            )
            found[:, channel] = areas / step
        else:
            found[:, channel] = np.interp(wanted, times, series)
    return found


def _area(times: Floats, series: Floats, until: Floats) -> Floats:
    """The integral of the series, linear between its samples and constant outside, up to a time."""
    whole = np.concatenate([[0.0], np.cumsum(np.diff(times) * (series[1:] + series[:-1]) / 2)])
    clipped = until.clip(times[0], times[-1])
    place = (np.searchsorted(times, clipped, side="right") - 1).clip(0, len(times) - 2)
    ends = np.interp(clipped, times, series)
    area = whole[place] + (clipped - times[place]) * (series[place] + ends) / 2
    before, after = (until - times[0]).clip(max=0), (until - times[-1]).clip(min=0)
    return np.asarray(area + before * series[0] + after * series[-1])
