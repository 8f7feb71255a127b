"""Serve's port of a replica is open at one address, and not at every one of the host."""

import inspect

import pytest
import ray
from ray.serve._private import replica

from engine.errors import EngineInternalsChanged
from engine.serve_port import ADDS_PORT, EVERYWHERE, keep_to_cluster_address


@pytest.mark.parametrize(
    ("node", "asked", "bound"),
    [
        ("10.0.0.5", EVERYWHERE, "10.0.0.5:0"),
        ("fd00::5", EVERYWHERE, "[fd00::5]:0"),
        ("10.0.0.5", "127.0.0.1:7000", "127.0.0.1:7000"),
    ],
)
def test_where_it_is_bound(
    monkeypatch: pytest.MonkeyPatch, node: str, asked: str, bound: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(replica, ADDS_PORT, lambda server, address: calls.append(address))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    keep_to_cluster_address()
    getattr(replica, ADDS_PORT)(None, asked)
    assert calls == [bound]


def test_a_serve_that_opens_it_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(replica, ADDS_PORT)
    with pytest.raises(EngineInternalsChanged, match=ADDS_PORT):
        keep_to_cluster_address()


def test_this_serve_opens_it_as_we_think() -> None:
    source = inspect.getsource(replica)
    assert f'{ADDS_PORT}(self._server, "{EVERYWHERE}")' in source
