"""Frames: what goes in comes out, however the bytes are cut, and nothing else gets through."""

import pytest

from engine.errors import ProtocolError
from engine.wire import MAX_FRAME_BYTES, MAX_GREETING_BYTES, FrameReader, Kind, pack_frame, prove

BUFFERS = [b"message", b"", b"array" * 1000]


@pytest.mark.parametrize("size", [1, 3, 7, 4096, 1_000_000])
def test_frames_survive_any_cut(size: int) -> None:
    stream = pack_frame(Kind.STEP, BUFFERS) + pack_frame(Kind.ABORT, [b"ids"])
    reader = FrameReader()
    reader.max_bytes = MAX_FRAME_BYTES
    frames = []
    for start in range(0, len(stream), size):
        frames += list(reader.feed(stream[start : start + size]))
    assert frames == [(Kind.STEP, BUFFERS), (Kind.ABORT, [b"ids"])]


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param((MAX_GREETING_BYTES + 1).to_bytes(4, "big"), id="too-long-before-greeting"),
        pytest.param((1).to_bytes(4, "big") + b"\x01", id="too-short"),
        pytest.param((2).to_bytes(4, "big") + b"\x01\x00", id="no-buffers"),
        pytest.param((2).to_bytes(4, "big") + b"\x01\x09", id="lengths-beyond-end"),
        pytest.param(
            (7).to_bytes(4, "big") + b"\x01\x01" + (9).to_bytes(4, "big") + b"x", id="length-lies"
        ),
        pytest.param(
            (7).to_bytes(4, "big") + b"\xee\x01" + (1).to_bytes(4, "big") + b"x", id="unknown-kind"
        ),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(stream))


def test_too_large_a_message_is_not_packed() -> None:
    with pytest.raises(ProtocolError):
        pack_frame(Kind.ADD, [bytes(MAX_FRAME_BYTES)])


def test_proof_depends_on_secret_and_nonce() -> None:
    proofs = {prove(secret, nonce) for secret in ("a", "b") for nonce in (b"1", b"2")}
    assert len(proofs) == 4
