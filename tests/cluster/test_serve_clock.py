"""Serve's controller goes on looking after its replicas when the time of day is set back."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray._common.utils import Timer
from ray.serve._private import constants, deployment_state
from ray.serve._private.cluster_node_info_cache import ClusterNodeInfoCache
from ray.serve._private.utils import call_function_from_import_path

from cluster.serve_clock import CALLBACK, CALLBACK_VARIABLE


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the controller's process; undone at the end."""
    monkeypatch.setattr(deployment_state, "time", deployment_state.time)
    monkeypatch.setattr(Timer, "time", Timer.time)
    of_cache = ClusterNodeInfoCache.get_draining_nodes
    monkeypatch.setattr(ClusterNodeInfoCache, "get_draining_nodes", of_cache)
    call_function_from_import_path(CALLBACK)


def step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour, while five seconds pass."""
    day, monotonic = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: day() - 3600.0)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 5.0)


@pytest.mark.usefixtures("steady")
def test_a_replica_is_asked_again_after_a_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    replica: Any = SimpleNamespace(
        _health_check_ref=None,
        health_check_period_s=2.0,
        _last_health_check_time=deployment_state.time.time(),
    )
    is_due = deployment_state.ActorReplicaWrapper._should_start_new_health_check
    assert not is_due(replica)
    step_back(monkeypatch)
    assert is_due(replica)


@pytest.mark.usefixtures("steady")
def test_a_proxy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before_s = Timer().time()
    step_back(monkeypatch)
    assert 5.0 <= Timer().time() - before_s < 3600.0


@pytest.mark.usefixtures("steady")
def test_a_node_drains_for_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    step_back(monkeypatch)
    ends_ms = 1000 * (time.time() + 30.0)
    cache: Any = SimpleNamespace(_cached_draining_nodes={"a": ends_ms})
    left_s = ClusterNodeInfoCache.get_draining_nodes(cache)["a"] / 1000 - (
        deployment_state.time.time()
    )
    assert 29.0 < left_s <= 30.1


def test_serve_calls_what_the_variable_names() -> None:
    assert hasattr(constants, CALLBACK_VARIABLE)
