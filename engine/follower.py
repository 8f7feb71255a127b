"""The part of an engine that is on another node than its replica: an actor of Ray's.

Owns its node's share of the engine's ranks. A light shell, as `engine.deployment` is: vLLM is
imported where the actor runs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from engine.exit_cause import EngineExit
from kvtransfer.tls import TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of an engine, what one of its nodes runs."""

    application: str
    """Whose secret its members know."""
    model: str
    """As configured: each node has its own copy."""
    options: Mapping[str, Any]
    """vLLM engine arguments on this node."""
    tls: TlsFiles | None


class Follower:
    """One node's. It ends with `run`, with its owner (the replica), or when it is killed."""

    def address(self) -> str:
        """This node's, in the cluster."""
        host: str = ray.util.get_node_ip_address()
        return host

    def run(self, share: Share) -> EngineExit:
        """Runs the share until one of its ranks ends, and says how it did."""
        from engine.arguments import engine_args
        from engine.guardian import start_guardian
        from engine.meeting import RANK_ENV
        from engine.models import resolve_model
        from engine.node_address import keep_to_address
        from engine.ranks import run_ranks
        from engine.secret import application_secret
        from kvtransfer.credentials import Credentials

        start_guardian()
        host = self.address()
        keep_to_address(host)
        os.environ.update(RANK_ENV)
        credentials = Credentials(secret=application_secret(share.application), tls=share.tls)
        args = engine_args(resolve_model(share.model), share.options)
        how = run_ranks(args, credentials)
        return replace(how, text=f"on node {host}, {how.text}")
