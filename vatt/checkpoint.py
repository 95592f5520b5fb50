"""A checkpoint: weights, and the settings that build the model they belong to.

A folder with model.safetensors, config.json and, where known, vocabulary.txt. The paper's model or
the released one is chosen here, by `model.recipe`, and nowhere else.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vatt.config import ModelParams
from vatt.errors import DataError
from vatt.files import atomic_folder
from vatt.model.positions import fit_tables
from vatt.model.vatt import (
    MODALITIES,
    VATT,
    Classifier,
    ClassifierInput,
    paper_towers,
    tower_of,
)
from vatt.release.model import release_parts, release_towers

WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.txt"
VERSION = 1


def build(params: ModelParams) -> VATT:
    """The model that the settings describe, newly initialised."""
    return VATT(params, release_parts(params) if params.recipe == "release" else None)


def build_classifier(
    params: ModelParams, *, modality: ClassifierInput, num_classes: int, head_dropout: float
) -> Classifier:
    """A tower of that model and a linear layer, newly initialised."""
    towers = release_towers if params.recipe == "release" else paper_towers
    return Classifier(
        params,
        towers(params)[tower_of(modality)],
        modality=modality,
        num_classes=num_classes,
        head_dropout=head_dropout,
    )


@cache
def feature_dims(params: ModelParams) -> dict[str, int]:
    """The width of each modality's features."""
    with torch.device("meta"):
        model = build(params)
    return {name: getattr(model, name).width for name in MODALITIES}


def save(
    weights: nn.Module | dict[str, Tensor],
    params: ModelParams,
    folder: Path,
    *,
    extra: dict[str, Any] | None = None,
    vocabulary: Path | None = None,
) -> None:
    """Write the folder, all of it or nothing; `extra` is added to config.json.

    For a classifier `extra` holds {"classifier": {"modality": ..., "classes": [...]}}.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    config = {"version": VERSION, "model": params.model_dump(mode="json"), **(extra or {})}
    aliases = shared_names(from_config(config))
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name not in aliases
    }
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, temporary / VOCABULARY)


def load(folder: Path | str) -> VATT | Classifier:
    """The model of a folder, with its weights, in eval mode."""
    folder = Path(folder)
    model = from_config(load_config(folder))
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder / WEIGHTS} cannot be read: {error}", hint="make the checkpoint again"
        ) from None
    load_weights(model, state, source=folder)
    return model.eval()


def load_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a folder."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            hint="a checkpoint is a folder with model.safetensors and config.json",
        ) from None
    if not isinstance(config, dict) or "model" not in config:
        raise DataError(f"{path} describes no model", hint="make the checkpoint again")
    return config


def from_config(config: dict[str, Any]) -> VATT | Classifier:
    """The model that a config.json describes, without memory for its weights."""
    try:
        params = ModelParams.model_validate(config["model"])
    except ValidationError as error:
        raise DataError(
            f"config.json describes no model: {error}", hint="make the checkpoint again"
        ) from None
    task = config.get("classifier")
    with torch.device("meta"):
        if task is None:
            return build(params)
        return build_classifier(
            params,
            modality=task["modality"],
            num_classes=len(task["classes"]),
            head_dropout=task.get("head_dropout", 0.0),
        )


def load_weights(
    model: nn.Module, state: dict[str, Tensor], *, source: Path | str = "the checkpoint"
) -> None:
    """Give a model its weights; position tables of other sizes are resized, the rest must fit."""
    state = dict(state)
    for alias, name in shared_names(model).items():
        if alias not in state and name in state:
            state[alias] = state[name]
    state = fit_tables(state, model)
    expected = model.state_dict()
    wrong = [
        f"{name}: {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if wrong or missing or unknown:
        raise DataError(
            f"the weights in {source} do not fit the model: missing {missing[:5]}, "
            f"unknown {unknown[:5]}, of another shape {wrong[:5]}",
            hint="use the settings that the weights were trained with",
        )
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in expected.values()))


def shared_names(model: nn.Module) -> dict[str, str]:
    """Second names of shared weights (those of the agnostic encoder): second name -> first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
