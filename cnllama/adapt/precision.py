# SPDX-License-Identifier: Apache-2.0
"""In which types weights are kept and multiplied: what does not train may be narrow, what trains is float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnllama.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """frozen: how weights that do not train are kept. products: the type of matrix products (autocast, if not float32).

    What trains, its gradients, the optimizer, norms, softmax and loss are float32 in every case.
    """

    frozen: torch.dtype = torch.float32
    products: torch.dtype = torch.float32

    def autocast(self, device: str) -> Any:
        """A context in which matrix products are of their type."""
        return torch.autocast(device, self.products, enabled=self.products != torch.float32)


def choose_precision(name: str, bf16: bool, full: bool, device: str) -> Precision:
    """name, bf16: of --dtype and --bf16; full: every parameter trains; device: "cpu" or "cuda".

    Without bf16, products are float32 on a CPU, and on a GPU of the type that the weights are kept in. Raises
    InputError for what cannot be.
    """
    if full and name not in ("auto", "float32"):
        raise InputError(f"--dtype is {name}, but --full trains every weight in float32; use --bf16 for speed")
    able = device != "cuda" or torch.cuda.is_bf16_supported()
    if name == "auto":
        frozen = torch.bfloat16 if device == "cuda" and able and not full else torch.float32
    else:
        frozen = DTYPES[name]
    products = torch.bfloat16 if bf16 else frozen if device == "cuda" else torch.float32
    if products == torch.bfloat16 and not able:
        mend = "--dtype float16" if frozen == torch.bfloat16 else "leave --bf16 out"
        raise InputError(f"{torch.cuda.get_device_name()} has no bfloat16; use {mend}")
    return Precision(frozen, products)


class _FrozenProduct(torch.autograd.Function):
    """x times the transpose of a weight of another type. Autograd would keep the converted weight until it is done."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., in] -> [..., out], in the type of autocast where it is on, else in that of x.

    weight: [out, in] of any float type, which does not train.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if weight.dtype == kind:
        return nn.functional.linear(x, weight, bias)
    product: torch.Tensor = _FrozenProduct.apply(x.to(kind), weight)
    return product if bias is None else product + bias.to(kind)


class FrozenLinear(nn.Linear):
    """A linear layer that does not train and is kept in any float type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return frozen_linear(x, self.weight, self.bias)


def freeze_linears(model: nn.Module) -> None:
    """Makes every linear layer whose weight needs no gradient a FrozenLinear."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = FrozenLinear
