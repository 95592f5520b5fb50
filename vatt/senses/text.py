"""Text: words; of the sentences of a clip, those nearest in time to what is shown.

B clips, K candidate texts, L words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vatt.config import TextParams
from vatt.data.clips.samples import nearest
from vatt.senses.form import ArrayShapes, SamplingLike, Sense, Showing, Space, Words

if TYPE_CHECKING:
    from torch import Tensor


class Text(Sense):
    """What is said: several candidates for each clip, of which none may fit."""

    name, loss, lacking = "text", "mil_nce", "no-caption"
    space: ClassVar[Space] = "vt"

    def tokens(self, section: TextParams) -> Words:
        """A word is a token."""
        return Words(section.words, section.vocabulary)

    def arrays(self, sampling: SamplingLike) -> ArrayShapes:
        """Word ids, 0 for a pad: a text of pads is one that does not exist."""
        return {"text": ((sampling.candidates, sampling.words), np.int64)}

    def fill(self, out: Mapping[str, np.ndarray], shown: Showing) -> None:
        """The captions nearest to the window."""
        text, sampling, words = out["text"], shown.source.sampling, shown.source.vocabulary
        text[:] = 0
        if words is None or not sampling.candidates:
            return
        captions = shown.source.stored.captions(shown.row)
        chosen = nearest(captions, start=shown.start, end=shown.end, count=sampling.candidates)
        for candidate, caption in enumerate(chosen):
            text[candidate] = words.encode(caption.text, sampling.words)

    def scaled(self, values: Tensor, change: Tensor | None) -> Tensor:
        """Ids stay what they are."""
        return values

    def present(self, values: Tensor, flags: Tensor | None) -> Tensor:
        """Which candidates have words: (B, K)."""
        return (values != 0).any(-1)
