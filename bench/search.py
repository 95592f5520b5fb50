"""One exact search among many moments, against NumPy's matrix product on the same vectors.

python bench/search.py --moments 100000
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vatt.search import Index, Moment, write_index

WIDTH = 256  # of the video-text space
TOP = 10


def main() -> None:
    """Print medians, the slowest search, and the ratio of the two methods, which alternate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(options.moments, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    moments = [Moment(f"film-{i // 100}.mp4", i % 100, i % 100 + 1) for i in range(len(vectors))]
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder) / "index", moments, list(vectors), {})
        opening = [timed(lambda: Index(Path(folder) / "index"))[0] for _ in range(5)]
        index = Index(Path(folder) / "index")
    ours, naive = [], []
    for query in generator.normal(size=(options.queries, WIDTH)).astype(np.float32):
        vector = query / np.linalg.norm(query)
        took, hits = timed(lambda q=vector: index.nearest(q, count=TOP))
        ours.append(took)
        took, places = timed(lambda q=vector: by_numpy(q, vectors))
        naive.append(took)
        assert [hit.moment for hit in hits] == [moments[place] for place in places]
    print(f"{options.moments:,} moments of {WIDTH} numbers, {options.queries} searches, top {TOP}")
    print(f"search: median {ms(ours)} ms, slowest {max(ours) * 1e3:.1f} ms")
    print(f"opening the index, once: median {ms(opening)} ms")
    ratios = [theirs / own for own, theirs in zip(ours, naive, strict=True)]
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    print(f"NumPy takes {middle:.2f} times as long ({low:.2f} to {high:.2f} for 8 of 10 searches)")


def by_numpy(vector: np.ndarray, vectors: np.ndarray) -> list[int]:
    """The same search by a matrix product and a partial sort."""
    cosines = vectors @ vector
    top = np.argpartition(-cosines, TOP)[:TOP]
    return top[np.argsort(-cosines[top])].tolist()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call, and its result."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def ms(seconds: list[float]) -> str:
    """The median in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.1f}"


if __name__ == "__main__":
    main()
