"""Heads on a frozen causal LM (Medusa, arXiv 2401.10774), each with the noise of its own and the preceding positions.

The backbone reads x_<=t and predicts x_t+1 itself; head k = 1..K reads its hidden state h_t, and predicts x_t+1+k:

    block(h) = h + SiLU(W h + b + S [n_1 .. n_k+1])      logits_k = output layer(block(h_t)),  W = b = S = 0 at first

so that an untrained head is the backbone's own output layer. n_j stands for position t+j: its noise (input), and for j <= k
its draft. Draft j is softmax(sharpness (logits_j-1 + scale g_t+j)) re-embedded, where logits_0 are the backbone's own: where the
backbone is the teacher, draft 1 is what it wrote, all but exactly, and head 1 only has to continue that. The readout adds
scale g_t+1+k to the logits of head k. Loss:

    sum over heads k and positions t of  decay^k  -log softmax(logits_k)[x_t+1+k],  where t+1..t+1+k all have noise

Shapes as in the package; N positions t, J = K + 1 places after each, P = B L flat places b L + t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noise.decode import Noise
from noise.storage import DatasetError
from trainer import objectives
from trainer.backbone import NORM_EPS
from trainer.chance import Chance
from trainer.conditioning import NoiseInput, check, given
from trainer.config import MedusaConfig, StudentConfig
from trainer.data import Batch, Dataset
from trainer.frozen import Frozen
from trainer.heads import Head, HeadDraft
from trainer.students.base import Base

NoiseAt = Callable[[Tensor], Tensor | Noise | None]
"""Gumbel noise of flat places int64 [N], made or unmade; None where there is none."""


@dataclass
class Step:
    """What is said about the place `offset` after t: by the backbone where it is 1, by head offset - 1 else."""

    offset: int
    target_N: Tensor
    """int64: flat places t + offset, for all t where everything up to there has noise."""
    logits_NV: Tensor | None
    """The head's; the backbone's own has none here."""
    draft_NV: Tensor | None
    """The draft's, where this place has one."""


