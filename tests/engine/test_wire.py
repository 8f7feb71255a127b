"""Frames: what goes in comes out, however the bytes are cut, and nothing else gets through."""

import random
import struct
from collections.abc import Iterator

import pytest

from engine.errors import ProtocolError
from engine.wire import FrameReader, Kind, pack_frame
from kvtransfer.greeting import GreetingKind

Frame = tuple[Kind, list[bytes]]


def read(reader: FrameReader, chunks: Iterator[bytes]) -> list[Frame]:
    frames = [frame for chunk in chunks for frame in reader.feed(chunk)]
    return [(kind, [bytes(buffer) for buffer in buffers]) for kind, buffers in frames]


def cut(stream: bytes, rng: random.Random) -> Iterator[bytes]:
    while stream:
        size = rng.choice([1, 3, 8, 100, 5000, 1_000_000])
        yield stream[:size]
        stream = stream[size:]


def random_frame(rng: random.Random) -> Frame:
    num_buffers = rng.choice([1, 2, 3, 300])
    sizes = [
        rng.choice([0, 1, 7, 100, 70_000 if num_buffers < 10 else 50]) for _ in range(num_buffers)
    ]
    return rng.choice(list(Kind)), [rng.randbytes(size) for size in sizes]


@pytest.mark.parametrize("seed", range(50))
def test_any_frames_survive_any_cut(seed: int) -> None:
    rng = random.Random(seed)
    frames = [random_frame(rng) for _ in range(rng.randrange(1, 6))]
    stream = b"".join(piece for frame in frames for piece in pack_frame(*frame))
    assert read(FrameReader(), cut(stream, rng)) == frames


def test_more_buffers_than_a_byte_counts_and_more_bytes_than_fit_in_32_bits() -> None:
    many = [b"%d" % number for number in range(70_000)]
    stream = b"".join(pack_frame(Kind.STEP, many))
    assert read(FrameReader(), iter([stream])) == [(Kind.STEP, many)]
    # Only announced: its bytes come in time.
    head = struct.pack(">BIQQ", Kind.ADD, 2, 2, 1 << 33)
    assert read(FrameReader(), iter([head, b"ab", b"c"])) == []


def test_large_buffers_are_not_copied() -> None:
    large = bytes(1 << 20)
    assert pack_frame(Kind.ADD, [b"message", large])[-1].obj is large


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(struct.pack(">BI", Kind.ADD, 0), id="no-buffers"),
        pytest.param(struct.pack(">BI", 0xEE, 1), id="unknown-kind"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(stream))


def test_what_fits_no_memory_is_refused() -> None:
    with pytest.raises(MemoryError):
        list(FrameReader().feed(struct.pack(">BIQ", Kind.ADD, 1, 1 << 62)))


def test_no_frame_is_taken_for_a_greeting() -> None:
    assert not {kind.value for kind in Kind} & {kind.value for kind in GreetingKind}
