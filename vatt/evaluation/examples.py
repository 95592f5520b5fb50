"""Retrievals worth a look: some that work best, some in the middle, the worst."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vatt.data.text import Vocabulary
from vatt.evaluation.features import Array, FeatureSet
from vatt.metrics import ranks

EACH = 3  # best, middle and worst
HITS = 3


def retrieval_examples(
    tables: Mapping[str, tuple[Array, FeatureSet]], vocabulary: Path, *, shown: Sequence[str]
) -> list[dict[str, Any]]:
    """Text to video, from best to worst; clips are named by their labels in `shown`, or by id."""
    if "text_to_video" not in tables:
        return []
    table, clips = tables["text_to_video"]
    words = Vocabulary.load(vocabulary)
    own = ranks(table, np.arange(len(table)))
    picked = _spread(np.argsort(own, kind="stable"))
    return [
        {
            "clip_id": str(clips.clip_ids[row]),
            "sentences": [
                sentence
                for sentence in (words.decode(map(int, ids)) for ids in clips.text[row])
                if sentence
            ],
            "shown": _name(clips, row, shown),
            "rank": float(own[row]) if own[row] % 1 else int(own[row]),
            "pool": len(table),
            "hits": [
                {
                    "clip_id": str(clips.clip_ids[hit]),
                    "shown": _name(clips, hit, shown),
                    "own": bool(hit == row),
                }
                for hit in np.argsort(-table[row], kind="stable")[:HITS]
            ],
        }
        for row in picked
    ]


def _spread(order: NDArray[np.integer]) -> list[int]:
    """The first, the middle and the last few, each once."""
    middle = max(len(order) // 2 - EACH // 2, 0)
    chosen = [*order[:EACH], *order[middle : middle + EACH], *order[-EACH:]]
    return [int(row) for row in dict.fromkeys(chosen)]


def _name(clips: FeatureSet, row: int, shown: Sequence[str]) -> str:
    labels = [str(clips.labels[name][row]) for name in shown if name in clips.labels]
    return " ".join(filter(None, labels)) or str(clips.clip_ids[row])
