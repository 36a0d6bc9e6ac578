"""What the loop, the checkpoints and a saved folder ask of a student; a student overrides what differs.

Weights that do not require grad are frozen: they are neither optimised, averaged nor saved, and the student finds them
again by itself (a backbone by its path). Buffers are saved and loaded with the weights, so that a student may keep small
state of its own; `persistent=False` leaves one out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from noise.decode import Noise
from trainer.chance import Chance
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import Batch, Dataset


class Base(nn.Module, ABC):
    """A student without its layers and its loss."""

    config: StudentConfig
    noise: NoiseConfig
    vocab_size: int
    block_length: int
    mask_id: int | None
    """None: it reads no masks."""
    ahead: int = 0
    """Masked positions that one call may show: the next so many of a row; 0: any."""
    recipe: dict[str, Any]
    """The settings of its training; of a loaded student."""
    provenance: dict[str, Any]
    """The dataset it learnt from, and its figures; of a loaded student."""

    @abstractmethod
    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss summed over rows, nats; figures, which are summed over batches and divided by their tokens), in training and evaluation alike.

        noise_of gives each row the extracted noise of another batch's row: the probe, which tells whether that noise is read.
        """

    @property
    @abstractmethod
    def figure_names(self) -> list[str]:
        """Names of the figures that `forward` returns, in training and evaluation alike."""

    @property
    def compiled_parts(self) -> Iterable[nn.Module]:
        """The modules whose `forward` is compiled when `compile` is set."""
        model: Any = self.model
        return list(model.layers)

    def fits(self, dataset: Dataset) -> list[str]:
        """Told the dataset before training: what to say of it. Raises DatasetError, by field, where it cannot learn from it."""
        return []

    def _noise(self, batch: Batch, chance: Chance, where_N: Tensor, noise_of: Batch | None) -> Noise | None:
        """Gumbel noise, unmade, at flat places b L + t, int64 [N], in training; `noise_of` gives each row the noise of another batch's row."""
        length = batch.input_ids_BL.shape[1]
        if self.noise.kind == "none":
            return None
        if self.noise.kind == "independent":
            rows_N5 = chance.fresh_rows(batch.sequence_id_B[where_N // length], where_N % length)
            return Noise.prior(rows_N5, batch.codec.vocab_size)
        return (noise_of or batch).lazy_noise_at(where_N)

    def after_heldout(self, figures: dict[str, float]) -> None:
        """Told the held-out figures a token (equal on all processes) after every evaluation; may change its buffers."""

    def own_state(self) -> dict[str, Tensor]:
        """Weights that are trained and buffers that are kept: what checkpoints and saved students hold."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Load what `own_state` gave. Raises RuntimeError, as `load_state_dict` does, when names or shapes differ."""
        whole = self.state_dict()
        self.load_state_dict({**{name: whole[name] for name in whole.keys() - self.own_state().keys()}, **state})
