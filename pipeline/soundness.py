"""One shard of a finished dataset, checked row by row: ranges, counts, order, and that the noise stream explains what is kept.

Every kept entry is redrawn from the stream: one that no draw explains is damage. That the realised token x wins under the
decoded noise g, argmax(log p + g) = x, has two halves, since x itself stands at log p_x + g_x = -log E_0:

    kept entry i   log p_i + g_i <= log p'_i - log(E_i + p'_i E_0) < -log E_0, p' being what its code decodes to and at least p:
                   computed here for every row, kept entry and draw, by the decoder that students use
    the others     log p_i - log E_i <= log c - log E_0 < -log E_0, since c < 1 and E_i >= p_i E_0 / c, or they would have been
                   kept: the first is checked of the codec, the second only the teacher knows (`verify --deep` asks it)

Text that a teacher wrote keeps no entries, but the token x is where E_i / p_i is least, so E_x / p_x is Exp(1) at every
position, independently: noise or log-probs of other text stand out in one row. (`replay` asks the teacher itself.)
Costs one pass over the bytes. Shapes: B rows, L block length, N positions with noise, K kept entries.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from noise import philox
from noise.decode import corrections
from noise.identity import Identity
from noise.receipt import TOTALS, Receipt, Totals
from noise.shard import Rows, ShardMetadata, ShardReader
from noise.sketch import Sketch, dequantise, justified
from noise.storage import DatasetError

LARGEST_RATIO = 64.0
"""E_x / p_x of a token that its noise chose: above this with probability e^-64."""
IMPROBABLE = 40.0
"""Nats of improbability at which the mean of a shard's ratios is taken for damage: e^-40."""
ROUNDING = 1e-5
"""Nats by which float32 may bring a kept entry's score above the token's, and 2^-22 of the token's log-prob."""


def verify_shard(reader: ShardReader, receipt: Receipt, identity: Identity) -> None:
    metadata, counted, seen = reader.metadata, Totals(reader.metadata), 0
    ids: list[np.ndarray] = []
    ratios: list[np.ndarray] = []
    for rows in reader:
        check_tokens(reader.path, rows, metadata, seen, identity["tokenizer"]["bos"])
        check_noise(reader.path, rows, metadata, seen)
        if metadata.extraction == "sequential":
            check_ends(reader.path, rows, seen, identity)
            ratios.append(check_choices(reader.path, rows, metadata, seen))
        counted.add(rows)
        ids.append(rows.sequence_id)
        seen += len(rows)
    found = counted.receipt(receipt.file, receipt.sha256, receipt.bytes, receipt.characters_in)
    for name in TOTALS:
        if getattr(found, name) != getattr(receipt, name):
            raise DatasetError(f"{reader.path}: the receipt says {name} {getattr(receipt, name)}, the rows have {getattr(found, name)}")
    check_left_out(reader.path, np.concatenate(ids) if ids else np.empty(0, np.uint64), receipt, metadata.shard)
    if seen and len(np.unique(np.concatenate(ids))) != seen:
        raise DatasetError(f"{reader.path}: a sequence_id occurs twice; the noise of two rows would be the same")
    if ratios:
        check_mean(reader.path, np.concatenate(ratios))


def check_left_out(path: Path | str, sequence_id_B: np.ndarray, receipt: Receipt, made_as: int) -> None:
    """The rows that the receipt calls quarantined are not there; ids begin with the number that the shard was made under."""
    there = set(sequence_id_B.tolist()) & {made_as * 2**32 + row.row for row in receipt.quarantined}
    if there:
        row = min(there) % 2**32
        raise DatasetError(f"{path}: row {row} is there, but its receipt says that it was left out (quarantined); fetch shard and receipt again")


def check_tokens(path: Path | str, rows: Rows, metadata: ShardMetadata, seen: int, bos: int) -> None:
    place_L = np.arange(metadata.block_length)[None]
    padding_BL = place_L >= rows.length[:, None]
    _refuse(path, seen, (rows.length < 1) | (rows.length > metadata.block_length), f"length outside 1..{metadata.block_length}")
    _refuse(path, seen, (rows.input_ids < 0) | (rows.input_ids >= metadata.vocab_size), f"token id outside 0..{metadata.vocab_size - 1}")
    _refuse(path, seen, rows.input_ids[:, 0] != bos, f"the row does not begin with BOS ({bos})")
    _refuse(path, seen, padding_BL & (rows.input_ids != 0), "padding is not 0")
    silent_BL = ~rows.has_noise(metadata.extraction)
    _refuse(path, seen, silent_BL & (rows.log_prob != 0), "log_prob where there is no noise")
    _refuse(path, seen, (silent_BL | (metadata.extraction != "parallel")) & (rows.kept != 0), "kept entries where there is no noise")
    _refuse(path, seen, ~((rows.log_prob <= 0) & np.isfinite(rows.log_prob)), "log_prob is above 0 or not finite")


