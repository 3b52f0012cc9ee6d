# SPDX-License-Identifier: Apache-2.0
"""Which encoding some bytes are in: UTF-8, what a byte-order mark says, or GBK where that is likely. None else is read.

Bytes that are no UTF-8 decode as GB18030 far too often: a UTF-8 text that was cut, Big5 and UTF-16 then come out as
rare characters. So a text is weighed by how common its characters are, and read as GBK when that speaks for it.
"""

from __future__ import annotations

import codecs
import functools
import os
from collections import Counter
from typing import NamedTuple

_BOMS = (  # UTF-32's first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    ("\ufeff".encode("gb18030"), "gb18030"),
)
_GBK_FAMILY = ("gbk", "gb2312", "gb18030", "cp936", "hz")
_COERCED = ("c.utf-8", "c.utf8", "utf-8")  # LC_CTYPE as Python itself sets it when the user's locale is not installed

# Natural logarithms of how much likelier a character is in Chinese text than in a text that was decoded wrongly, from
# counts over two million characters: the 1,000 most common ones make up nine tenths of it, the other 2,755 of level 1
# of GB 2312 a tenth, level 2 half a per cent. Punctuation and ASCII say nothing.
_COMMON_WEIGHT, _LEVEL_1, _LEVEL_2, _OTHER = 1.8, -1.4, -2.5, -5.0
# Below the first a text is refused; wrong readings of one character pass in 3 of 100 cases, of four in 1 of 3,000.
# Below the second it is read with a warning; wrong readings pass in 1 of 1,000 cases for two characters, never for one.
_LIKELY, _CERTAIN = 0.5, 3.0
_LIKELY_IN_LOCALE = -2.6  # of one character on average, where the locale says GBK
_SHORT = 64  # bytes; no longer text of another encoding is valid UTF-8 by chance (12 characters: 1 in 10,000)
_COMMON = frozenset(
    "的一是在了不人有和他为个中来以大我年上这国可时用于到生们子出地成能下后得要里自学也会多行家过说着去对日天而作方与分发就并之文数如动面定她使小开你法无都所事么好那看月同长其还将种高心本最主更物然山回前经"
    "新间起此因现西风三它从道重水公外相意理两进些没工化名语通力问当明部东何被应或头及据只但等知度机关体性世见入代想花点南加提平建处常全给什气民海老解很由计正程教路已样色实题又第北情者向别业合量表区美二斯十"
    "位类式政少期特门制系内任字客比几句马空白军声利车太儿变包把产话电立至身保活城清统金台手信目流影市总结创设云战算先书务果安己春口光次走尔四该原件候便未元许边写决品似球根共户交非界接江例直亚改受今型形称线"
    "女确器义王远香传列论五术约供场言持朝打州德组拉满深员落古带且放夜林始请需条运联万感眼归克思再每听觉近华神基做真星管半红象达标答才罗难住却阳命复助像响食取尽模造青服具英科游短网则容望指雨完故习各布诗技府"
    "选治爱石树记源社快单黄连议首士展示独步随秋认夫收必乐识反息飞河括领站院酒词节导转往强您君笑谁求述离轻格权史料早音广引千功司资集钱哪死存岛亲视草序参须让晚环队调易找终争曾寒初细图极读张项龙兴角越境支病阿"
    "构巴质效坐观历吃低编即鱼汉准值园号火房旧举试消帝烟断测商居百干官兰片足致失纪维喜歌热土够衣周画虽米增属获较究赛报素若留帮呢玉济闲推印友景描楼省尼欢注校层输亦雪港整预令照叶师波洲智黑索湾族研减微告叫含梦"
    "释码群划规除段九备置速静积闻底团松温际健党验木章野简破县岁莫欲密护沙双宣适排态续局送材率专块怎念拿康移装六查策寻母买乎况铁歇味办切绿级父孩精八依域围著瑞洋久营仍优戏育余另乡投船愁众征绝演兵奇势案忽状费"
    "李倒村屋堂险七京鸟湖略晓修胜考曲希武渐苦志医艺临乱冷福灯皇显散价止杯背采犹怕配脸欧假织卡丽佛旅软评露惊苏杂馆待职愿油降宫错击派负钟互纳换庭陆讲普室枝尘善暗威竹宗穿睡异限施拥跟压慢概窗田陈街永证祖仙谈析"
    "伊继富阴冠络律醉般男哥圣毛革农甚符充份敢端占养吧座梅差岸蒙朋饭脚残菜森孤篇急均跑韩塞休阅择吸登灵乘免控柳银协伤店胡超升吹伯牛藏杀委溪误突练桥销刘虚凉承严汽守防版鸡翻恩课害顺封妇药停玩唱哈楚丰谢鼓爷函尚"
    "妈隐遇吟责忘逐植紧圆录频奥茶探企礼泪皮讨呼卫否博访执剧某芳亮盖刻肉范托暖颜池鲜镇贵恨攻补佳败库诉荷斗益孙射板洛罢票阶卷激典检骨笔粉伦遗峰趣肯盘牙浪班疑悲丝弟隔冰洞吗劳疗批退幽训夏良怀忆宝缘享塔刚脑载霜"
)


class UndecodableError(ValueError):
    """The bytes are no text that can be told; the message is the end of a sentence about their source."""


