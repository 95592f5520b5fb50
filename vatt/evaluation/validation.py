"""Zero-shot retrieval on the validation split while a model is trained: its early curves."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vatt.checkpoint import build, load_weights
from vatt.config import MachineParams, ModelParams, PretrainParams
from vatt.data.batches import Loading, Sampling, eval_batches
from vatt.data.reader import ShardIndex
from vatt.data.samples import splits_of
from vatt.errors import SettingsError
from vatt.evaluation.features import extract
from vatt.evaluation.retrieval import RECALLS, draw_pool, similarities
from vatt.metrics import ranks
from vatt.model.vatt import VATT

SPLIT = "val"
SCORE = "val.recall_at_10"  # the mean over the directions; the best checkpoint has the highest
SCORED = ("text_to_video", "video_to_text", "audio_to_video", "video_to_audio")

Validation = Callable[[Mapping[str, Tensor]], dict[str, float]]


def validation(
    model: ModelParams, params: PretrainParams, *, shards: Path, machine: MachineParams
) -> Validation | None:
    """What measures weights on the same clips each time; None when `evaluate_every` is null."""
    if params.evaluate_every is None:
        return None
    if not splits_of(shards).get(SPLIT):
        raise SettingsError(
            "pretrain.evaluate_every is set, and no clip is in the val split",
            hint="set data.val_share=0.01, or pretrain.evaluate_every=null, and run it again",
        )
    rows = ShardIndex.load(shards, split=SPLIT).rows
    ids = np.asarray([row.key for row in rows])
    keys = ids[draw_pool(ids, np.ones(len(ids), dtype=bool), params.evaluate_clips)].tolist()

    def measure(weights: Mapping[str, Tensor]) -> dict[str, float]:
        batches = eval_batches(
            shards,
            split=SPLIT,
            batch_size=machine.micro_batch_size or min(params.batch_size, len(keys)),
            sampling=Sampling.for_pretraining(model, params),
            loading=replace(Loading.of(machine), cache_gb=0.0),
            clip_ids=keys,
        )
        encoder = _encoder(model, weights)
        found = extract({SPLIT: encoder}, batches, progress=lambda *_: None, total=len(keys))
        searches = similarities(found[SPLIT], pool=len(keys), caption_queries="averaged")
        return retrieval_scores({name: search.table for name, search in searches.items()})

    return measure


def retrieval_scores(tables: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Recalls and median rank of each direction that there is, and the score over all."""
    scores: dict[str, float] = {}
    for name in SCORED:
        if name in tables:
            own = ranks(tables[name], np.arange(len(tables[name])))
            scores |= {f"val.{name}.recall_at_{k}": float((own <= k).mean()) for k in RECALLS}
            scores[f"val.{name}.median_rank"] = float(np.median(own))
    recalls = [value for name, value in scores.items() if name.endswith("recall_at_10")]
    return scores | {SCORE: float(np.mean(recalls)) if recalls else 0.0}


def _encoder(model: ModelParams, weights: Mapping[str, Tensor]) -> VATT:
    encoder = build({"model": model.model_dump(mode="json")})
    assert isinstance(encoder, VATT)
    load_weights(encoder, dict(weights))
    return encoder.eval().to("cuda" if torch.cuda.is_available() else "cpu")
