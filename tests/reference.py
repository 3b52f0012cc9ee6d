# SPDX-License-Identifier: Apache-2.0
"""The oracle: the forward pass of a packed model in plain NumPy, written from docs/format.md and design.md.

It shares no code with the engine: weights are taken apart from the documented layout, sums are in float64, and values
are rounded only where the engine defines a rounding (int8 activations, float32 between ops, the cache's types).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

PackedTensors = dict[str, tuple[np.ndarray, str, int, int]]

# bits of the planes of a block, columns of a group, has a min
SCHEMES = {
    **{f"q8-s{group}": ((8,), group, False) for group in (32, 64, 128)},
    **{f"q6-s{group}": ((4, 2), group, False) for group in (32, 64, 128)},
    **{f"q5-s{group}": ((4, 1), group, False) for group in (32, 64, 128)},
    **{f"q5-a{group}": ((4, 1), group, True) for group in (64, 128)},
    **{f"q4-s{group}": ((4,), group, False) for group in (32, 64, 128)},
    **{f"q4-a{group}": ((4,), group, True) for group in (64, 128)},
    **{f"q3-s{group}": ((2, 1), group, False) for group in (32, 64)},
    **{f"q3-a{group}": ((2, 1), group, True) for group in (64, 128)},
    "q2-s32": ((2,), 32, False),
    **{f"q2-a{group}": ((2,), group, True) for group in (64, 128)},
}


def unpack(packed: np.ndarray, scheme: str, rows: int, cols: int) -> np.ndarray:
    """float64 [rows, cols]: panels of 16 rows, superblocks of 256 columns, lines of 4 columns by 16 rows."""
    planes, group, asymmetric = SCHEMES[scheme]
    bits = sum(planes)
    panels = -(-rows // 32) * 2
    width = -(-cols // group) * group
    data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8).reshape(panels, -1)
    out = np.empty((panels, 16, width))
    at = 0
    for begin in range(0, width, 256):
        span = min(256, width - begin)
        groups, blocks = span // group, span // 32
        table = data[:, at : at + groups * 16 * 2 * (1 + asymmetric)].copy().view(np.float16).astype(np.float64)
        table = table.reshape(panels, 1 + asymmetric, groups, 16)
        at += -(-groups * 16 * 2 * (1 + asymmetric) // 64) * 64
        lines = data[:, at : at + blocks * 64 * bits].reshape(panels, blocks, bits, 16, 4).astype(np.int64)
        at += blocks * 64 * bits
        values = np.zeros((panels, blocks, 8, 16, 4), np.int64)  # the third index is that of four columns
        below = 0
        for plane in planes:
            for four in range(8):  # a plane of p bits keeps every p-th four columns in a line
                taken = lines[:, :, below + four % plane] >> four // plane * plane & (1 << plane) - 1
                values[:, :, four] += taken << below
            below += plane
        # [panel, block, four, row, 4] -> [panel, row, block, four, 4] = [panel, row, column]
        q = np.moveaxis(values, -2, 1).reshape(panels, 16, groups, group)
        scale = np.moveaxis(table[:, 0], 1, 2)[..., None]
        offset = np.moveaxis(table[:, 1], 1, 2)[..., None] if asymmetric else -scale * (1 << (bits - 1))
        out[:, :, begin : begin + span] = (scale * q + offset).reshape(panels, 16, span)
    assert at == data.shape[1], f"{scheme}: a panel of {data.shape[1]} bytes was read to {at}"
    return out.reshape(panels * 16, width)[:rows, :cols]


def quantize_activations(x: np.ndarray) -> np.ndarray:
    """x float32 [m, cols] rounded to int8 times one float32 scale for every 256 columns; float64."""
    out = np.empty(x.shape)
    for begin in range(0, x.shape[1], 256):
        block = x[:, begin : begin + 256].astype(np.float32)
        peak = np.abs(block).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
        scale = (peak / np.float32(127)).astype(np.float64)
        out[:, begin : begin + 256] = np.rint(block * inverse).astype(np.float64) * scale
    return out


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return np.float32(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * gamma)


def rotary_frequencies(config: dict[str, Any], length: int = 0) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor of cos and sin. Only dynamic NTK reads `length`."""
    dim, theta = config["head_dim"], config["rope_theta"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor", 1.0)
    context = config["max_position_embeddings"]
    amplitude = 1.0
    if kind == "dynamic" and length > context:
        theta *= (factor * length / context - (factor - 1)) ** (dim / (dim - 2))
    steps = np.arange(dim // 2)
    frequency = theta ** (-2.0 * steps / dim)
    original = scaling.get("original_max_position_embeddings", context)
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "llama3":
        turns = original * frequency / (2 * math.pi)  # within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    elif kind == "yarn":

        def dimension(rotations: float) -> float:
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        shrink = np.clip((steps - low) / max(high - low, 0.001), 0, 1)
        frequency = frequency * (1 - shrink) + frequency / factor * shrink
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        amplitude = 0.1 * math.log(factor) + 1
        if above and below:
            amplitude = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
        amplitude = scaling.get("attention_factor") or amplitude
    return np.float32(frequency), amplitude


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [m, heads, d]; pairs (j, j + d/2) turn by the angle whose cos and sin [m, d/2] are given."""
    low, high = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.float32(np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1))


def round_cache(x: np.ndarray, kv_type: str) -> np.ndarray:
    """What the cache gives back for float32 [m, heads, d]: fp16 values, or int8 times one fp16 scale per head."""
    if kv_type == "fp16":
        return np.float16(x).astype(np.float64)
    scale = np.float16(np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint(x * inverse), -127, 127).astype(np.float64) * scale


@dataclass
class Reference:
    """A packed model: `config` as in the .cnl, `tensors` as the engine takes them."""

    config: dict[str, Any]
    tensors: PackedTensors
    kv_type: str = "fp16"
    quantized_activations: bool = True

    def __post_init__(self) -> None:
        self._weights = {}
        for name, (data, scheme, rows, cols) in self.tensors.items():
            if scheme == "f32":
                self._weights[name] = np.ascontiguousarray(data).reshape(-1).view(np.float32)[:rows].astype(np.float64)
            else:
                self._weights[name] = unpack(data, scheme, rows, cols)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """float32 [m, rows] of float32 [m, cols]: quantized activations times weights, plus a bias if there is one."""
        if self.quantized_activations:
            x = quantize_activations(x)
        out = x.astype(np.float64) @ self._weights[name + ".weight"].T
        return np.float32(out + self._weights.get(name + ".bias", 0.0))

    def attend(self, x: np.ndarray, prefix: str, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        m, d = len(x), self.config["head_dim"]
        q, k, v = (self.linear(x, f"{prefix}{p}_proj").reshape(m, -1, d) for p in "qkv")
        q = rotate(q, cos, sin).astype(np.float64)
        k = round_cache(rotate(k, cos, sin), self.kv_type)
        v = round_cache(v, self.kv_type)
        groups = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
        scores[:, np.triu(np.ones((m, m), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return self.linear(np.float32(np.einsum("hij,jhd->ihd", p, v).reshape(m, -1)), prefix + "o_proj")

    def feed_forward(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = self.linear(x, prefix + "gate_proj").astype(np.float64)
        up = self.linear(x, prefix + "up_proj").astype(np.float64)
        return self.linear(np.float32(gate / (1 + np.exp(-gate)) * up), prefix + "down_proj")

    def logits(self, ids: list[int], rope_length: int = 0) -> np.ndarray:
        """float32 [len(ids), vocab] of one sequence run from its beginning."""
        w, eps = self._weights, self.config["rms_norm_eps"]
        frequency, amplitude = rotary_frequencies(self.config, rope_length)
        angle = np.arange(len(ids))[:, None] * frequency.astype(np.float64)
        cos, sin = (np.float32(amplitude * part(angle)).astype(np.float64) for part in (np.cos, np.sin))
        x = np.float32(w["model.embed_tokens.weight"][ids])
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = x + self.attend(rms_norm(x, w[name + "input_layernorm.weight"], eps), name + "self_attn.", cos, sin)
            x = x + self.feed_forward(rms_norm(x, w[name + "post_attention_layernorm.weight"], eps), name + "mlp.")
        x = rms_norm(x, w["model.norm.weight"], eps)
        return self.linear(x, "lm_head" if "lm_head.weight" in w else "model.embed_tokens")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(reference: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL(reference ‖ ours) in nats at every position of logits [n, vocab]."""
    p, q = log_softmax(reference), log_softmax(ours)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def entropy(logits: np.ndarray) -> np.ndarray:
    p = log_softmax(logits)
    return -(np.exp(p) * p).sum(axis=-1)


def assert_agrees(reference: np.ndarray, ours: np.ndarray, mean: float, peak: float) -> None:
    """KL(reference ‖ ours) stays under both bounds, on logits with enough spread for them to mean something."""
    spread = entropy(reference).mean()
    assert 1 < spread < 6, f"a mean entropy of {spread:.2f} nats makes the bound meaningless"
    kl = divergence(reference, ours)
    assert kl.mean() < mean, f"mean KL {kl.mean():.2e}, the bound is {mean}"
    assert kl.max() < peak, f"KL {kl.max():.2e} at position {kl.argmax()}, the bound is {peak}"
