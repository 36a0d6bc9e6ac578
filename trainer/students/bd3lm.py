"""Block diffusion (BD3-LM, arXiv 2503.09573): blocks of S positions one after the other, masked diffusion within each.

Every block has a mask rate of its own, and sees the clean blocks before it; all blocks learn in one forward over [x_t ; x_0]:

    NELBO = sum over blocks of E_rate [ 1/rate  sum over masked positions of  -log softmax(logits)[x] ]

Noise is given at the masked positions, so in the noised half alone; by option (`noise.known`) at known tokens too, in both.
One block over the row is MDLM; blocks of one position are autoregressive, and at rate 1 (evaluation takes it) the bound is the
exact likelihood. Training may clip the rates (`clip`); evaluation never does, so only its figure is a bound. The token at
position 0 (BOS) is given, in the first block.
Shapes as in the package; N masked positions, row-major; M slots of [x_t ; x_0] (`layout`); T positions so far; C blocks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from noise.decode import Noise
from trainer import clip
from trainer.attention import Cache
from trainer.chance import SMALLEST_TIME, Chance
from trainer.conditioning import KnownNoise
from trainer.config import StudentConfig
from trainer.data import Batch
from trainer.layout import layout
from trainer.students.masked import Masked

_NARROWEST_FLEX_HEAD = 16  # FlexAttention refuses narrower heads


class BD3LM(Masked):
    clip: Tensor
    """float64 [2]: the interval that the search found last; training resumes with it."""

    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        super().__init__(config, vocab_size, block_length)
        if not 1 <= config.block_size <= block_length:
            raise ValueError(f"student.block_size is {config.block_size}; a bd3lm student needs 1 to {block_length}, the dataset's block length")
        clip.check(config.clip)
        if config.clip_search and config.block_size == 1:
            raise ValueError("student.clip_search is set, but blocks of one position have no variance at mask rate 1; set student.clip to [1, 1]")
        self.block_size, self.blocks = config.block_size, -(-block_length // config.block_size)
        if config.clip_search:
            self.register_buffer("clip", torch.tensor(config.clip, dtype=torch.float64))
            self._moments: list[Tensor] = []

    def logits(
        self,
        ids_BT: Tensor,
        g_NV: Tensor | None = None,
        length_B: Tensor | None = None,
        cache: Cache | None = None,
        known: KnownNoise | None = None,
    ) -> Tensor:
        """float32 [N, V] where ids int64 [B, T] hold the mask id, in one block of each row, given their noise float32 [N, V].

        known: noise of known tokens, at flat places b T + t; that of tokens which the cache holds is not read again.
        With a cache the masked positions are in the last block; blocks before it that the cache does not hold yet are added to it.
        Raises ValueError where a row has masked positions in several blocks: the earlier ones come first.
        """
        if cache is not None:
            return self._continue(ids_BT, g_NV, length_B, cache, known)
        self._check_one_block(ids_BT)
        return self.predict(ids_BT, ids_BT, g_NV, length_B, known)[0]

    def empty_cache(self) -> Cache:
        """A cache for rows of at most the student's block length."""
        return Cache(self.config.layers, self.block_length + self.shift)

    def predict(
        self, noised_BL: Tensor, clean_BL: Tensor, g_NV: Tensor | Noise | None, length_B: Tensor | None = None, known: KnownNoise | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Output logits [N, V] and each draft's, [N, V], of every block in one forward over [x_t ; x_0]."""
        device = noised_BL.device
        slots = layout(noised_BL.shape[1], self.block_size, bool(self.shift), device)
        ids_BM = slots.fill(noised_BL, clean_BL)
        where_N = ((ids_BM == self.mask_id) & slots.from_noised_M).flatten().nonzero()[:, 0]
        cos_LD, sin_LD = self.model.rotary(noised_BL.shape[1])
        rotary = cos_LD[slots.position_M], sin_LD[slots.position_M]
        shown = self._shown(known, ids_BM, slots.position_M, noised_BL.shape[1])
        return self.through(ids_BM, where_N, g_NV, rotary, slots.mask(length_B, self._flex(device)), known=shown)

    def _flex(self, device: torch.device) -> bool:
        wanted = self.config.attention
        if wanted == "flex" and device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError("student.attention is flex, which has no backward pass on CPU; set it to auto or sdpa")
        return wanted == "flex" or (wanted == "auto" and device.type == "cuda" and self.model.head_width >= _NARROWEST_FLEX_HEAD)

    def _check_one_block(self, ids_BT: Tensor) -> None:
        row_N, position_N = (ids_BT == self.mask_id).nonzero(as_tuple=True)
        block_N = position_N // self.block_size
        same = row_N[1:] == row_N[:-1]
        if bool((same & (block_N[1:] != block_N[:-1])).any()):
            raise ValueError("a row has masked positions in several blocks; fill the earlier blocks first (eval.blocks does)")

    def _continue(self, ids_BT: Tensor, g_NV: Tensor | None, length_B: Tensor | None, cache: Cache, known: KnownNoise | None) -> Tensor:
        """The last block's logits, from the cached blocks and those since, which one forward adds to the cache on its way."""
        length, filled = ids_BT.shape[1], cache.filled
        start = (length - 1) // self.block_size * self.block_size
        lead = [start - 1] if self.shift and start else []
        position_Q = torch.tensor([*range(filled, start), *lead, *range(start, length)], device=ids_BT.device)
        ids_BQ = ids_BT[:, position_Q]
        where_N = (ids_BQ == self.mask_id).flatten().nonzero()[:, 0]
        mask = None
        if filled < start:
            block_Q = position_Q // self.block_size
            block_Q[start - filled :] = start // self.block_size
            mask = torch.cat((block_Q.new_full((filled,), -1), block_Q)) <= block_Q[:, None]
        if length_B is not None:
            position_K = torch.cat((torch.arange(filled, device=ids_BT.device), position_Q))
            within = (position_K < length_B[:, None])[:, None, None, :]
            mask = within if mask is None else mask & within
        cos_LD, sin_LD = self.model.rotary(length)
        shown = self._shown(known, ids_BQ, position_Q, length)
        logits_NV, _ = self.through(ids_BQ, where_N, g_NV, (cos_LD[position_Q], sin_LD[position_Q]), mask, cache, shown)
        cache.filled = start
        return logits_NV

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures (sums) to log. `noise_of` gives each row the noise of another batch's row: the probe."""
        length = batch.input_ids_BL.shape[1]
        rate_BC = chance.rates(batch.place_B, self.blocks, *self.rates())
        rate_BL = rate_BC.repeat_interleave(self.block_size, 1)[:, :length]
        masked_BL = chance.masked(batch.sequence_id_B, rate_BL, length) & batch.valid_BL
        where_N = masked_BL.flatten().nonzero()[:, 0]
        logits_NV, drafts = self.predict(
            batch.input_ids_BL.masked_fill(masked_BL, self.mask_id),
            batch.input_ids_BL,
            self._noise(batch, chance, where_N, noise_of),
            batch.length_B if batch.padded else None,
            self._known(batch, chance, batch.valid_BL, noise_of),
        )
        loss, terms = self.weighted(batch, where_N, (1.0 / rate_BL).flatten()[where_N], logits_NV, drafts)
        if self.config.clip_search and not self.training and noise_of is None:
            self._moments.append(clip.moments(*self._block_losses(batch, rate_BC, where_N, terms["nelbo"])))
        return loss, {name: term_N.sum() for name, term_N in terms.items()}

    def rates(self) -> tuple[float, float]:
        """The interval of mask rates: all of it in evaluation, 1 alone where a block is one position; what is clipped in training."""
        if not self.training:
            return (1.0, 1.0) if self.block_size == 1 else (SMALLEST_TIME, 1.0)
        low, high = self.clip.tolist() if self.config.clip_search else self.config.clip
        return max(low, SMALLEST_TIME), high

    def _block_losses(self, batch: Batch, rate_BC: Tensor, where_N: Tensor, nelbo_N: Tensor) -> tuple[Tensor, Tensor]:
        """(rate, loss a token) of every block that has tokens."""
        length = batch.input_ids_BL.shape[1]
        position_L = torch.arange(length, device=where_N.device)
        block_BL = torch.arange(len(rate_BC), device=where_N.device)[:, None] * self.blocks + position_L // self.block_size
        block_BL = block_BL.flatten()
        sums = torch.zeros(rate_BC.numel(), dtype=torch.float64, device=where_N.device)
        loss_C = sums.index_add(0, block_BL[where_N], nelbo_N.double())
        tokens_C = sums.index_add(0, block_BL, batch.valid_BL.flatten().double())
        return rate_BC.flatten()[tokens_C > 0], (loss_C / tokens_C)[tokens_C > 0]

    def after_heldout(self, figures: dict[str, float]) -> None:
        """Choose the interval of mask rates anew, from all processes' held-out blocks."""
        if not self.config.clip_search:
            return
        moments_K3 = torch.stack([clip.no_moments(self.clip.device), *self._moments]).sum(0)
        self._moments = []
        if dist.is_initialized():
            dist.all_reduce(moments_K3)
        self.clip.copy_(torch.tensor(clip.search(moments_K3), dtype=torch.float64))
