"""Algorithm 1 of the paper: the noise that made a teacher choose a token that is already written.

In exponential space, a = exp(-g), the algorithm is a sum:

    a_i = E_i + p_i E_0   for i != x        a_x = p_x E_0        argmax_i(log p_i + g_i) = x, always

E_i are i.i.d. Exp(1). When x ~ p, the a_i are i.i.d. Exp(1) again, so g is exactly Gumbel(0, 1) (the paper's
`xi_k = -log(exp(-zeta_k) + p_k exp(-zeta_0))`, `xi_x = zeta_0 - log p_x`). This dense form is the reference that the
sketch approximates and that ablations call; pipelines never hold it for a whole batch.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from noise.philox import exponential, winner_exponential, words


def posterior_gumbel(log_probs_NV: Tensor, token_N: Tensor, rows_N5: Tensor) -> Tensor:
    """Posterior noise g, float32 [N, V], of tokens int64 [N] under log-probs float [N, V], from the stream's rows."""
    e0_N1 = winner_exponential(rows_N5)[:, None]
    a_NV = exponential(words(rows_N5, log_probs_NV.shape[1])) + log_probs_NV.exp() * e0_N1
    token_N1 = token_N[:, None]
    # g_x is formed in logs: p_x E_0 can underflow
    return (-a_NV.log()).scatter(1, token_N1, -log_probs_NV.gather(1, token_N1) - e0_N1.log())
