"""FLOPs of a student's matrix products (a multiply-add is two); a test holds them against torch's own counter.

    layers    2 (4 H^2 + 3 H M) + 4 S H      each, a slot; the MLP of a dit is 2 H M
    head      2 H V                          a predicted position, as are all below
    input     2 V H, or 2 r (V + H) of low rank; own or tied weights cost the same; a known position too, where those carry noise
    draft     2 H V + 2 V H + 2 H^2          each: its logits, and softmax(logits + scale g) through the embedding
    scale     2 H                            of the readout, and of each draft that has noise
    backward  twice the forward, but for the gradient of the noise, which nobody asks for

Attention counts every pair of slots, seen or not. What is no product (softmax, making the noise) is left out.
Letters: S slots of a row, H hidden, M width of the MLP, V vocabulary, r rank.
"""

from __future__ import annotations

from trainer.backbone import mlp_width
from trainer.config import NoiseConfig, StudentConfig


def forward(config: StudentConfig, vocab_size: int, slots: int, predicted: float, known: float = 0) -> float:
    """Of one row, of which `predicted` positions get logits; at `known` others noise stands beside the token."""
    hidden = config.hidden
    layer = 2 * (4 * hidden**2 + mlp_weights(config)) + 4 * slots * hidden
    beside = known * input_flops(config.noise, hidden, vocab_size)
    return config.layers * slots * layer + beside + predicted * (2 * hidden * vocab_size + noise_flops(config.noise, hidden, vocab_size))


def training(config: StudentConfig, vocab_size: int, slots: int, predicted: float, known: float = 0) -> float:
    """Of one row's forward and backward."""
    noise = config.noise
    without = 2 * vocab_size * (noise.rank or config.hidden) if noise.input != "none" else 0
    return 3 * forward(config, vocab_size, slots, predicted, known) - (predicted + known) * without


def mlp_weights(config: StudentConfig) -> int:
    """Weights of one layer's MLP, biases aside."""
    if config.backbone == "dit":
        return 2 * config.hidden * (config.mlp or 4 * config.hidden)
    return 3 * config.hidden * mlp_width(config.hidden, config.mlp)


def noise_flops(noise: NoiseConfig, hidden: int, vocab_size: int) -> int:
    """What noise and drafts add at one predicted position."""
    scale = 2 * hidden if noise.kind != "none" else 0
    total = len(noise.drafts) * (4 * hidden * vocab_size + 2 * hidden**2 + scale) + noise.readout * scale
    return total + input_flops(noise, hidden, vocab_size)


def input_flops(noise: NoiseConfig, hidden: int, vocab_size: int) -> int:
    """Of the noise at one position, on its way into the student."""
    if noise.input == "none":
        return 0
    return 2 * noise.rank * (vocab_size + hidden) if noise.rank else 2 * vocab_size * hidden
