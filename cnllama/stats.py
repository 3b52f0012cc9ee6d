# SPDX-License-Identifier: Apache-2.0
"""How fast an answer came, and how close to the limit of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.textio import count_chinese, tr
from cnllama.weights import describe

if TYPE_CHECKING:
    from cnllama.llm import LLM
    from cnllama.request import Completion


def bytes_per_step(llm: LLM) -> int:
    """Bytes of weights that one decoding step reads: all but the embedding, of which it takes one row."""
    tensors = llm.file.engine_tensors()
    skipped = {EMBEDDING} if LM_HEAD in tensors else set()
    return sum(entry[0].nbytes for name, entry in tensors.items() if name not in skipped)


def characters_after_first(llm: LLM, completion: Completion) -> int:
    """Chinese characters of the answer that the first token did not bring: those whose time `timing.decode` is."""
    first = llm.tokenizer.decode(completion.token_ids[:1])
    return max(0, count_chinese(completion.text) - count_chinese(first))


def measure(llm: LLM, completion: Completion, bandwidth: bool = True) -> dict[str, Any]:
    """Figures of one request, seconds and rates by name; a rate whose time is zero is None.

    Rates of decoding, in tokens as in Chinese characters, leave out the first token, whose time belongs to the prefill.
    With `bandwidth` the main memory's is measured too, with the engine's threads, which takes some tenths of a second;
    a model on a GPU does not read it.
    """
    from cnllama import _core

    usage, timing = completion.usage, completion.timing
    rate = _ratio(timing.steps, timing.decode)
    limit = _core.read_bandwidth(llm.threads) if bandwidth and llm.device == "cpu" else None
    read = bytes_per_step(llm) + llm.plan.kv_per_token * (usage.prompt_tokens + usage.completion_tokens // 2)
    return {
        "load_s": llm.load_seconds,
        "prefill_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prefill_s": timing.prefill,
        "prefill_tokens_per_s": _ratio(usage.prompt_tokens - usage.cached_tokens, timing.prefill),
        "decode_tokens": timing.tokens,
        "decode_s": timing.decode,
        "decode_tokens_per_s": _ratio(timing.tokens, timing.decode),
        "decode_steps": timing.steps,
        "tokens_per_step": _ratio(timing.tokens, timing.steps),
        "speculate": llm.speculate,
        "drafted_tokens": usage.drafted_tokens,
        "accepted_tokens": usage.accepted_tokens,
        "chinese_chars": count_chinese(completion.text),
        "chinese_chars_per_s": _ratio(characters_after_first(llm, completion), timing.decode),
        "bytes_per_step": read,
        "bandwidth_bytes_per_s": limit,
        "bandwidth_share": read * rate / limit if rate and limit else None,
        "threads": llm.threads,
        "weights": llm.weight_memory.figures() if llm.weight_memory else None,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures in lines for people."""
    f = figures
    lines = [
        (tr("load", "加载"), f"{f['load_s']:.2f} s"),
        (tr("prefill", "预填充"), _speed(f["prefill_tokens"], f["prefill_s"], f["prefill_tokens_per_s"])),
        (tr("decode", "解码"), _speed(f["decode_tokens"], f["decode_s"], f["decode_tokens_per_s"])),
    ]
    if f["chinese_chars_per_s"] and f["chinese_chars"]:
        lines.append(
            (tr("Chinese", "中文"), f"{f['chinese_chars']} · {f['chinese_chars_per_s']:.1f} " + tr("chars/s", "字/秒"))
        )
    if f["speculate"]:
        lines.append((tr("guesses", "推测"), _guesses(f)))
    if f["bandwidth_share"]:
        share = (
            f"{f['bandwidth_share']:.0%}"
            if f["bandwidth_share"] <= 1
            else tr("over 100%, from the cache", "超过 100%，来自缓存")
        )
        read = f["bandwidth_share"] * f["bandwidth_bytes_per_s"] / 1e9
        limit = f["bandwidth_bytes_per_s"] / 1e9
        text = tr(
            f"{read:.1f} GB/s of {limit:.1f} GB/s measured with {f['threads']} threads: {share}",
            f"{read:.1f} GB/s，{f['threads']} 线程实测上限 {limit:.1f} GB/s：{share}",
        )
        lines.append((tr("memory", "内存带宽"), text))
    if f["weights"]:
        lines.append((tr("weights", "权重"), describe(f["weights"])))
    return "\n".join(f"{name}: {text}" for name, text in lines)


def _speed(tokens: int, seconds: float, rate: float | None) -> str:
    speed = f" · {rate:.1f} tok/s" if rate else ""
    return f"{tokens} " + tr("tokens", "词元") + f" · {seconds:.2f} s{speed}"


def _guesses(figures: dict[str, Any]) -> str:
    drafted, accepted = figures["drafted_tokens"], figures["accepted_tokens"]
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    each = figures["tokens_per_step"] or 1.0
    return tr(
        f"{drafted} tokens · {accepted} right{share} · {each:.2f} tokens a step",
        f"{drafted} 词元 · 猜对 {accepted}{share} · 每步 {each:.2f} 词元",
    )


def _ratio(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None
