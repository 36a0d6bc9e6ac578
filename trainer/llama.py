"""An `ar` student as a Hugging Face checkpoint folder: same names, same numbers (a test compares the logits)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.backbone import NORM_EPS, ROPE_BASE, mlp_width

if TYPE_CHECKING:
    from trainer.students.ar import AR


def save_llama(folder: Path, student: AR, weights: dict[str, Tensor]) -> None:
    """`save_pretrained` of a LlamaForCausalLM with these weights. ValueError where transformers is absent."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError("saving an `ar` student needs transformers: pip install transformers, then run the same command again") from None
    logging.disable_progress_bar()
    config = student.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=student.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=mlp_width(config.hidden, config.mlp),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=student.block_length,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
        )
    )
    llama.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    llama.save_pretrained(folder)
