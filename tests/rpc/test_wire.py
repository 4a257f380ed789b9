from __future__ import annotations

import random
import struct
import tracemalloc

import msgspec
import pytest

from harmony_core import errors
from harmony_core.errors import ConfigError, HarmonyError, RankError, SampleTooLong
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc import protocol, wire
from harmony_core.rpc.methods import METHODS
from harmony_core.rpc.protocol import Beat, Dealloc, Generated, Hello, Nothing, Score, Spawn
from harmony_core.rpc.wire import Failure, Frame, FrameDecoder, WireError, encode, error_of, failure_of

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=4, tied=True, max_positions=16, stored_dtype="float32", num_parameters=1,
    attention_bias=False, qk_norm=False, window=4, windowed_layers=1,
)  # fmt: skip


def decode(data: bytes) -> list[Frame]:
    return list(FrameDecoder().feed(data))


SAMPLES = [
    encode("call", Dealloc(model="policy"), id=7, seq=3),
    encode("ok", Nothing(), id=7, method="Dealloc"),
    encode("call", Score(model="m", replica=0, tokens=b"\x01" * 400, targets=b"\x02" * 400), id=8),
    encode("event", Beat(phase="idle", seconds=1.5, step=3)),
    encode("err", failure_of(SampleTooLong("12 > 8", hint="cut", tokens=12, limit=8), 1), id=9),
    encode("cast", protocol.Cancel(call=7)),
]


def test_a_frame_survives_in_whatever_pieces_it_arrives():
    decoder, frames = FrameDecoder(), []
    for byte in b"".join(SAMPLES):
        frames += decoder.feed(bytes([byte]))
    assert [(f.header.kind, f.header.method, f.header.id, f.header.seq) for f in frames] == [
        ("call", "Dealloc", 7, 3),
        ("ok", "Dealloc", 7, None),
        ("call", "Score", 8, None),
        ("event", "Beat", 0, None),
        ("err", "Failure", 9, None),
        ("cast", "Cancel", 0, None),
    ]
    assert frames[2].body == Score(model="m", replica=0, tokens=b"\x01" * 400, targets=b"\x02" * 400)
    assert decode(b"".join(SAMPLES)) == frames


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_and_its_answer_have_a_decoder(name: str):
    request, answer = METHODS[name]
    assert wire._decoders["call", name].type is request
    assert wire._decoders["ok", name].type is answer


@pytest.mark.parametrize("lengths", [(1 << 31, 10), (10, 1 << 63), (10, (1 << 30) + 1), (5000, 10)])
def test_announced_lengths_are_refused_before_anything_is_stored(lengths: tuple[int, int]):
    with pytest.raises(WireError, match="announces"):
        decode(struct.pack("<IQ", *lengths) + b"x" * 16)


def test_memory_grows_with_what_arrived_not_with_what_is_announced():
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        assert list(decoder.feed(struct.pack("<IQ", 100, (1 << 30) - 1) + b"x" * 1000)) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_before_hello_a_frame_is_small():
    data = encode(
        "event", Hello(token="x" * 70_000, protocol=1, version="", rank=0, world_size=1, pid=1, device="", torch="")
    )
    with pytest.raises(WireError):
        list(FrameDecoder(wire.MAX_HELLO_BYTES).feed(data))


def header(**changes: object) -> bytes:
    return msgspec.msgpack.encode({"v": 1, "id": 1, "kind": "call", "method": "Dealloc"} | changes)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (header(method="__import__"), {"model": "m"}),
        (header(kind="exec"), {"model": "m"}),
        (header(v=2), {"model": "m"}),
        (header(extra=1), {"model": "m"}),
        (header(id="1"), {"model": "m"}),
        (header(), {"model": "m", "more": 1}),
        (header(), {"model": 5}),
        (header(), {}),
        (header(), ["m"]),
        (header(kind="event"), {"model": "m"}),
        (header(kind="event", method="Dealloc"), {"model": "m"}),
        (header(method="Hello"), {"model": "m"}),
        (b"\xc1", {"model": "m"}),
        (b"\x91" * 3000, {}),
    ],
)
def test_what_is_not_in_the_table_is_refused(head: bytes, body: object):
    encoded = msgspec.msgpack.encode(body)
    with pytest.raises(WireError):
        decode(struct.pack("<IQ", len(head), len(encoded)) + head + encoded)


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randint(1, 8)]
                data = data or bytearray(b"\0")
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                data[12:12] = rng.choice([b"\x91", b"\x81", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]) * 20
    return bytes(data)


