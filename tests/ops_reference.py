# SPDX-License-Identifier: Apache-2.0
"""The ops in NumPy, in float64 over the same quantized numbers, written from the comments of layout.hpp and ops.hpp."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scheme:
    bits: int
    group: int
    asymmetric: bool

    @property
    def zero(self) -> int:
        return 0 if self.asymmetric else 1 << (self.bits - 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of the planes of a block, low bits first."""
        return {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}[self.bits]

    @property
    def smallest(self) -> int:
        """The smallest integer that is stored; the largest has all bits set."""
        return 1 if self.bits == 8 else 0


def scheme(name: str) -> Scheme:
    """q4-a64: 4 bits, asymmetric, groups of 64."""
    bits, kind = name[1:].split("-")
    return Scheme(int(bits), int(kind[1:]), kind[0] == "a")


# Those that matmul kernels of all instruction sets and the GPU read as they are, then those that are expanded.
FIRST = ("q4-s64", "q4-a64", "q4-s32", "q8-s64")
OTHERS = (
    *("q4-s128", "q4-a128", "q8-s32", "q8-s128", "q6-s32", "q6-s64", "q6-s128", "q5-s32", "q5-s64", "q5-a64"),
    *("q5-s128", "q5-a128", "q3-s32", "q3-s64", "q3-a64", "q3-a128", "q2-s32", "q2-a64", "q2-a128"),
)
SCHEMES = {name: scheme(name) for name in FIRST + OTHERS}


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def superblock_bytes(s, cols):
    header = round_up(cols // s.group * 16 * 2 * (2 if s.asymmetric else 1), 64)
    return header, header + cols // 32 * 16 * 32 * s.bits // 8


def panel_bytes(s, cols):
    padded = round_up(cols, s.group)
    spans = [min(256, padded - k) for k in range(0, padded, 256)]
    return sum(superblock_bytes(s, span)[1] for span in spans)


def unpack(packed, scheme, rows, cols):
    """(q, scale, min) as float64 [rows, padded cols] of a packed matrix, straight from the layout's picture."""
    s = SCHEMES[scheme]
    padded_cols, padded_rows = round_up(cols, s.group), round_up(rows, 32)
    panels = np.asarray(packed, np.uint8).reshape(padded_rows // 16, panel_bytes(s, cols))
    q, scale, low = (np.zeros((padded_rows // 16, 16, padded_cols)) for _ in range(3))
    offset = 0
    for start in range(0, padded_cols, 256):
        span = min(256, padded_cols - start)
        header, size = superblock_bytes(s, span)
        groups = span // s.group
        halves = panels[:, offset : offset + groups * 32 * (2 if s.asymmetric else 1)].copy().view(np.float16)
        halves = halves.reshape(len(panels), -1, groups, 16)
        where = slice(start, start + span)
        scale[:, :, where] = np.repeat(halves[:, 0].transpose(0, 2, 1), s.group, axis=2)
        if s.asymmetric:
            low[:, :, where] = np.repeat(halves[:, 1].transpose(0, 2, 1), s.group, axis=2)
        lines = panels[:, offset + header : offset + size].reshape(len(panels), span // 32, s.bits, 16, 4)
        blocks, first = 0, 0  # blocks [panels, blocks, 8 lines of 4 columns, 16, 4]
        for bits in s.planes:
            plane = lines[:, :, first : first + bits]
            parts = [plane >> at & (1 << bits) - 1 for at in range(0, 8, bits)]
            blocks = blocks | np.concatenate(parts, axis=2) << first
            first += bits
        q[:, :, where] = blocks.transpose(0, 3, 1, 2, 4).reshape(len(panels), 16, span)
        offset += size
    return tuple(x.reshape(padded_rows, padded_cols)[:rows] for x in (q, scale, low))


def dequantize(packed, scheme, rows, cols):
    """float64 [rows, cols]."""
    q, scale, low = unpack(packed, scheme, rows, cols)
    return ((q - SCHEMES[scheme].zero) * scale + low)[:, :cols]


def pack(q, scale, low, scheme):
    """Packed bytes of integers [rows, cols] and fp16 scales and mins [rows, groups]; cols a multiple of the group."""
    s = SCHEMES[scheme]
    rows, cols = q.shape
    padded = round_up(rows, 32)
    full_q = np.full((padded, cols), s.zero, np.uint8)
    full_q[:rows] = q
    halves = []
    for values in (scale, low) if s.asymmetric else (scale,):
        full = np.zeros((padded, cols // s.group), np.float16)
        full[:rows] = values
        halves.append(full.reshape(padded // 16, 16, -1))
    parts = []
    for start in range(0, cols, 256):
        span = min(256, cols - start)
        header, _ = superblock_bytes(s, span)
        groups = slice(start // s.group, (start + span) // s.group)
        head = np.stack([h[:, :, groups].transpose(0, 2, 1) for h in halves], axis=1)
        head = np.ascontiguousarray(head).view(np.uint8).reshape(padded // 16, -1)
        parts += [head, np.zeros((padded // 16, header - head.shape[1]), np.uint8)]
        lines = full_q[:, start : start + span].reshape(padded // 16, 16, span // 32, 8, 4).transpose(0, 2, 3, 1, 4)
        first, planes = 0, []
        for bits in s.planes:
            plane = lines >> first & (1 << bits) - 1
            steps = range(0, 8, bits)
            planes.append(sum(plane[:, :, at : at + bits] << at for at in steps))
            first += bits
        parts.append(np.concatenate(planes, axis=2, dtype=np.uint8).reshape(padded // 16, -1))
    return np.concatenate(parts, axis=1)


def quantize_activations(x):
    """(int8 [m, cols padded to 64], float32 scales [m, spans]) in float32, the one formula: rint(x * (127 / max))."""
    m, cols = x.shape
    spans = -(-cols // 256)
    wide = np.zeros((m, spans * 256), np.float32)
    wide[:, :cols] = x
    blocks = wide.reshape(m, spans, 256)
    top = np.abs(blocks).max(axis=2)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(np.clip(blocks * inverse[:, :, None], -127, 127)).astype(np.int8)
    return q.reshape(m, -1)[:, : round_up(cols, 64)], top / np.float32(127)


def dequantize_activations(q, scales, cols):
    wide = np.repeat(scales.astype(np.float64), 256, axis=1)[:, : q.shape[1]]
    return (q * wide)[:, :cols]


def matmul(x, packed, scheme, rows, bias=None):
    """(result float64 [m, rows], a bound on what float32 rounding may change)."""
    cols = x.shape[1]
    a = dequantize_activations(*quantize_activations(x), cols)
    q, scale, low = unpack(packed, scheme, rows, cols)
    w = ((q - SCHEMES[scheme].zero) * scale + low)[:, :cols]
    # A min and its scale may cancel: the bound counts both.
    magnitude = (np.abs((q - SCHEMES[scheme].zero) * scale) + np.abs(low))[:, :cols]
    out, bound = a @ w.T, np.abs(a) @ magnitude.T
    if bias is not None:
        out, bound = out + bias, bound + np.abs(bias)
    return out, 4e-7 * bound + 1e-30


def silu(z):
    z = np.asarray(z, np.float64)
    return z / (1 + np.exp(-z))


def rms_norm(x, gamma, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * gamma


def rope(x, cos, sin, head_dim):
    """x [rows, heads * head_dim], cos and sin [rows, head_dim / 2]; pairs (j, j + head_dim / 2)."""
    rows = len(x)
    h = x.astype(np.float64).reshape(rows, -1, 2, head_dim // 2)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    a, b = h[:, :, 0], h[:, :, 1]
    return np.stack([a * c - b * s, b * c + a * s], axis=2).reshape(rows, -1)


def stored_kv(x, head_dim, kv_type):
    """What a cache of this type keeps of k or v [rows, kv_heads * head_dim], as float64."""
    if kv_type == "fp16":
        return x.astype(np.float16).astype(np.float64)
    h = x.astype(np.float32).reshape(len(x), -1, head_dim)
    scale = (np.abs(h).max(axis=2, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.rint(np.clip(h * inverse, -127, 127))
    return (q.astype(np.float64) * scale).reshape(len(x), -1)


def attention(q, k, v, heads, kv_heads, lengths, kv_type="fp16"):
    """q [queries, heads * d]; k, v [positions, kv_heads * d]; lengths [(positions, queries)] of each sequence."""
    d = k.shape[1] // kv_heads
    keys, values = (stored_kv(x, d, kv_type).reshape(len(x), kv_heads, d) for x in (k, v))
    out = np.zeros((len(q), heads, d))
    queries = q.astype(np.float64).reshape(len(q), heads, d)
    row = first = 0
    for length, count in lengths:
        for i in range(count):
            stop = first + length - count + i + 1
            for h in range(heads):
                g = h // (heads // kv_heads)
                s = keys[first:stop, g] @ queries[row, h] / np.sqrt(d)
                p = np.exp(s - s.max())
                out[row, h] = p @ values[first:stop, g] / p.sum()
            row += 1
        first += length
    return out.reshape(len(q), -1)
