"""The parts of a Medusa student: a head, and the draft of a token that later heads read.

Shapes: N positions, J slots of a head's input, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noise.decode import Noise
from trainer.conditioning import Readout


class Head(nn.Module):
    """block(h) = h + SiLU(W h + b + S slots), the first of `blocks`; the others see no slots. All weights start at 0, so that block(h) = h."""

    def __init__(self, hidden: int, slots: int, blocks: int, output: nn.Module | None, readout: bool):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.slots = nn.Linear(slots * hidden, hidden, bias=False) if slots else None
        self.lm_head = output
        self.readout = Readout(hidden) if readout else None
        for parameter in (*self.blocks.parameters(), *([] if self.slots is None else self.slots.parameters())):
            nn.init.zeros_(parameter)

    def forward(self, hidden_NH: Tensor, slots_NJH: Tensor | None) -> Tensor:
        """What the output layer reads, [N, H]."""
        for number, block in enumerate(self.blocks):
            inner_NH = block(hidden_NH)
            if number == 0 and self.slots is not None and slots_NJH is not None:
                inner_NH = inner_NH + self.slots(slots_NJH.flatten(1))
            hidden_NH = hidden_NH + F.silu(inner_NH)
        return hidden_NH


class HeadDraft(nn.Module):
    """softmax(sharpness (logits + scale g)), re-embedded.

    The backbone's logits cannot grow, and only a sharp softmax says which token it is: hence the sharpness, learned from 1.
    """

    def __init__(self, hidden: int, noisy: bool):
        super().__init__()
        self.readout = Readout(hidden) if noisy else None
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        self.embed = nn.Linear(hidden, hidden, bias=False)
        nn.init.eye_(self.embed.weight)

    def forward(self, logits_NV: Tensor, hidden_NH: Tensor, g_NV: Tensor | Noise | None, embedding_VH: Tensor) -> tuple[Tensor, Tensor]:
        """The draft's logits [N, V] and its embedding [N, H]."""
        if self.readout is not None and g_NV is not None:
            logits_NV = self.readout(logits_NV, hidden_NH, g_NV)
        logits_NV = logits_NV * self.log_sharpness.exp()
        return logits_NV, self.embed(logits_NV.softmax(-1).to(embedding_VH.dtype) @ embedding_VH)
