"""A float32 model on a CPU with its weights laid out once for oneDNN, instead of in every matrix product.

What it buys: a forward over several tokens then waits for the weights once, as a forward over one does, and on processors for which the
library that torch otherwise calls is not made, every product is faster (benchmarks/packed.py). Same numbers up to float32 rounding. The layout is
oneDNN's own and cannot be saved, trained or moved; the output layer keeps its plain weight beside it, which others read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from noise.storage import DatasetError

_ROWS = 8  # the layout is chosen for products of about so many rows; more are as fast in it


class Packed(nn.Module):
    """A linear layer: weight float32 [O, I], bias float32 [O] or None."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, keep: bool):
        super().__init__()
        self.bias = bias_O
        self.weight = weight_OI if keep else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


@torch.inference_mode()
def pack(model: Any, setting: str, way_out: str) -> None:
    """Replace every linear layer of a Hugging Face model, in place. Raises DatasetError, naming the setting and the way out, where that cannot be."""
    _check(model, setting, way_out)
    probe_BL = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))[None]
    expected_BLV = model(input_ids=probe_BL, use_cache=False).logits
    _replace(model)
    try:
        found_BLV = model(input_ids=probe_BL, use_cache=False).logits
    except (AttributeError, RuntimeError, TypeError) as error:  # a model that looks into its layers
        raise DatasetError(f"{setting} is true, but a {type(model).__name__} does not run on packed layers ({error}); set it to false") from None
    if not torch.allclose(found_BLV, expected_BLV, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise DatasetError(f"{setting} is true, but the packed {type(model).__name__} computes something else; set it to false")


def _check(model: Any, setting: str, way_out: str) -> None:
    weights = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    if weights != {("cpu", torch.float32)}:
        device, dtype = sorted(weights - {("cpu", torch.float32)}, key=str)[0]
        raise DatasetError(
            f"{setting} is true, but the model computes on {device} in {str(dtype).removeprefix('torch.')}, not on cpu in float32; {way_out}"
        )
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        raise DatasetError(f"{setting} is true, but this build of torch has no oneDNN; set it to false")


def _replace(model: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    for parent in [part for part in model.modules() if type(part) not in (nn.Linear, Conv1D)]:  # so that what is replaced is let go
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, Packed(layer.weight, layer.bias, layer is output))
            elif type(layer) is Conv1D:  # GPT-2's linear layer, whose weight is [I, O]
                setattr(parent, name, Packed(layer.weight.T.contiguous(), layer.bias, False))