class Text(NamedTuple):
    """A decoded text. doubt: the encoding it was read in, or may be in instead; empty where there is none."""

    text: str
    encoding: str
    doubt: str = ""


def decode(data: bytes, expected: str = "") -> Text:
    """Decodes bytes of a prompt. expected: "gb18030" where the user's locale says so.

    Raises UndecodableError for a damaged text and for encodings that can only be guessed.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return Text(data[len(bom) :].decode(encoding), encoding)
            except UnicodeDecodeError as error:
                raise UndecodableError(
                    f"byte {len(bom) + error.start} is not valid {encoding}, which its byte-order mark says it is: "
                    "get it again, or save it as UTF-8"
                ) from None
    if b"\0" in data:
        raise UndecodableError(f"there is a NUL at byte {data.index(0)}, which no text has{_advice(data)}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _decode_gbk(data, expected, error)
    return _doubted(data, text, expected)


def _decode_gbk(data: bytes, expected: str, error: UnicodeDecodeError) -> Text:
    text, weight = _as_gbk(data)
    cut = error.reason == "unexpected end of data"  # valid up to the first bytes of a character
    if expected == "gb18030" and weight >= _LIKELY_IN_LOCALE * _characters(text):
        return Text(text, "gb18030", "GBK" if cut else "")
    if cut:
        raise UndecodableError(
            f"the text ends within a character, at byte {error.start}: it was cut off; get all of it"
        )
    if weight < _LIKELY:
        raise UndecodableError(f"byte {error.start} is neither valid UTF-8 nor is the text likely GBK{_advice(data)}")
    return Text(text, "gb18030", "" if weight >= _CERTAIN else "GBK")


def _doubted(data: bytes, text: str, expected: str) -> Text:
    """What is valid UTF-8 is UTF-8, but short texts of other encodings may be valid by chance."""
    if len(data) > _SHORT:
        return Text(text, "utf-8")
    narrow = not text.isascii() and all(c < "\u0800" for c in text)  # two bytes each, as in GBK
    if narrow or (expected == "gb18030" and not text.isascii()):
        other, weight = _as_gbk(data)
        if expected == "gb18030" and weight >= max(_weight(text), _LIKELY_IN_LOCALE * _characters(other)):
            return Text(other, "gb18030")
        if narrow and weight >= _LIKELY:
            return Text(text, "utf-8", "GBK")
    wide = _wide(data)
    if wide and any(c < " " and c not in "\t\n\r\f\x1b" for c in text):
        raise UndecodableError(f"the text has control characters{_advice(data)}")
    return Text(text, "utf-8", "UTF-16" if wide else "")


def _as_gbk(data: bytes) -> tuple[str, float]:
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return "", float("-inf")
    return text, _weight(text)


def _wide(data: bytes) -> str:
    """The encoding of two bytes a character in which the bytes are surely Chinese, or empty."""
    for encoding in ("utf-16-le", "utf-16-be"):
        try:
            if _weight(data.decode(encoding)) >= _CERTAIN:
                return encoding
        except UnicodeDecodeError:
            continue
    return ""


def _advice(data: bytes) -> str:
    """The end of a refusal: what the bytes may be and how to convert them."""
    found = _wide(data) or next(filter(functools.partial(_decodes, data), _suspects(data)), "")
    if not found:
        return ": save it as UTF-8"
    name = found.upper().replace("-LE", "LE").replace("-BE", "BE")
    return f": if it is {name}, convert it with `iconv -f {name} -t UTF-8`"


def _suspects(data: bytes) -> tuple[str, ...]:
    if b"\0" not in data:
        return ("big5",)
    high_first = data[::2].count(0) > data[1::2].count(0)  # zeros of ASCII characters
    return ("utf-32-le", "utf-32-be", "utf-16-be" if high_first else "utf-16-le")


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _weight(text: str) -> float:
    """How much more a text looks like Chinese than like a wrong reading; -inf for control characters."""
    return sum(count * _of_character(character) for character, count in Counter(text).items())


def _characters(text: str) -> int:
    return sum(character > "\x7f" for character in text)


@functools.cache
def _of_character(character: str) -> float:
    if character < "\xa0":
        return 0.0 if character in "\t\n\v\f\r" or " " <= character <= "~" else float("-inf")
    if character in _COMMON:
        return _COMMON_WEIGHT
    stored = character.encode("gb2312", "ignore")
    row = stored[0] - 0xA0 if stored else 0
    if 16 <= row <= 87:
        return _LEVEL_1 if row <= 55 else _LEVEL_2
    return 0.0 if 1 <= row <= 3 else _OTHER


def _given(name: str) -> str:
    """A variable of the environment as the process got it, before Python changed it; empty where that is not known."""
    try:
        with open("/proc/self/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return ""
    found = next((v for v in variables if v.startswith(f"{name}=".encode())), b"")
    return found.partition(b"=")[2].decode("ascii", "replace")


def locale_encoding() -> str:
    """ "gb18030" where the user's locale says GBK, installed or not; else empty."""
    variables = [os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if variables[1].lower() in _COERCED:
        variables[1] = _given("LC_CTYPE")
    codeset = next(filter(None, variables), "").partition(".")[2].partition("@")[0]
    try:
        return "gb18030" if codecs.lookup(codeset).name in _GBK_FAMILY else ""
    except LookupError:
        return ""
