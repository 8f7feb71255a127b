"""What a router needs to know. Light: Serve imports it to build the application."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.tls import TlsFiles
from router.admit import AdmissionLimits
from router.recovery import RecoveryLimits
from router.sandbox.limits import TaskLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one HTTP request may be, and all together."""

    max_body_bytes: int = 8 * 1024 * 1024
    max_bodies_bytes: int = 1024**3
    """Of all requests that a router has."""
    max_choices: int = 1024
    """Prompts times `n`."""
    max_prompt_logprobs: int = 100_000
    """Log probabilities of prompts' tokens."""
    receive_timeout_s: float = 120.0
    """For its body to arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendSettings:
    """The OpenAI endpoint."""

    model: str
    served_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """vLLM engine arguments: those of the decode pool."""
    frontend: Mapping[str, Any] = field(default_factory=dict)
    """vLLM front-end arguments, such as a tool call parser."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """Of one HTTP request."""
    client_priority: tuple[int, int] = (-10, 10)
    """The least and the most that a client may ask for."""
    sandbox: TaskLimits = field(default_factory=TaskLimits)
    """What a client's grammar, schema or template may cost before an engine sees it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What requests are routed for."""

    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    local_prefill: bool = False
    """Decode may read prompts itself where that is predicted to be better."""
    queue_timeout_s: float | None = None
    """How long a request may wait for its first token; None for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """One router."""

    frontend: FrontendSettings
    policy: str
    num_routers: int
    """Of this application."""
    targets: Targets
    recovery: RecoveryLimits
    drain_s: float
    """How long it may take to finish its answers when its process is told to end."""
    tls: TlsFiles | None = None
    """Of the connections to replicas; None where they are not encrypted."""