class Medusa(Base):
    """Heads alone: the backbone is held outside of the parameters. It is loaded, or is `base`."""

    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int, base: Frozen | None = None):
        super().__init__()
        _check(config)
        self.base = Frozen(config.medusa, vocab_size, block_length) if base is None else base
        found = replace(config.medusa, revision=self.base.revision, weights_sha256=self.base.weights_sha256)
        noise = config.noise
        self.config, self.noise = replace(config, medusa=found), noise
        self.vocab_size, self.mask_id, self.block_length = vocab_size, None, block_length
        self.places = found.heads_count + 1
        hidden = self.base.hidden
        self.input = NoiseInput(noise, vocab_size, hidden) if noise.input != "none" else None
        self.empty = nn.Parameter(torch.zeros(hidden)) if noise.input == "add" else None  # stands where a masked student has its mask embedding
        self.slot_norm = nn.RMSNorm(hidden, eps=NORM_EPS) if self.input is not None or noise.drafts else None
        self.drafts = nn.ModuleDict({str(place): HeadDraft(hidden, noise.kind != "none") for place in sorted(noise.drafts)})
        self.heads = nn.ModuleList(
            Head(hidden, len(self._slots(number)), found.blocks, self._own_output(found), noise.readout) for number in range(1, self.places)
        )

    def _own_output(self, medusa: MedusaConfig) -> nn.Module | None:
        return copy.deepcopy(self.base.output).float().requires_grad_(True) if medusa.lm_head == "own" else None

    def _slots(self, number: int) -> list[int]:
        """The places after t that head `number` knows something of."""
        return [place for place in range(1, number + 2) if self.input is not None or (place <= number and place in self.noise.drafts)]

    @property
    def figure_names(self) -> list[str]:
        """The heads' loss; each head's cross-entropy a token (nats) and top-1 accuracy; the drafts' cross-entropy."""
        more = ["_token_kd"] if self.config.objective.token_kd else []
        heads = [f"head_{number}{end}" for number in range(1, self.places) for end in ("", *more, "_top1")]
        return ["heads", *heads, *(f"draft_{place}" for place in self.drafts)]

    @property
    def compiled_parts(self) -> Iterable[nn.Module]:
        return list(self.heads)

    def fits(self, dataset: Dataset) -> list[str]:
        if changed := self.base.other_tokens(dataset.tokenizer):
            raise DatasetError(
                f"student.medusa.backbone {self.base.name} has another tokenizer than {dataset.address}: {'; '.join(changed)}; "
                "take the dataset's teacher, or extract the text with this backbone's tokenizer"
            )
        teacher = (dataset.manifest.identity.get("teacher") or {}).get("weights_sha256")
        whose = "the dataset's teacher" if teacher == self.base.weights_sha256 else "not the dataset's teacher, whose noise it then tells less about"
        return [f"heads on {self.base.name}, frozen: {whose}"]

    def own_state(self) -> dict[str, Tensor]:
        """The heads, and the hash of the backbone that they belong to."""
        return {**super().own_state(), "backbone_sha256": torch.tensor(list(bytes.fromhex(self.base.weights_sha256)), dtype=torch.uint8)}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        theirs = bytes(state["backbone_sha256"].tolist()).hex() if "backbone_sha256" in state else self.base.weights_sha256
        if theirs != self.base.weights_sha256:
            raise DatasetError(
                f"student.medusa.backbone {self.base.name} is another model than the heads were trained on: weights_sha256 is "
                f"{self.base.weights_sha256} here, {theirs} there; put that model in its place"
            )
        super().load_own_state({name: tensor for name, tensor in state.items() if name != "backbone_sha256"})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Medusa:
        """The backbone goes along to another device."""
        super()._apply(fn, recurse)
        self.base.to(next(self.parameters()).device)
        return self

    def propose(self, ids_BL: Tensor, g_BJV: Tensor | None = None, cache: Any = None) -> tuple[Tensor, Any]:
        """(logits float32 [B, J, V] of the J = K + 1 tokens that follow, KV cache), in one call of the backbone.

        ids int64 [B, L] continue what the cache holds (None: nothing yet); g float32 [B, J, V] is the Gumbel noise of the J places that
        follow. The first logits are the backbone's own, log p up to a constant, without noise: argmax(log p + g) is what the teacher
        writes there. Take n rejected tokens back with `cache.crop(-n)`, then give those that stand instead.
        """
        hidden_BLH, cache = self.base.read(ids_BL, cache, keep=True)
        return self.heads_at(hidden_BLH[:, -1], g_BJV), cache

    def heads_at(self, hidden_BH: Tensor, g_BJV: Tensor | None = None) -> Tensor:
        """float32 [B, J, V]: the backbone's own logits and the heads', from its hidden states after the last known tokens."""
        if (g_BJV is None) != (self.noise.kind == "none") or (g_BJV is not None and g_BJV.shape[1] != self.places):
            raise ValueError(
                f"student.noise.kind is {self.noise.kind} and there are {self.places - 1} heads, but noise of "
                f"{0 if g_BJV is None else g_BJV.shape[1]} places was given; give that of the {self.places} that follow, and none to kind none"
            )
        rows, width = len(hidden_BH), self.places + 1
        valid_P = torch.ones(rows, width, dtype=torch.bool, device=hidden_BH.device)
        valid_P[:, 0] = False

        def noise_at(place_N: Tensor) -> Tensor | None:
            return None if g_BJV is None else g_BJV[place_N // width, place_N % width - 1]

        steps = self._steps(hidden_BH, torch.arange(rows, device=hidden_BH.device) * width, valid_P, noise_at)
        heads = [step.logits_NV for step in steps if step.logits_NV is not None]
        return torch.stack([self.base.logits(hidden_BH), *heads], dim=1)

    def _steps(self, hidden_NH: Tensor, at_N: Tensor, valid_BL: Tensor, noise_at: NoiseAt) -> Iterator[Step]:
        """Backbone and heads in order, each for those of the places t (flat, int64 [N]) whose following places are all valid up to its own."""
        valid_P, slot_PH = F.pad(valid_BL.flatten(), (0, self.places)), self._inputs(valid_BL, noise_at)
        drafted: dict[int, Tensor] = {}
        for offset in range(1, self.places + 1):
            stays_N = valid_P[at_N + offset] & (at_N % valid_BL.shape[1] + offset < valid_BL.shape[1])
            at_N, hidden_NH = at_N[stays_N], hidden_NH[stays_N]
            drafted = {place: drafted_NH[stays_N] for place, drafted_NH in drafted.items()}
            yield self._step(offset, hidden_NH, at_N, drafted, slot_PH, noise_at)

    def _step(self, offset: int, hidden_NH: Tensor, at_N: Tensor, drafted: dict[int, Tensor], slot_PH: Tensor | None, noise_at: NoiseAt) -> Step:
        """One place; its draft goes into `drafted`."""
        head: Any = self.heads[offset - 2] if offset > 1 else None
        draft: Any = self.drafts[str(offset)] if offset in self.noise.drafts else None
        reads = draft is not None or (head is not None and head.readout is not None)
        g_NV = given(self.noise, noise_at(at_N + offset)) if reads else None
        logits_NV = draft_NV = None
        if head is not None:
            hidden_NH = head(hidden_NH, self._slot_vectors(offset - 1, at_N, drafted, slot_PH))
            logits_NV = self.base.logits(hidden_NH) if head.lm_head is None else head.lm_head(hidden_NH).float()
        if draft is not None:
            own_NV = self.base.logits(hidden_NH) if logits_NV is None else logits_NV
            draft_NV, drafted[offset] = draft(own_NV, hidden_NH, g_NV, self.base.embedding_VH)
        if head is not None and head.readout is not None:
            logits_NV = head.readout(logits_NV, hidden_NH, g_NV)
        return Step(offset, at_N + offset, logits_NV, draft_NV)

    def _inputs(self, valid_BL: Tensor, noise_at: NoiseAt) -> Tensor | None:
        """softmax(g) through the projection at every valid place, [P, H]: made once, read by all heads."""
        if self.input is None:
            return None
        place_N = valid_BL.flatten().nonzero()[:, 0]
        g_NV = given(replace(self.noise, stream=True), noise_at(place_N))
        seen_NH = self.input(self.empty, g_NV, self.base.embedding_VH)
        return seen_NH.new_zeros(valid_BL.numel(), self.base.hidden).index_copy(0, place_N, seen_NH)

    def _slot_vectors(self, number: int, at_N: Tensor, drafted: dict[int, Tensor], slot_PH: Tensor | None) -> Tensor | None:
        """[N, slots, H], each of unit size: softmax(g) is spread so thin that its projection would be lost beside a hidden state."""
        slots = []
        for place in self._slots(number):
            parts = [] if slot_PH is None else [slot_PH[at_N + place]]
            parts += [drafted[place]] if place in drafted else []
            slots.append(torch.stack(parts).sum(0))
        return self.slot_norm(torch.stack(slots, dim=1)) if slots and self.slot_norm is not None else None

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures: each head's mean over its own positions, times the batch's tokens.

        A head far ahead has fewer positions than the batch has tokens. `noise_of`: as in the other students.
        """
        valid_BL, tokens = batch.valid_BL, batch.tokens()
        at_N = valid_BL.flatten().nonzero()[:, 0] - 1
        hidden_NH = self.base.read(batch.input_ids_BL)[0].flatten(0, 1)[at_N]
        loss = drafts = hidden_NH.new_zeros(())
        figures: dict[str, Tensor] = {}
        for step in self._steps(hidden_NH, at_N, valid_BL, lambda place_N: self._noise(batch, chance, place_N, noise_of)):
            number, token_N = step.offset - 1, batch.input_ids_BL.flatten()[step.target_N]
            share = tokens / max(1, len(token_N))
            if step.logits_NV is not None:
                loss_N, parts = objectives.losses(self.config.objective, step.logits_NV, token_N, batch, step.target_N)
                loss = loss + self.config.medusa.head_decay**number * loss_N.sum()
                figures |= {f"head_{number}" + ("" if name == "nelbo" else f"_{name}"): share * part_N.sum() for name, part_N in parts.items()}
                figures[f"head_{number}_top1"] = share * (step.logits_NV.detach().argmax(-1) == token_N).sum()
            if step.draft_NV is not None:
                loss_N, parts = objectives.losses(self.config.objective, step.draft_NV, token_N, batch, step.target_N)
                drafts = drafts + self.noise.draft_weight * loss_N.sum()
                figures[f"draft_{step.offset}"] = share * parts["nelbo"].sum()
        return loss + drafts, {"heads": loss.detach(), **figures}


def _check(config: StudentConfig) -> None:
    """Raises ValueError for settings that would be ignored or cannot work."""
    medusa, noise, usual = config.medusa, config.noise, StudentConfig()
    for name in ("layers", "hidden", "heads", "mlp", "dropout", "shift", "predict", "context"):
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(f"student.{name} is {getattr(config, name)}, but a medusa student has the shape of its backbone; drop it")
    for name, value, least in (("heads_count", medusa.heads_count, 1), ("blocks", medusa.blocks, 1)):
        if value < least:
            raise ValueError(f"student.medusa.{name} is {value}; it must be at least {least}")
    if not 0 < medusa.head_decay <= 1:
        raise ValueError(f"student.medusa.head_decay is {medusa.head_decay}; it must be above 0 and at most 1")
    if noise.draft_restart:
        raise ValueError("student.noise.draft_restart is set, but a medusa head has no stream of layers to start again; drop it")
    check(noise, medusa.heads_count)
    objectives.check(config.objective, noise)
