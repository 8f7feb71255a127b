"""A router's `/health`, as `pdserve up` reads it."""

import pytest

from cluster.health import Health, read_health

END = (
    b'{"last_engine_end": {"message": "decode replica d: gone", "at_s": 12.5}, "last_fault":'
    b' {"fault": "engine_ended", "message": "decode replica d: engine ended: gone", "at_s": 12.5}}'
)
LOST = b'{"last_fault": {"fault": "connection_lost", "message": "prefill replica p", "at_s": 3.5}}'


@pytest.mark.parametrize(
    ("status", "body", "health"),
    [
        pytest.param(200, b'{"status": "ok"}', Health(is_open=True), id="whole"),
        pytest.param(503, b"{}", Health(), id="not-yet"),
        pytest.param(
            503, END, Health(last_engine_end="decode replica d: gone", ended_at_s=12.5), id="ended"
        ),
        pytest.param(
            200,
            LOST,
            Health(is_open=True, last_fault="prefill replica p", fault_at_s=3.5),
            id="lost",
        ),
        pytest.param(500, b"<html>", Health(), id="a-proxy-answers"),
        pytest.param(200, b"", Health(is_open=True), id="nothing-said"),
    ],
)
def test_read_health(status: int, body: bytes, health: Health) -> None:
    assert read_health(status, body) == health
