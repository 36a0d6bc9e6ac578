"""The teacher writes the text from the noise: next token = argmax(log p + g), g the stream's at (seed, sequence_id, the row's position, draw 0).

Rows of a micro-batch go forward together, position by position from 0, with a KV cache: where a prompt still has tokens
they are given, where it has ended the teacher chooses. So a row is never shifted or padded on the left, its positions are
the model's and the noise's, and a step costs the same as with padding, since every row ends at the block's end.

What a row says of itself: log_prob is the teacher's log-prob of every token that it chose, **strictly below 0** (a certain
token gets the largest negative normal number), and 0 where a token was given: BOS, the prompt, padding. So a position has
noise if and only if its log_prob is below 0 (`Rows.has_noise`). Nothing is kept: the noise is the prior draw itself.

Equal bits: as of `extract`. In float64 the tokens do not depend on the micro-batch either.
Shapes: B rows, L block length, P longest prompt, N positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.commit import commit_shard
from noise.identity import Identity
from noise.receipt import Receipt
from noise.shard import Rows, ShardMetadata
from noise.sketch import TeacherError
from noise.storage import DatasetError, canonical_json, sha256_text
from pipeline.extract import Job, check_ids, rows_without_noise
from pipeline.making import Making
from pipeline.memory import MakeRows
from pipeline.packing import Blocks
from pipeline.tokenizer import Tokenizer

CERTAIN = -float(np.finfo(np.float32).tiny)
"""log_prob of a token that was chosen with a probability that rounds to 1."""


class Writer(Protocol):
    """What generation needs of a teacher."""

    device: torch.device

    def follow(self, input_ids_BL: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """(logits [B, V] of the token after these, KV cache to give back with the tokens that come next)"""


class Rule(Protocol):
    """How a token is chosen, whoever writes: `Choice` for datasets, eval's for samples."""

    @property
    def stop(self) -> int | None:
        """The id that ends a row, itself included; None = rows fill the block."""

    def scores(self, logits_NV: Tensor, rows_N5: Tensor) -> tuple[Tensor, Tensor]:
        """(what the token is the argmax of, log p), both [N, V]."""


@dataclass(frozen=True)
class Choice:
    """How the teacher chooses a token: the distribution that is sampled, and what ends a row."""

    temperature: float
    masked_V: Tensor
    """bool: ids that are never chosen"""
    stop: int | None
    """the id that ends a row, itself included; None = rows fill the block"""

    @classmethod
    def of(cls, identity: Identity, tokenizer: Tokenizer, device: torch.device) -> Choice:
        """The choice that an identity describes. Raises DatasetError when the tokenizer is not the one that it was made with."""
        rule = identity["generation"]
        ids = masked_ids(tokenizer, identity["vocab_size"], rule["special_tokens"], rule["stop"])
        if ids_hash(ids) != rule["masked_ids"]["sha256"]:
            raise DatasetError(f"the tokenizer at {tokenizer.folder} masks {len(ids)} ids, but not those of the dataset's identity; restore it")
        masked_V = torch.zeros(identity["vocab_size"], dtype=torch.bool)
        masked_V[ids] = True
        return cls(identity["teacher"]["temperature"], masked_V.to(device), tokenizer.eos if rule["stop"] == "eos" else None)

    def log_probs(self, logits_NV: Tensor) -> Tensor:
        """The log-probs that are sampled, [N, V], -inf at masked ids: float64 of float64 logits, else float32."""
        wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        return torch.log_softmax((wide_NV / self.temperature).masked_fill(self.masked_V, -torch.inf), dim=-1)

    def scores(self, logits_NV: Tensor, rows_N5: Tensor) -> tuple[Tensor, Tensor]:
        """(log p + g, log p), both [N, V]. The token is the argmax of the first."""
        log_probs_NV = self.log_probs(logits_NV)
        return log_probs_NV + philox.gumbel(rows_N5, log_probs_NV.shape[1]), log_probs_NV


def masked_ids(tokenizer: Tokenizer, vocab_size: int, special_tokens: str, stop: str) -> list[int]:
    """Ids below V that stand for nothing, and the special ones where they are masked (but EOS where it ends a row), ascending."""
    masked = set(range(vocab_size)) - tokenizer.ids()
    if special_tokens == "masked":
        masked |= tokenizer.special_ids() - ({tokenizer.eos} if stop == "eos" else set())
    return sorted(token for token in masked if token < vocab_size)


def ids_hash(ids: list[int]) -> str:
    return sha256_text(canonical_json(ids))


