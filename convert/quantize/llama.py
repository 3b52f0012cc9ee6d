# SPDX-License-Identifier: Apache-2.0
"""The parts of a LLaMA layer in PyTorch, float32: what a calibration runs its samples through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Linear(NamedTuple):
    """weight: float32 [rows, cols]; bias: float32 [rows] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., cols] -> [..., rows]."""
        return functional.linear(x, self.weight, self.bias)


Layer = Mapping[str, Linear]  # by the names of ATTENTION and MLP


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] over its root mean square, times weight [n]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """silu(gate(x)) * up(x)."""
    return functional.silu(layer["gate_proj"](x)) * layer["up_proj"](x)


class Attention:
    """Causal attention with rotary embeddings, for samples of one length that begin at position 0."""

    def __init__(self, config: Mapping[str, Any], length: int, device: str) -> None:
        self._heads: int = config["num_attention_heads"]
        self._kv_heads: int = config["num_key_value_heads"]
        self._dim: int = config["head_dim"]
        frequency, amplitude = rotary_frequencies(config)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).to(torch.float32)
        self._cos = (angle.cos() * amplitude).to(device)
        self._sin = (angle.sin() * amplitude).to(device)

    def __call__(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """x [batch, length, hidden] -> [batch, length, heads * head_dim], the input of o_proj."""
        batch, length, _ = x.shape
        q = self._rotate(layer["q_proj"](x).view(batch, length, self._heads, self._dim).transpose(1, 2))
        k = self._rotate(layer["k_proj"](x).view(batch, length, self._kv_heads, self._dim).transpose(1, 2))
        v = layer["v_proj"](x).view(batch, length, self._kv_heads, self._dim).transpose(1, 2)
        if self._kv_heads != self._heads:
            k, v = (t.repeat_interleave(self._heads // self._kv_heads, dim=1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, self._heads * self._dim)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, heads, length, head_dim]: turns the pairs (j, j + head_dim / 2)."""
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * self._cos - high * self._sin, high * self._cos + low * self._sin), dim=-1)


def rotary_frequencies(config: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """(inverse frequencies float64 [head_dim / 2], factor of cos and sin), for lengths up to the trained context.

    Up to there dynamic NTK scaling is none. YaRN: 2309.00071, section 3.4.
    """
    dim, theta, scaling = config["head_dim"], config["rope_theta"], config["rope_scaling"] or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    steps = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * steps / dim)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        return _yarn(scaling, steps, frequency, dim, theta)
    return frequency, 1.0


def _yarn(
    scaling: Mapping[str, Any], steps: torch.Tensor, frequency: torch.Tensor, dim: int, theta: float
) -> tuple[torch.Tensor, float]:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return float(dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta)))

    low, high = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolated = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    frequency = frequency / factor * interpolated + frequency * (1 - interpolated)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        mscale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        ratio = _mscale(factor, mscale) / _mscale(factor, everywhere) if mscale and everywhere else None
        amplitude = _mscale(factor, 1.0) if ratio is None else ratio
    return frequency, float(amplitude)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
