"""The network of the published MDLM and BD3-LM checkpoints (DiT, arXiv 2212.09748, with rotary positions), without time conditioning.

LayerNorm with a bias, attention from one fused product, a GELU MLP with biases. The published networks modulate every norm and branch by a
vector of the time, which without time conditioning is the same vector always: `published` folds it into these weights, exactly.
Called as `backbone.Backbone` is. Shapes: B rows, L positions, H hidden, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Mask, attend
from trainer.backbone import Backbone, Join, rotary, rotate
from trainer.config import StudentConfig


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, width: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(hidden)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, width), nn.GELU(approximate="tanh"), nn.Linear(width, hidden))

    def forward(self, x_BLH: Tensor, cos_LD: Tensor, sin_LD: Tensor, causal: bool, mask: Mask | None, join: Join | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attn_qkv(self.norm1(x_BLH)).chunk(3, -1))
        q, k = rotate(q, cos_LD, sin_LD).to(v.dtype), rotate(k, cos_LD, sin_LD).to(v.dtype)
        if join is not None:
            k, v = join(k, v)
        x_BLH = x_BLH + self._drop(self.attn_out(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2)))
        return x_BLH + self._drop(self.mlp(self.norm2(x_BLH)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class DiT(nn.Module):
    """Embedding, layers, final norm, and an output head that is tied to the embedding or has weights and a bias of its own."""

    def __init__(self, entries: int, config: StudentConfig):
        super().__init__()
        hidden = config.hidden
        if hidden % (2 * config.heads):
            raise ValueError(f"student.hidden is {hidden}; it must be a multiple of 2 x student.heads = {2 * config.heads}")
        self.head_width = hidden // config.heads
        self.embed_tokens = nn.Embedding(entries, hidden)
        self.layers = nn.ModuleList(Layer(hidden, config.heads, config.mlp or 4 * hidden, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(hidden)
        self.output = None if config.tied else nn.Linear(hidden, entries)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # residual branches start small, as in GPT-2
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if name.endswith(("attn_out.weight", "mlp.2.weight")) else 0.02)
            elif name.endswith(("mlp.0.bias", "mlp.2.bias", "output.bias")):
                nn.init.zeros_(parameter)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        return rotary(length, self.head_width, self.embed_tokens.weight.device)

    def head(self, x: Tensor, vocab_size: int) -> Tensor:
        """Logits over the first `vocab_size` entries, float32, or float64 where the weights are."""
        weight, bias = (self.embed_tokens.weight, None) if self.output is None else (self.output.weight, self.output.bias[:vocab_size])
        logits = F.linear(self.norm(x), weight[:vocab_size], bias)
        return logits if logits.dtype == torch.float64 else logits.float()


def transformer(config: StudentConfig, entries: int) -> Backbone | DiT:
    """The network that `student.backbone` names, for a vocabulary of that many entries."""
    if config.backbone == "dit":
        return DiT(entries, config)
    if not config.tied:
        raise ValueError("student.tied is false, which only student.backbone dit can be; drop it")
    return Backbone(entries, config.layers, config.hidden, config.heads, config.mlp, config.dropout)