def check_noise(path: Path | str, rows: Rows, metadata: ShardMetadata, seen: int) -> None:
    """Entries in range, ascending, not the token, and each explained by a draw."""
    position_N = np.flatnonzero(rows.kept)
    kept_N = rows.kept.reshape(-1)[position_N].astype(np.int64)
    owner_K = np.repeat(position_N, kept_N)
    index_K = rows.index.astype(np.int64)

    def refuse(bad_K: np.ndarray, reason: str) -> None:
        row_K = owner_K // metadata.block_length
        _refuse(path, seen, np.bincount(row_K[bad_K], minlength=len(rows)) > 0, reason)

    refuse(index_K >= metadata.vocab_size, f"a kept entry is not below {metadata.vocab_size}")
    follows_K = np.diff(owner_K, prepend=-1) == 0
    refuse(follows_K & (np.diff(index_K, prepend=-1) <= 0), "kept entries are not ascending within a position")
    refuse(index_K == rows.input_ids.reshape(-1)[owner_K], "the realised token is among the kept entries")
    sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy())[torch.from_numpy(position_N // metadata.block_length)]
    rows_N5 = philox.rows(int(metadata.seed), sequence_N, torch.from_numpy(position_N % metadata.block_length))
    codes_K = torch.from_numpy(rows.code.astype(np.int64))
    sketch = Sketch(torch.from_numpy(rows.log_prob.reshape(-1)[position_N]), torch.from_numpy(kept_N), torch.from_numpy(index_K), codes_K)
    refuse(~justified(sketch, rows_N5, metadata.codec).numpy(), "a kept entry that no draw of the noise stream explains")
    token_N = torch.from_numpy(rows.input_ids.reshape(-1)[position_N].astype(np.int64))
    refuse(beaten(sketch, token_N, rows_N5, metadata), "a kept entry that beats the realised token")
    # probabilities of one position cannot add up to more than 1, however far codes round them up
    mass = np.bincount(np.repeat(np.arange(len(kept_N)), kept_N), dequantise(codes_K, metadata.codec).numpy(), minlength=len(kept_N))
    token_p = np.exp(rows.log_prob.reshape(-1)[position_N].astype(np.float64))
    bad_N = mass * np.exp(-metadata.step) + token_p > 1 + 1e-3
    _refuse(path, seen, np.bincount(position_N[bad_N] // metadata.block_length, minlength=len(rows)) > 0, "probabilities that add up to more than 1")


def beaten(sketch: Sketch, token_N: torch.Tensor, rows_N5: torch.Tensor, metadata: ShardMetadata) -> np.ndarray:
    """bool [K]: whether a kept entry's largest possible log p + g is above the token's, in any draw, by more than rounding."""
    beats_K = np.zeros(len(sketch.index_K), bool)
    log_prob_N = sketch.log_prob_N.double()
    for draw in range(metadata.draws):
        owner_M, _, g_M = corrections(sketch, token_N, philox.with_draw(rows_N5, draw), metadata.codec)
        owner_K, g_K = owner_M[: len(beats_K)], g_M[: len(beats_K)]
        token_N64 = log_prob_N + g_M[len(beats_K) :].double() + ROUNDING - log_prob_N * 2.0**-22
        beats_K |= ~(sketch.code_K.double() * -metadata.step + g_K.double() <= token_N64[owner_K]).numpy()
    return beats_K


def check_ends(path: Path | str, rows: Rows, seen: int, identity: Identity) -> None:
    """What the teacher wrote follows what was given without a gap, and ends by the rule of the identity."""
    L, eos = rows.input_ids.shape[1], identity["tokenizer"]["eos"]
    last_B = rows.length - 1
    written_BL = rows.has_noise("sequential")
    given_B = written_BL.argmax(1)
    _refuse(path, seen, written_BL.sum(1) != rows.length - given_B, "log_prob is 0 in the midst of what the teacher wrote, or everywhere")
    if identity["generation"]["stop"] == "never":
        _refuse(path, seen, rows.length != L, "the row does not fill its block")
        return
    ends_BL = written_BL & (rows.input_ids == eos)
    _refuse(path, seen, ends_BL & (np.arange(L) != last_B[:, None]), f"the row goes on after EOS ({eos})")
    _refuse(path, seen, (rows.length < L) & ~ends_BL.any(1), f"the row is shorter than its block and does not end in EOS ({eos})")


def check_choices(path: Path | str, rows: Rows, metadata: ShardMetadata, seen: int) -> np.ndarray:
    """E_x / p_x of every written token, float64 [N]; raises DatasetError where it is larger than chance makes it."""
    row_N, position_N = (torch.from_numpy(at) for at in np.nonzero(rows.has_noise("sequential")))
    rows_N5 = philox.rows(int(metadata.seed), torch.from_numpy(rows.sequence_id.view(np.int64).copy())[row_N], position_N)
    token_N = torch.from_numpy(rows.input_ids.astype(np.int64))[row_N, position_N]
    e_N = philox.exponential(philox.words_at(rows_N5, token_N)).numpy().astype(np.float64)
    ratio_N: np.ndarray = e_N * np.exp(-rows.log_prob[row_N, position_N].astype(np.float64))
    bad_N = ratio_N > LARGEST_RATIO
    _refuse(path, seen, np.bincount(row_N.numpy()[bad_N], minlength=len(rows)) > 0, "a token that its noise and its log_prob do not choose")
    return ratio_N


def check_mean(path: Path | str, ratio_N: np.ndarray) -> None:
    """The mean of N independent Exp(1) is m or farther from 1 with probability at most e^(-N (m - 1 - ln m)) (Chernoff)."""
    mean = float(ratio_N.mean())
    if len(ratio_N) * (mean - 1 - np.log(mean)) > IMPROBABLE:
        raise DatasetError(
            f"{path}: tokens, log_prob and noise do not belong together: E/p of the written tokens is {mean:.4f} on average over {len(ratio_N):,} "
            "positions, and must be 1; the shard is damaged, fetch it again or remake it from its plan"
        )


def _refuse(path: Path | str, seen: int, bad: np.ndarray, reason: str) -> None:
    if bad.any():
        raise DatasetError(
            f"{path}, row {seen + int(np.argwhere(bad)[0][0])}: {reason}; the shard is damaged, fetch it again or remake it from its plan"
        )
