"""What a router reports for scaling, typed; and as Serve carries it, which is numbers by name.

Both ways stand here and nowhere else: a router makes the report (`router.traffic`), Serve's
controller reads it (`cluster.reports`). Pure.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from router.costs import DecodeCost

Stats = dict[str, float]
"""As a replica's `record_autoscaling_stats` returns it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficCounts:
    """Counts that only go up, or how much they did in some time."""

    arrivals: int = 0
    arrived_prefill_s: float = 0.0
    """Predicted engine seconds of their prompts, cached prefixes taken off; none of those that
    decode reads by choice."""
    arrived_prefill_squared_s2: float = 0.0
    prompt_tokens: int = 0
    ended: int = 0
    output_tokens: int = 0
    ttft_measured: int = 0
    ttft_met: int = 0
    itl_measured: int = 0
    """Of requests with two tokens at least: their mean inter-token latency."""
    itl_met: int = 0

    def __add__(self, other: "TrafficCounts") -> "TrafficCounts":
        return TrafficCounts(**{name: getattr(self, name) + getattr(other, name) for name in NAMES})

    def since(self, before: "TrafficCounts") -> "TrafficCounts":
        """What came since an earlier look; nothing of what was counted anew."""
        return TrafficCounts(
            **{name: max(0, getattr(self, name) - getattr(before, name)) for name in NAMES}
        )


NAMES = tuple(field.name for field in fields(TrafficCounts))


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """Replicas of one pool that a router is connected to."""

    num_ready: int
    """It may send requests to them."""
    num_draining: int
    """They finish what they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingReport:
    """One look at one router."""

    counts: TrafficCounts
    """Since the router started."""
    prefill_backlog_s: float
    """Predicted engine seconds of the prompts that have no token yet."""
    num_decoding: int
    """Requests that are not with prefill."""
    kv_usage_fraction: float
    """Mean over decode replicas."""
    num_kv_tokens: int | None
    """Of the largest decode engine; None before the first one has joined."""
    max_batch: int | None
    """Requests that it runs at once at most; None as above."""
    decode_cost: DecodeCost
    prefill: PoolSize
    decode: PoolSize

    def to_stats(self) -> Stats:
        """As numbers by name; what is None is 0."""
        stats: Mapping[str, float] = {
            "prefill_backlog_s": self.prefill_backlog_s,
            "num_decoding": self.num_decoding,
            "kv_usage_fraction": self.kv_usage_fraction,
            "num_kv_tokens": self.num_kv_tokens or 0,
            "max_batch": self.max_batch or 0,
            "decode_base_s": self.decode_cost.base_s,
            "decode_per_request_s": self.decode_cost.per_request_s,
            "decode_per_context_token_s": self.decode_cost.per_context_token_s,
            "prefill_ready": self.prefill.num_ready,
            "prefill_draining": self.prefill.num_draining,
            "decode_ready": self.decode.num_ready,
            "decode_draining": self.decode.num_draining,
            **asdict(self.counts),
        }
        return {name: float(value) for name, value in stats.items()}

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> "ScalingReport | None":
        """The report that `to_stats` has made such numbers of.

        None where there are only others, as of a router that is about to start.
        """
        if "arrivals" not in stats:
            return None

        def count(name: str) -> int:
            return round(stats.get(name, 0.0))

        return cls(
            counts=TrafficCounts(
                arrivals=count("arrivals"),
                arrived_prefill_s=stats.get("arrived_prefill_s", 0.0),
                arrived_prefill_squared_s2=stats.get("arrived_prefill_squared_s2", 0.0),
                prompt_tokens=count("prompt_tokens"),
                ended=count("ended"),
                output_tokens=count("output_tokens"),
                ttft_measured=count("ttft_measured"),
                ttft_met=count("ttft_met"),
                itl_measured=count("itl_measured"),
                itl_met=count("itl_met"),
            ),
            prefill_backlog_s=stats["prefill_backlog_s"],
            num_decoding=round(stats["num_decoding"]),
            kv_usage_fraction=stats["kv_usage_fraction"],
            num_kv_tokens=count("num_kv_tokens") or None,
            max_batch=count("max_batch") or None,
            decode_cost=DecodeCost(
                base_s=stats["decode_base_s"],
                per_request_s=stats["decode_per_request_s"],
                per_context_token_s=stats["decode_per_context_token_s"],
            ),
            prefill=PoolSize(
                num_ready=count("prefill_ready"), num_draining=count("prefill_draining")
            ),
            decode=PoolSize(num_ready=count("decode_ready"), num_draining=count("decode_draining")),
        )
