"""The classes that transformers' `AutoModel` builds from an exported folder.

`vattctl export --to huggingface-folder` copies this file, and each of ours that it imports, into
the folder. So the folder works where vattctl is not installed:
`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`. The
file is named as transformers names such files.

B clips, K texts of a clip, T H W C frames, height, width, channels, S samples, L words, D feature
width, E common-space width.
"""

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vatt.checkpoint import from_config, shared_names


class VattConfig(PretrainedConfig):
    """config.json of a checkpoint; its key `model` holds the settings of the model."""

    model_type = "vatt"


class VattClassifierConfig(VattConfig):
    """config.json of a classifier, which also has its key `classifier`."""

    model_type = "vatt-classifier"


@dataclasses.dataclass
class VattOutput(ModelOutput):
    """As vatt.model.vatt.Output: unit vectors in the common spaces, and features."""

    video_va: Tensor | None = None  # (B, E)
    audio_va: Tensor | None = None  # (B, E)
    video_vt: Tensor | None = None  # (B, E)
    text_vt: Tensor | None = None  # (B, K, E)
    video_features: Tensor | None = None  # (B, D)
    audio_features: Tensor | None = None  # (B, D)
    text_features: Tensor | None = None  # (B, K, D)


@dataclasses.dataclass
class VattLogits(ModelOutput):
    """The outputs of transformers' classifiers."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, classes)


class VattPreTrainedModel(PreTrainedModel):
    """The model that a config describes, as the module `vatt`."""

    config_class = VattConfig
    base_model_prefix = "vatt"

    def __init__(self, config: VattConfig) -> None:
        super().__init__(config)
        self.vatt = from_config(config.to_dict(), source=config.name_or_path or "the config")
        # An encoder that several towers share is stored once.
        self._tied_weights_keys = {
            f"vatt.{alias}": f"vatt.{name}" for alias, name in shared_names(self.vatt).items()
        }
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: all weights come from the folder."""


class VattModel(VattPreTrainedModel):
    """Embeds videos, sounds and texts so that they can be compared."""

    def forward(
        self, video: Tensor | None = None, audio: Tensor | None = None, text: Tensor | None = None
    ) -> VattOutput:
        """Embed whatever is given.

        video (B, T, H, W, 3) and audio (B, S) are floats in [-1, 1]; text (B, K, L) holds word ids,
        0 for a pad. preprocessor_config.json has the sizes.
        """
        out = self.vatt(video, audio, text)
        return VattOutput(**{f.name: getattr(out, f.name) for f in dataclasses.fields(VattOutput)})


class VattForClassification(VattPreTrainedModel):
    """Classifies videos, sounds or images; config.id2label has the names of the classes."""

    config_class = VattClassifierConfig

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> VattLogits:
        """Video (B, T, H, W, 3) or audio (B, S), floats in [-1, 1] -> logits (B, classes).

        With `labels` (B,), whole numbers, also their mean cross-entropy.
        """
        logits = self.vatt(inputs)
        return VattLogits(None if labels is None else F.cross_entropy(logits, labels), logits)
