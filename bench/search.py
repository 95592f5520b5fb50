"""Milliseconds of one search among many moments, exact, on this machine.

python bench/search.py --moments 100000
"""

import argparse
import statistics
import time

import faiss
import numpy as np

WIDTH = 256  # of the video-text space
TOP = 10


def main() -> None:
    """Print the median and the slowest of many searches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(options.moments, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    seconds = []
    for query in vectors[: options.queries]:
        start = time.perf_counter()
        _, places = index.search(query[None], TOP)
        seconds.append(time.perf_counter() - start)
        assert (vectors[places[0]] @ query >= np.sort(vectors @ query)[-TOP] - 1e-6).all()
    print(
        f"{options.moments} moments, {len(seconds)} searches: "
        f"median {statistics.median(seconds) * 1e3:.1f} ms, slowest {max(seconds) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
