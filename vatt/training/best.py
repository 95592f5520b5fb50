"""The best checkpoint of a training so far, beside its state: best/, with its step and score."""

import shutil
from pathlib import Path
from typing import Any

from vatt import checkpoint
from vatt.config import ModelParams
from vatt.errors import DataError
from vatt.training.engine import Weights

FOLDER = "best"  # in the state's folder


class Best:
    """Keeps a copy of the weights whose score is the highest; of equal ones the first."""

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER

    def offer(
        self, best: dict[str, Any], weights: Weights, model: ModelParams, *, vocabulary: Path
    ) -> bool:
        """Keep the weights, with what `best` says, if no `score` before was as high."""
        known = self.known()
        if known is not None and best["score"] <= known["score"]:
            return False
        checkpoint.save(weights, model, self.folder, extra={"best": best}, vocabulary=vocabulary)
        return True

    def known(self) -> dict[str, Any] | None:
        """Step and score of what is kept."""
        try:
            found = checkpoint.load_config(self.folder).get("best")
        except DataError:
            return None
        return found if isinstance(found, dict) and "score" in found else None

    def forget(self) -> None:
        """Keep nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
