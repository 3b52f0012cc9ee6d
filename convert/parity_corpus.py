# SPDX-License-Identifier: Apache-2.0
"""Texts that tokenizers disagree on. A changed text is a new corpus: raise VERSION with it.

Corpus 1 is TEXTS; corpus 2 also has texts around a file's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

VERSION = "2"
_MOST_TOKENS = 40  # of a file, spread over them

TEXTS = (
    # Chinese: prose, verse, dialogue, punctuation, names, traditional forms
    "今天早上下了一场小雨，路上的行人都撑着伞。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "“你吃了吗？”他笑着问道：“我们一起去吧！”",
    "机器学习模型需要大量的训练数据，但数据的质量比数量更重要。",
    "中华人民共和国成立于一九四九年十月一日",
    "《红楼梦》的作者是曹雪芹；后四十回一般认为由高鹗续写……",
    "請問圖書館幾點關門？謝謝您的幫助。",
    "的的的的的的的的的的的的的的的的",
    "囧囧有神，不明觉厉，喜大普奔",
    "重庆银行行长在长江边长跑",
    "他说：「明天会更好」——真的吗？",
    "北京市海淀区中关村大街27号，邮编100080",
    # English and other scripts
    "The quick brown fox jumps over the lazy dog.",
    "It's a don't-care condition; isn't it? \"Yes,\" she said.",
    "UPPER lower MiXeD CamelCase snake_case kebab-case",
    "antidisestablishmentarianism",
    "naïve café résumé Zürich São Tomé Ærøskøbing",
    "こんにちは、世界。カタカナとひらがな。",
    "안녕하세요 세계",
    "Привет, мир! Как дела?",
    "שלום עולם مرحبا بالعالم",
    "สวัสดีชาวโลก नमस्ते दुनिया",
    # Mixed
    "使用Python 3.11编写的API，返回JSON格式的结果。",
    "我在Google和OpenAI的blog上看到了GPT-4的paper",
    "iPhone15的价格是￥5999，约合$830",
    "请把file.txt复制到/home/用户/文档/目录下",
    "A股今天涨了3.14%，成交额1.2万亿元",
    "OK啦，bye bye~ 明天见^_^",
    # Emoji and symbols outside the basic plane
    "😀😃😄 哈哈 👍🏽 👨‍👩‍👧‍👦 🇨🇳 ❤️",
    "🀄🎴🧧红包来了🎉🎉🎉",
    "∑∫∂√∞≈≠≤≥ αβγδε ①②③ ⅠⅡⅢ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒢𝓇𝑒𝑒𝓀",
    # Rare characters: byte fallback in most vocabularies
    "𠮷野家 𡃁仔 𪚥 㐀㐁㐂 龘靐齉爩",
    "䶮㙓㵘 饕餮魑魅魍魉 彳亍",
    "ᚠᚢᚦᚨᚱᚲ ꙮ ꧁꧂ ࿐",
    "\ue000\uf8ff 私用区字符",
    "゛゜ﾊﾝｶｸ ㌔㌢ ㍿ ㈱",
    # Spaces: leading, double, trailing, only
    " leading space",
    "  two leading spaces",
    "double  space   triple    four",
    "trailing space ",
    "trailing two  ",
    " ",
    "   ",
    "中文 之间 有 空格",
    "中文  两个空格  ",
    # Line breaks and tabs
    "first line\nsecond line",
    "空行之后\n\n还有一段\n",
    "\nstarts with a line break",
    "windows\r\nline\r\nbreaks\r",
    "column\tcolumn\t\tcolumn",
    "\n\n\n\t \n",
    # Forms that normalisation may touch
    "ＡＢＣ１２３，．！？（）［］",
    "全角　空格　在这里",
    "no\u00a0break\u202fspaces\u2003em",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "e\u0301 é ﬁ ﬂ ½ ² ™ Å Ω",
    "左到右\u202e右到左\u202c",
    # Digits and code
    "0 1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 ２０２４",
    "2024年02月29日 23:59:59 +08:00 192.168.0.1 0xDEADBEEF 1e-9",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # 平方\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; }",
    '{"键": "值", "list": [1, 2.5, null, true]}',
    "<s> </s> <unk> [PAD] <0x0A> ▁ ▁▁ <|im_start|>user\n你好<|im_end|>",
)

# {0} is a token of the file, {1} the one after it.
_AROUND = (
    "{0}", "你好{0}世界", "你好 {0} 世界", "hello{0}world", "  {0}  ", "{0}{0}", "{0}{1}", "{0}\n{1} x", "▁{0}▁",
    "_{0}9",
)  # fmt: skip


def own_texts(names: Sequence[str]) -> Iterator[str]:
    """Texts with the names of a file's control and added tokens, whole, doubled, in words and cut short."""
    step = max(1, -(-len(names) // _MOST_TOKENS))
    for i in range(0, len(names), step):
        name, following = names[i], names[(i + 1) % len(names)]
        yield from (around.format(name, following) for around in _AROUND)
        yield "你好" + name[:-1] + "世界"
