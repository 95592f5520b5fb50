"""One tower and a linear layer: what fine-tuning trains."""

import math
from typing import Literal

from torch import Tensor, nn

from vatt.config import ModelParams
from vatt.model.assembly import build_towers, feature_dims
from vatt.model.initialise import initialise
from vatt.model.inputs import audio_grid, video_grid
from vatt.model.operators import Linear, full_precision

Modality = Literal["video", "audio", "image"]


class Classifier(nn.Module):
    """Logits from a video, an audio signal, or an image repeated to the depth of one voxel."""

    def __init__(
        self, params: ModelParams, *, modality: Modality, num_classes: int, head_dropout: float
    ) -> None:
        super().__init__()
        self.params, self.modality = params, modality
        tower = "audio" if modality == "audio" else "video"
        self.backbone = build_towers(params)[tower]
        self.dropout = nn.Dropout(head_dropout)
        self.head = Linear(feature_dims(params)[tower], num_classes)
        self.num_tokens = math.prod(
            audio_grid(params.audio) if tower == "audio" else video_grid(params.video)
        )
        initialise(self)
        if modality == "audio":
            # Every class starts out as rare as one among C.
            nn.init.constant_(self.head.bias, -math.log(max(num_classes - 1, 1)))
        else:
            nn.init.xavier_normal_(self.head.weight)

    def forward(self, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
        """Video (B, T, H, W, 3) or audio (B, S), floats in [-1, 1] -> logits (B, C), fp32."""
        return full_precision(self.head(self.dropout(self.backbone(inputs, kept))))
