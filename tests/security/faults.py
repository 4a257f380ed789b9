"""Faults for valid input: other values in plain data, other bytes, special files."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any


def listed(text: str, between: str | None = None) -> list[str]:
    """Short texts in few lines."""
    return text.split(between)


NUMBERS: list[Any] = [
    *(0, -1, 1, 3, 0.5, True, False, None, 2**31, 2**63, 2**64, -(2**63), 10**400, -(10**400)),
    *(1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
]
TEXTS = [
    *("", " ", "\0", "\n", "\x1b[31m", "\u202e", "\udcff", "é", "\U0001f600", "a" * 100_000, "9" * 5000),
    *listed("nan 1e999 ../../canary /etc/passwd ~ /dev/zero nowhere 0x1f null on - --help a.b x=1 $(canary) %s%n [ {"),
    *("{{ 7 * 7 }}", "builtin:tiny-lm", "model_registry://a", "<|im_end|>", "a@1"),
]
STRUCTURES: list[Any] = [
    *([], {}, [[]], {"": {}}, [None], ["a"] * 5000, "@deep@", "@digits@", {"trust_remote_code": True}),
    {"auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"]}},
]
"""@deep@ and @digits@ stand for what cannot be said in Python: `as_json` writes it."""


def odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice([*NUMBERS, *TEXTS, *STRUCTURES]))


def as_json(value: Any) -> bytes:
    text = json.dumps(value)
    return text.replace('"@deep@"', "[" * 100_000 + "]" * 100_000).replace('"@digits@"', "9" * 5000).encode()


def spoilt(rng: random.Random, value: Any) -> Any:
    """Plain data of which one part is removed, doubled or another."""
    if not (isinstance(value, dict | list) and value) or rng.random() < 0.1:
        return odd(rng)
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            del value[place]
        case 1 if isinstance(value, dict):
            value[rng.choice(TEXTS)] = value[place]
        case 1:
            value += [value[place]] * rng.choice((1, 100))
        case _:
            value[place] = spoilt(rng, value[place])
    return value


def damaged(rng: random.Random, data: bytes, first: int = 1 << 30) -> bytes:
    """Bytes with a few faults among the first ones: changed, cut out, cut off, repeated, put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(len(found), first) + 1)
        end = at + rng.choice((1, 2, 8, 100))
        match rng.randrange(6):
            case 0:
                found[at:end] = rng.randbytes(end - at)
            case 1:
                del found[at:end]
            case 2:
                del found[at:]
            case 3:
                found[at:at] = bytes(found[at:end]) * rng.choice((1, 1000))
            case 4:
                found[at:at] = str(odd(rng)).encode("utf-8", "surrogateescape")
            case 5:
                found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    return bytes(found)


def special(rng: random.Random, path: Path) -> None:
    """Something that is not a plain file of a sensible size."""
    path.unlink(missing_ok=True)
    match rng.randrange(4):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "nowhere", path.name, "..", "/proc/self/environ")))
        case 3:
            path.touch()
            os.truncate(path, 1 << 40)


def put(rng: random.Random, path: Path, data: bytes, faults: float = 0.3) -> None:
    path.write_bytes(damaged(rng, data) if rng.random() < faults else data)
    if rng.random() < 0.03:
        special(rng, path)


def spoil_file(rng: random.Random, path: Path) -> None:
    """Faults that fit the kind of file: other values in JSON, lies in the header of safetensors."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        data = as_json(spoilt(rng, json.loads(data)))
    elif path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", data[:8])
        header = as_json(spoilt(rng, json.loads(data[8 : 8 + size])))
        data = struct.pack("<Q", rng.choice((len(header), len(header), size, 2**63))) + header + data[8 + size :]
    put(rng, path, data)
