"""The autoregressive student: the demo's teacher and judge, and the baseline of student size.

Loss: -sum over positions 1..length-1 of log softmax(logits at t-1)[x_t]. Saves as a Hugging Face Llama.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer import objectives
from trainer.backbone import Backbone
from trainer.chance import Chance
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import Batch
from trainer.students.base import Base


class AR(Base):
    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        super().__init__()
        if config.noise != NoiseConfig() or config.shift:
            raise ValueError("student.kind ar takes no noise, drafts or shift; drop student.noise and student.shift")
        objectives.check(config.objective, config.noise)
        self.config, self.noise = config, config.noise
        self.vocab_size, self.mask_id, self.block_length = vocab_size, None, block_length
        self.model = Backbone(vocab_size, config.layers, config.hidden, config.heads, config.mlp, config.dropout)

    @property
    def figure_names(self) -> list[str]:
        return ["nll", *(["token_kd"] if self.config.objective.token_kd else [])]

    def logits(self, ids_BL: Tensor) -> Tensor:
        """float32 [B, L, V]; those at t predict the token at t + 1."""
        return self.model.head(self._hidden(ids_BL), self.vocab_size)

    def _hidden(self, ids_BL: Tensor) -> Tensor:
        x_BLH = self.model.embed_tokens(ids_BL)
        cos_LD, sin_LD = self.model.rotary(ids_BL.shape[1])
        for layer in self.model.layers:
            x_BLH = layer(x_BLH, cos_LD, sin_LD, True, None)
        return x_BLH

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures (sums). Padding comes last, so causal attention never sees it."""
        valid_BL = batch.valid_BL[:, 1:]
        logits_NV = self.model.head(self._hidden(batch.input_ids_BL[:, :-1])[valid_BL], self.vocab_size)
        where_N = F.pad(valid_BL, (1, 0)).flatten().nonzero()[:, 0]
        loss_N, parts = objectives.losses(self.config.objective, logits_NV, batch.input_ids_BL.flatten()[where_N], batch, where_N)
        return loss_N.sum(), {"nll" if name == "nelbo" else name: part_N.sum() for name, part_N in parts.items()}