def test_ten_thousand_mutated_frames_are_frames_or_wire_errors():
    rng, refused, taken = random.Random(7), 0, 0
    tracemalloc.start()
    try:
        for _ in range(10_000):
            data = mutate(rng.choice(SAMPLES), rng) if rng.random() < 0.9 else rng.randbytes(rng.randint(1, 200))
            try:
                for frame in decode(data):
                    taken += 1
                    if isinstance(frame.body, Failure):
                        assert isinstance(error_of(frame.body), HarmonyError)
            except WireError:
                refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused > 3000 and taken > 150
    assert peak < 8 << 20
    assert len(decode(SAMPLES[0])) == 1


@pytest.mark.parametrize("name", sorted(errors.all_errors()))
def test_every_error_of_the_tree_crosses(name: str):
    error = errors.all_errors()[name]("what", hint="way out", limit=3, names=["a"])
    back = error_of(failure_of(error, 0))
    assert type(back) is type(error)
    assert (back.message, back.hint, back.details, str(back)) == (error.message, error.hint, error.details, str(error))


def test_a_config_error_keeps_its_issues():
    back = error_of(failure_of(ConfigError("two", issues=["a", "b"]), 0))
    assert isinstance(back, ConfigError) and back.issues == ["a", "b"]


def test_an_unknown_class_becomes_a_rank_error():
    back = error_of(Failure(type="Evil", message="m", hint="", details={}))
    assert type(back) is RankError and "Evil" in back.message
    assert type(error_of(Failure(type="RankDied", message="m", hint="", details={"message": 1}))) is RankError


def test_an_exception_of_python_carries_rank_type_and_traceback():
    try:
        raise KeyError("k\udc80")
    except KeyError as error:
        failure = failure_of(error, 3)
    back = error_of(decode(encode("err", failure, id=1))[0].body)  # type: ignore[arg-type]
    assert type(back) is RankError
    assert back.details["rank"] == 3 and back.details["type"] == "KeyError"
    assert "test_wire.py" in back.details["traceback"]


def test_details_that_msgpack_cannot_carry_cross_as_text():
    error = SampleTooLong("m", big=1 << 80, thing=object, odd={1}, text="\udc80", nested={"x": [1, (2,)]})
    back = error_of(decode(encode("err", failure_of(error, 0), id=1))[0].body)  # type: ignore[arg-type]
    assert back.details["nested"] == {"x": [1, [2]]}
    assert "1208925819614629174706176" in back.details["big"] and "object" in back.details["thing"]


def test_large_bodies_pass_unchanged():
    body = Generated(
        tokens=bytes(4 << 20), logprobs=b"", sampled_logprobs=b"", versions=b"", finish_reason="stop",
        seconds_to_first=0.1, seconds=1.0,
    )  # fmt: skip
    assert decode(encode("ok", body, id=1, method="Generate"))[0].body == body


def test_spawn_crosses_with_its_nested_parts():
    source, lora = protocol.ModelSource(weights="/m", digest="d"), protocol.LoraSettings(rank=4)
    spawn = Spawn(name="p", tp=2, train=True, max_batch_tokens=8, kv_tokens=8, spec=SPEC, source=source, lora=lora)
    assert decode(encode("call", spawn, id=1, seq=0))[0].body == spawn
