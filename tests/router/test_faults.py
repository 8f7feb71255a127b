"""Which fault a replica has, by what is known of it."""

from typing import Any

import pytest

from engine.exit_cause import EngineExit
from router.faults import Fault, fault_of

KILLED = EngineExit(cause="SIGKILL", text="the engine was ended by SIGKILL")
NOTHING_KNOWN: dict[str, Any] = {
    "engine_exit": None,
    "is_node_dead": False,
    "is_silent": False,
    "leaves_because": "",
    "is_unlisted": False,
    "closed_because": None,
}


@pytest.mark.parametrize(
    ("known", "fault"),
    [
        pytest.param({}, None, id="alive"),
        pytest.param({"leaves_because": "drained"}, None, id="drains"),
        pytest.param({"is_unlisted": True}, None, id="unlisted"),
        pytest.param({"closed_because": "cut"}, Fault.CONNECTION_LOST, id="lost"),
        pytest.param(
            {"closed_because": "cut", "leaves_because": "drained"}, None, id="has-drained"
        ),
        pytest.param({"closed_because": "cut", "is_unlisted": True}, None, id="stopped-by-serve"),
        pytest.param(
            {"closed_because": "cut", "is_silent": True}, Fault.REPLICA_SILENT, id="silent"
        ),
        pytest.param(
            {"is_silent": True, "leaves_because": "drained"},
            Fault.REPLICA_SILENT,
            id="silent-while-it-drained",
        ),
        pytest.param({"is_node_dead": True}, Fault.NODE_GONE, id="node-gone"),
        pytest.param(
            {"is_node_dead": True, "is_silent": True, "is_unlisted": True},
            Fault.NODE_GONE,
            id="ray-explains-the-silence",
        ),
        pytest.param({"leaves_because": "stalled"}, Fault.ENGINE_STALLED, id="stalled"),
        pytest.param(
            {"leaves_because": "stalled", "closed_because": "unhealthy", "is_unlisted": True},
            Fault.ENGINE_STALLED,
            id="stalled-and-closed",
        ),
        pytest.param({"engine_exit": KILLED}, Fault.ENGINE_ENDED, id="ended"),
        pytest.param(
            {"engine_exit": KILLED, "is_node_dead": True, "leaves_because": "stalled"},
            Fault.ENGINE_ENDED,
            id="its-own-word-goes-first",
        ),
    ],
)
def test_a_fault_is_named(known: dict[str, Any], fault: Fault | None) -> None:
    assert fault_of(**{**NOTHING_KNOWN, **known}) is fault
