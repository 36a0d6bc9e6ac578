"""The transformer that every student shares: pre-norm, rotary positions, SwiGLU, no biases, tied embeddings.

Parameter names and numerics are those of Hugging Face's Llama, so a causal checkpoint loads by name, and an `ar` student
saves as one. Attention is causal for `ar`, and otherwise over the whole row or what a mask shows (`attention`).
Shapes: B rows, L positions, H hidden, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Mask, attend

Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values -> all of them: `attention.Cache.join` of one layer"""

NORM_EPS = 1e-5
ROPE_BASE = 10000.0


def mlp_width(hidden: int, mlp: int) -> int:
    """The configured MLP width, or 8/3 of the hidden width rounded up to a multiple of 32."""
    return mlp or -(-hidden * 8 // (3 * 32)) * 32


def rotary(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [L, D], in Llama's half-split layout (Su et al. 2021)."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angle_LD = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle_LD.cos(), angle_LD.sin()


def rotate(x: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_LD + torch.cat((-second, first), dim=-1) * sin_LD


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BLH: Tensor, cos_LD: Tensor, sin_LD: Tensor, causal: bool, mask: Mask | None, join: Join | None = None) -> Tensor:
        q, k, v = (p(x_BLH).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos_LD, sin_LD).to(v.dtype), rotate(k, cos_LD, sin_LD).to(v.dtype)
        if join is not None:
            k, v = join(k, v)
        projected: Tensor = self.o_proj(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, width: int, dropout: float):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.self_attn = Attention(hidden, heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.mlp = MLP(hidden, width)
        self.dropout = dropout

    def forward(self, x_BLH: Tensor, cos_LD: Tensor, sin_LD: Tensor, causal: bool, mask: Mask | None, join: Join | None = None) -> Tensor:
        x_BLH = x_BLH + self._drop(self.self_attn(self.input_layernorm(x_BLH), cos_LD, sin_LD, causal, mask, join))
        return x_BLH + self._drop(self.mlp(self.post_attention_layernorm(x_BLH)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Backbone(nn.Module):
    """Embedding, layers, final norm, tied output head. Students call the parts in their own order."""

    def __init__(self, entries: int, layers: int, hidden: int, heads: int, mlp: int = 0, dropout: float = 0.0):
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"student.hidden is {hidden}; it must be a multiple of 2 x student.heads = {2 * heads}")
        self.head_width = hidden // heads
        self.embed_tokens = nn.Embedding(entries, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, mlp_width(hidden, mlp), dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():  # residual branches start small, as in GPT-2
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        return rotary(length, self.head_width, self.embed_tokens.weight.device)

    def head(self, x: Tensor, vocab_size: int) -> Tensor:
        """Logits over the first `vocab_size` entries, float32, or float64 where the weights are."""
        logits = F.linear(self.norm(x), self.embed_tokens.weight[:vocab_size])
        return logits if logits.dtype == torch.float64 else logits.float()
