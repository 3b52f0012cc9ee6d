# SPDX-License-Identifier: Apache-2.0
"""tokenizer.model of a stranger: the sentencepiece that we ask for refuses what earlier ones crash on."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cnllama.convert.tokenizers import TokenizerFiles

from cnllama.errors import InputError
from cnllama.tokenizer import Tokenizer

pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf to make the models")

ROOT = Path(__file__).resolve().parent.parent
# Opens each model as the converter and the run time do, and uses it; a crash ends the process before the last line.
CHILD = """
import json, sys
from pathlib import Path
from cnllama.convert.tokenizers import TokenizerFiles
from cnllama.errors import InputError

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        files = TokenizerFiles(path, path.read_bytes())
        ids = list(range(min(files.pieces, 400)))
        files.processor.id_to_piece(ids)
        for text in ("", "a", "人工智能是", "Hello  world", "ﬁ①Ⅷ", "春" * 200, "<s>"):
            files.processor.decode(files.processor.encode(text))
        files.processor.decode(ids)
        found[path.name] = "used"
    except InputError as error:
        found[path.name] = "refused"
        assert str(path) in str(error)
print(json.dumps(found))
"""


def changed(model: bytes, change: Callable[[Any], None]) -> bytes:
    message = pb.ModelProto()
    message.ParseFromString(model)
    change(message)
    return bytes(message.SerializePartialToString())


def with_charsmap(data: bytes) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.normalizer_spec.precompiled_charsmap = data

    return change


def hostile(model: bytes) -> dict[str, bytes]:
    """Models by name; those that begin with "charsmap" ended a process with 0.2.0 or 0.2.1."""
    chosen = random.Random(3)

    def each(**values: Any) -> Callable[[Any], None]:
        def change(message: Any) -> None:
            for piece in message.pieces:
                for name, value in values.items():
                    setattr(piece, name, value)

        return change

    def long_piece(message: Any) -> None:
        message.pieces[300].piece = "长" * 400_000

    def twice(message: Any) -> None:
        message.pieces.add().CopyFrom(message.pieces[10])

    models = {
        "sound": model,
        "no pieces": changed(model, lambda m: m.ClearField("pieces")),
        "unk negative": changed(model, lambda m: setattr(m.trainer_spec, "unk_id", -1)),
        "vocabulary negative": changed(model, lambda m: setattr(m.trainer_spec, "vocab_size", -5)),
        "empty pieces": changed(model, each(piece="")),
        "all unused": changed(model, each(type=5)),
        "all bytes": changed(model, each(type=6)),
        "not a number": changed(model, each(score=float("nan"))),
        "long piece": changed(model, long_piece),
        "twice": changed(model, twice),
        "length without end": b"\x0a\xff\xff\xff\xff\x7f",
    }
    for size in (0, 4, 5, 1024, 4096):
        trie = chosen.randbytes(size)
        models[f"charsmap random {size}"] = changed(model, with_charsmap(struct.pack("<I", size) + trie + b"\0"))
    models["charsmap ff"] = changed(model, with_charsmap(struct.pack("<I", 4096) + b"\xff" * 4096 + b"abc"))
    models["charsmap size"] = changed(model, with_charsmap(struct.pack("<I", 0xFFFFFFF0) + b"abcd" * 10))
    for part in (0.1, 0.5, 0.999):
        models[f"cut {part}"] = model[: int(len(model) * part)]
    for number in range(20):
        data = bytearray(model)
        for _ in range(1 + number):
            data[chosen.randrange(len(data))] = chosen.randrange(256)
        models[f"bytes changed {number}"] = bytes(data)
    return models


def test_hostile_models_are_refused_or_used_and_never_crash(tmp_path: Path, tokenizer_model: bytes) -> None:
    models = hostile(tokenizer_model)
    for name, data in models.items():
        (tmp_path / name).write_bytes(data)
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-500:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == set(models)
    assert found["sound"] == "used"
    assert found["charsmap random 1024"] == "refused"


def useless(model: bytes) -> dict[str, bytes]:
    """Models that the library opens and fails at later: with IndexError, UnicodeDecodeError or RuntimeError."""

    def without_unknown(message: Any) -> None:
        for piece in message.pieces:
            if piece.type == piece.Type.UNKNOWN:
                piece.type = piece.Type.UNUSED

    begin = model.index(b"\x0a\x03\xe2\x96\x81")  # the piece of a space
    more = changed(model, lambda m: m.pieces.add(piece="人", score=-99.0))
    end = more.rindex("人".encode())
    return {
        "empty": b"",
        "no unknown piece": changed(model, without_unknown),
        "first piece no UTF-8": model[:begin] + b"\x0a\x03\xff\xfe\xfd" + model[begin + 5 :],
        "last piece no UTF-8": more[:end] + b"\xed\xa0\x80" + more[end + 3 :],
    }


@pytest.mark.parametrize("name", ["empty", "no unknown piece", "first piece no UTF-8", "last piece no UTF-8"])
def test_a_model_that_no_text_can_be_cut_with_is_refused_by_its_file(name: str, tokenizer_model: bytes) -> None:
    model = useless(tokenizer_model)[name]
    with pytest.raises(InputError, match=r"^x\.model: this is no SentencePiece model "):
        _ = TokenizerFiles(Path("x.model"), model).processor
    for settings in ({}, {"add_dummy_prefix": True}):
        with pytest.raises(InputError, match=r"^x\.cnl: the tokenizer is no SentencePiece model "):
            Tokenizer(model, settings, "x.cnl")


def test_the_floor_is_the_first_version_that_refuses_them() -> None:
    """Of 0.2.0, 0.2.1 and 0.2.2, tried on 4,000 changed models each, 148, 27 and none ended the process."""
    (floor,) = re.findall(r'"sentencepiece>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, floor.split("."))) >= (0, 2, 2)