@torch.inference_mode()
def write(
    teacher: Writer, choice: Rule, seed: int, sequence_id_B: Tensor, given_BP: Tensor, given_B: Tensor, block_length: int, draw: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids int64 [B, L], length int64 [B], log_prob float32 [B, L]) of rows that begin with the first given_B tokens of given_BP, int64.

    `draw`: the stream's, 0 for a dataset, one of sampling's for samples.
    Raises TeacherError, its position flat in B L, where the log-prob of the chosen token is not finite.
    """
    device, L = teacher.device, block_length
    sequence_id_B, given_B = sequence_id_B.to(device), given_B.to(device)
    ids_BL = torch.zeros(len(given_B), L, dtype=torch.int64, device=device)
    ids_BL[:, : given_BP.shape[1]] = given_BP.to(device)
    log_prob_BL = torch.zeros(len(given_B), L, device=device)
    ended_B = torch.zeros_like(given_B, dtype=torch.bool)
    length_B = torch.full_like(given_B, L)
    first = int(given_B.min())
    logits_BV, cache = teacher.follow(ids_BL[:, :first])
    for position in range(first, L):
        if position > first:
            logits_BV, cache = teacher.follow(ids_BL[:, position - 1 : position], cache)
        writes_B = (given_B <= position) & ~ended_B
        scores_BV, log_probs_BV = choice.scores(logits_BV, philox.rows(seed, sequence_id_B, torch.full_like(given_B, position), draw))
        token_B = scores_BV.argmax(-1)
        log_prob_B = log_probs_BV.gather(-1, token_B[:, None])[:, 0].float().clamp_max(CERTAIN)
        ids_BL[:, position] = torch.where(writes_B, token_B, ids_BL[:, position])
        log_prob_BL[:, position] = log_prob_B * writes_B
        if choice.stop is not None:
            ends_B = writes_B & (token_B == choice.stop)
            length_B = torch.where(ends_B, position + 1, length_B)
            ended_B |= ends_B
            if bool(ended_B.all()):
                break
    log_prob_BL = log_prob_BL.cpu()
    bad = (~torch.isfinite(log_prob_BL)).flatten().nonzero()[:1, 0].tolist()
    for position in bad:
        raise TeacherError(position, f"the teacher's log-prob of the token is {float(log_prob_BL.flatten()[position])} (NaN or infinite logits)")
    return ids_BL.cpu(), length_B.cpu(), log_prob_BL


@dataclass(frozen=True)
class Generation(Job):
    """The shards of a dataset that the teacher writes."""

    def work(self, shard: int) -> int:
        """In rows."""
        return int(self.plan.shards[shard]["rows"])

    def extract(self, shard: int, making: Making | None = None) -> Receipt:
        """Write and commit one shard. Raises RowError naming shard and row for a prompt that leaves no room, or NaN logits."""
        making, metadata = making or Making(shard), self.plan.metadata(shard)
        with self.reading:
            given_BP, given_B = self._given(metadata, making)
        with closing(self.micro_batches(metadata, given_BP, given_B, self.make(), making)) as rows:
            return commit_shard(self.folder, metadata, rows, characters_in=0, quarantined=making.left_out)

    def make(self) -> MakeRows:
        """What writes rows on from what is given of them."""
        teacher: Any = self.teacher
        choice = Choice.of(self.plan.identity, self.tokenizer, teacher.device)

        def make(metadata: ShardMetadata, sequence_id_B: np.ndarray, given_BP: Blocks, given_B: Blocks) -> Rows:
            sequence = torch.from_numpy(sequence_id_B.view(np.int64))
            given = torch.from_numpy(given_BP.astype(np.int64)), torch.from_numpy(given_B.astype(np.int64))
            written = write(teacher, choice, int(metadata.seed), sequence, *given, metadata.block_length)
            ids_BL, length_B, log_prob_BL = (tensor.numpy() for tensor in written)
            rows = rows_without_noise(metadata, sequence_id_B, ids_BL.astype(np.int32), length_B.astype(np.int32))
            return replace(rows, log_prob=log_prob_BL)

        return make

    def longest_row(self) -> int:
        """BOS alone: the teacher writes the rest."""
        return 1

    def _given(self, metadata: ShardMetadata, making: Making) -> tuple[Blocks, Blocks]:
        """(int32 [B, P], int32 [B]): what each row begins with, and how much of it. Leaves out prompts that leave no room, or raises RowError."""
        rule, bos = self.plan.identity["generation"], self.plan.identity["tokenizer"]["bos"]
        if rule["prompts"] == "bos":
            count = self.plan.shards[metadata.shard]["rows"]
            given_BP, given_B = np.full((count, 1), bos, np.int32), np.ones(count, np.int32)
        else:
            prompts = [[bos, *ids[: rule["prompt_tokens"]]] for ids in self.tokens(self.documents(metadata.shard))]
            given_B = np.array([len(prompt) for prompt in prompts], np.int32).repeat(rule["samples"])
            given_BP = np.zeros((len(prompts), given_B.max()), np.int32)
            for row, prompt in enumerate(prompts):
                given_BP[row, : len(prompt)] = prompt
            given_BP = given_BP.repeat(rule["samples"], axis=0)
        for row in np.flatnonzero(given_B >= metadata.block_length).tolist():
            reason = (
                f"BOS and prompt have {given_B[row]} tokens, which leaves no room to write in a block of {metadata.block_length}; "
                "raise generate.block_length, or set generate.prompt_tokens"
            )
            making.leave_out(row, None, int(given_B[row]) - 1, len(given_B), reason, again=False)
        given_BP = given_BP[:, : metadata.block_length]
        check_ids(given_BP, given_B, metadata, making)
        return given_BP, given_B
