"""The published models, as settings; built without memory, since only their shapes matter here."""

from typing import Literal

import torch

from vatt.config import AudioParams, ModelParams, SizeName, TextParams, VideoParams
from vatt.model.classifier import Classifier, Modality
from vatt.model.vatt import VATT

Recipe = Literal["paper", "release"]

VOCABULARY = 65536
SPECIFIC: dict[str, tuple[SizeName, SizeName, SizeName]] = {
    "BBS": ("base", "base", "small"),
    "MBS": ("medium", "base", "small"),
    "LBS": ("large", "base", "small"),
}
AGNOSTIC: dict[str, SizeName] = {"MA-Base": "base", "MA-Medium": "medium", "MA-Large": "large"}


def video_params(size: SizeName, *, frames: int = 32, frame_size: int = 224) -> VideoParams:
    """The video tower at the paper's patch."""
    return VideoParams(size=size, frames=frames, frame_size=frame_size, patch=(4, 16, 16))


def audio_params(size: SizeName, *, spectrogram: bool = False) -> AudioParams:
    """The audio tower on 3.2 s at 48 kHz, or on the release's 144 frames of 80 mel bins."""
    if spectrogram:
        return AudioParams(size=size, input="spectrogram", samples=144, patch=(16, 5), mel_bins=80)
    return AudioParams(size=size, input="waveform", samples=153_600, patch=128, mel_bins=None)


def model_params(name: str, recipe: Recipe, *, spectrogram: bool = False) -> ModelParams:
    """A published model by its name: BBS, MBS, LBS, MA-Base, MA-Medium, MA-Large."""
    video, audio, text = SPECIFIC[name] if name in SPECIFIC else (AGNOSTIC[name],) * 3
    return ModelParams(
        recipe=recipe,
        backbone="specific" if name in SPECIFIC else "agnostic",
        video=video_params(video),
        audio=audio_params(audio, spectrogram=spectrogram),
        text=TextParams(size=text, words=16, vocabulary=VOCABULARY),
        va_dim=512,
        vt_dim=256,
        dropout=0.1,
    )


def build_model(name: str, recipe: Recipe) -> VATT:
    """A pre-training model on the meta device."""
    with torch.device("meta"):
        return VATT(model_params(name, recipe)).eval()


def build_classifier(
    size: SizeName,
    recipe: Recipe,
    *,
    modality: Modality,
    num_classes: int,
    spectrogram: bool = False,
) -> Classifier:
    """A fine-tuning model on the meta device."""
    params = model_params("BBS", recipe, spectrogram=spectrogram)
    params = params.model_copy(
        update={
            "video": params.video.model_copy(update={"size": size}),
            "audio": params.audio.model_copy(update={"size": size}),
        }
    )
    with torch.device("meta"):
        return Classifier(
            params, modality=modality, num_classes=num_classes, head_dropout=0.0
        ).eval()
