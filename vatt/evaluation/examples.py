"""Retrievals worth a look: some that work best, some in the middle, the worst."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vatt.data.text import Vocabulary
from vatt.evaluation.features import FeatureSet
from vatt.evaluation.retrieval import Search
from vatt.metrics import ranks

EACH = 3  # best, middle and worst
HITS = 3


def retrieval_examples(
    searches: Mapping[str, Search], vocabulary: Path | None, *, shown: Sequence[str]
) -> list[dict[str, Any]]:
    """Text to video, from best to worst; clips are named by their labels in `shown`, or by id."""
    if "text_to_video" not in searches or vocabulary is None:
        return []
    search, clips = searches["text_to_video"], searches["text_to_video"].clips
    words = Vocabulary.load(vocabulary)
    rank = ranks(search.table, search.own)
    found = []
    for query in _spread(np.argsort(rank, kind="stable")):
        row = int(search.own[query])
        said = (
            clips.text[row] if search.caption is None else clips.text[row, [search.caption[query]]]
        )
        sentences = (words.decode(map(int, ids)) for ids in said)
        nearest = np.argsort(-search.table[query], kind="stable")[:HITS]
        found.append(
            {
                "clip_id": str(clips.clip_ids[row]),
                "sentences": [sentence for sentence in sentences if sentence],
                "shown": _name(clips, row, shown),
                "rank": float(rank[query]) if rank[query] % 1 else int(rank[query]),
                "pool": search.table.shape[1],
                "hits": [
                    {
                        "clip_id": str(clips.clip_ids[hit]),
                        "shown": _name(clips, hit, shown),
                        "own": bool(hit == row),
                    }
                    for hit in nearest
                ],
            }
        )
    return found


def _spread(order: NDArray[np.integer]) -> list[int]:
    """The first, the middle and the last few, each once."""
    middle = max(len(order) // 2 - EACH // 2, 0)
    chosen = [*order[:EACH], *order[middle : middle + EACH], *order[-EACH:]]
    return [int(row) for row in dict.fromkeys(chosen)]


def _name(clips: FeatureSet, row: int, shown: Sequence[str]) -> str:
    labels = [str(clips.labels[name][row]) for name in shown if name in clips.labels]
    return " ".join(filter(None, labels)) or str(clips.clip_ids[row])
