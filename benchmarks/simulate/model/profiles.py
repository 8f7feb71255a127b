"""What an engine on some hardware takes for an iteration, and how much KV it holds.

Owns the numbers and where they come from. Prefill of a chunk that brings a prompt from p to n
computed tokens costs `per_token_s`·(n - p) + `per_token_squared_s`·(n² - p²); an iteration adds one
`base_s` and the overheads. A decode step costs `base_s` + `per_request_s`·batch +
`per_context_token_s`·(tokens in all contexts).
"""

from dataclasses import dataclass, replace

from router.costs import DecodeCost, PrefillCost

OVERHEAD_S = 2e-3
OVERHEAD_PER_TOKEN_S = 1e-7
PREFILL_OVERHEAD_S = 1e-3
"""DistServe's simulator adds these to its fitted times, for what surrounds the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRegime:
    """Coefficients that hold from a batch size on: kernels change with the batch."""

    from_batch: int
    cost: DecodeCost


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One engine of one model on one or more GPUs."""

    name: str
    source: str
    gpus: int
    prefill: PrefillCost
    decode: tuple[DecodeRegime, ...]
    """By `from_batch`, the first from 0."""
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    max_batched_tokens: int = 8192
    """Of one iteration's prefill."""
    max_num_seqs: int = 256
    chunks_prefill: bool = True
    """Prompts share iterations with running answers, in chunks. Otherwise, as in vLLM of 2023,
    waiting prompts go first and whole, and running answers stand still meanwhile."""
    max_paddings: int | None = None
    """vLLM before 0.3 computed a batch of whole prompts as if all were as long as its longest, and
    put no more than this many tokens of padding into it. None: no padding."""
    overhead_s: float = OVERHEAD_S
    overhead_per_token_s: float = OVERHEAD_PER_TOKEN_S
    prefill_overhead_s: float = PREFILL_OVERHEAD_S
    start_s: float = 40.0
    """From the decision to the first request it can take."""
    link_bytes_per_s: float = 50e9
    link_latency_s: float = 2e-3

    def decode_cost(self, batch: int) -> DecodeCost:
        chosen = self.decode[0].cost
        for regime in self.decode[1:]:
            if batch >= regime.from_batch:
                chosen = regime.cost
        return chosen

    def idle_ttft_s(self, num_tokens: int) -> float:
        """What an idle engine takes to the first token of a prompt, in chunks where it has to."""
        num_chunks = -(-num_tokens // self.max_batched_tokens) if self.chunks_prefill else 1
        fixed_s = self.overhead_s + self.prefill_overhead_s + self.prefill.base_s
        per_token_s = self.overhead_per_token_s + self.prefill.per_token_s
        squared_s = self.prefill.per_token_squared_s * num_tokens**2
        return max(num_chunks, 1) * fixed_s + per_token_s * num_tokens + squared_s

    def step_s(self, batch: int, num_context_tokens: float) -> float:
        """One decode step, overhead included."""
        cost = self.decode_cost(batch)
        return (
            self.overhead_s
            + cost.base_s
            + (cost.per_request_s + self.overhead_per_token_s) * batch
            + cost.per_context_token_s * num_context_tokens
        )

    def transfer_s(self, num_tokens: int) -> float:
        """A prompt's KV over an idle link."""
        return self.link_latency_s + num_tokens * self.kv_bytes_per_token / self.link_bytes_per_s


# DistServe (OSDI 24) publishes its profiles under Apache-2.0, fitted on A100-80G with OPT. Batches
# and memory are limited as in its measurements' scripts.
_OPT_13B_KV_BYTES = 40 * 2 * 5120 * 2
_OPT_13B_WEIGHT_BYTES = 26e9
_A100_BYTES = 85.0e9
_A100_MEMORY_FRACTION = 0.95


def _opt_13b_kv_tokens(gpus: int) -> int:
    free_bytes = _A100_MEMORY_FRACTION * _A100_BYTES * gpus - _OPT_13B_WEIGHT_BYTES
    return int(free_bytes / _OPT_13B_KV_BYTES)


def _decode_ms(
    first: tuple[float, float, float], from_95: tuple[float, float, float]
) -> tuple[DecodeRegime, ...]:
    return tuple(
        DecodeRegime(
            from_batch=from_batch,
            cost=DecodeCost(
                base_s=base * 1e-3,
                per_context_token_s=per_context * 1e-3,
                per_request_s=per_request * 1e-3,
            ),
        )
        for from_batch, (base, per_context, per_request) in ((0, first), (95, from_95))
    )


def _prefill_ms(base: float, per_token: float, squared: float) -> PrefillCost:
    return PrefillCost(
        base_s=base * 1e-3, per_token_s=per_token * 1e-3, per_token_squared_s=squared * 1e-3
    )


OPT_13B_VLLM = EngineProfile(
    name="opt-13b-a100-vllm",
    source="DistServe's profile of vLLM, OPT-13B, TP1, A100-80G",
    gpus=1,
    prefill=_prefill_ms(22.05, 0.14051, 8.08e-6),
    decode=_decode_ms((23.48, 5.93e-4, 0.0607), (20.21, 4.91e-4, 0.1200)),
    kv_capacity_tokens=_opt_13b_kv_tokens(1),
    kv_bytes_per_token=_OPT_13B_KV_BYTES,
    max_batched_tokens=16_384,
    max_num_seqs=1024,
    chunks_prefill=False,
    max_paddings=256,
)
OPT_13B_DISTSERVE_PREFILL = EngineProfile(
    name="opt-13b-a100-distserve-prefill",
    source="DistServe's profile of its own engine, OPT-13B, TP2, A100-80G",
    gpus=2,
    prefill=_prefill_ms(14.74, 0.06858, 2.45e-6),
    decode=_decode_ms((19.93, 6.27e-4, 0.0385), (7.17, 5.80e-4, 0.1583)),
    kv_capacity_tokens=_opt_13b_kv_tokens(2),
    kv_bytes_per_token=_OPT_13B_KV_BYTES,
    max_batched_tokens=8192,
    max_num_seqs=128,
    chunks_prefill=False,
    link_bytes_per_s=300e9,
)
OPT_13B_DISTSERVE_DECODE = replace(
    OPT_13B_DISTSERVE_PREFILL,
    name="opt-13b-a100-distserve-decode",
    source="DistServe's profile of its own engine, OPT-13B, TP1, A100-80G",
    gpus=1,
    kv_capacity_tokens=_opt_13b_kv_tokens(1),
    max_num_seqs=1024,
)

# Efficiencies reached in print: prefill 56-66 % of peak FLOP/s, decode 53-64 % of bandwidth.
_PREFILL_EFFICIENCY = 0.61
_DECODE_EFFICIENCY = 0.58
_MEMORY_FRACTION = 0.9
_H100_FLOPS = 989.4e12
_H100_BYTES_PER_S = 3.35e12
_H100_BYTES = 80e9


def h100_roofline(
    *,
    name: str,
    num_parameters: float,
    num_layers: int,
    query_width: int,
    kv_bytes_per_token: int,
    gpus: int,
    start_s: float,
) -> EngineProfile:
    """A dense bf16 model on `gpus` H100 SXM by its limits times the efficiencies in print.

    Prefill: 2·parameters·n + 2·layers·query width·n² FLOP. Decode: weights and contexts read once
    a step, and each request's FLOP added (a sum where a roofline has a maximum, so that steps stay
    linear in the batch; below 200 requests the added part is under 15 %).
    """
    flops_per_s = gpus * _H100_FLOPS * _PREFILL_EFFICIENCY
    bytes_per_s = gpus * _H100_BYTES_PER_S * _DECODE_EFFICIENCY
    weight_bytes = 2 * num_parameters
    free_bytes = _MEMORY_FRACTION * gpus * _H100_BYTES - weight_bytes
    return EngineProfile(
        name=name,
        source=f"roofline, {gpus} x H100 SXM, prefill {_PREFILL_EFFICIENCY:.0%} of peak FLOP/s,"
        f" decode {_DECODE_EFFICIENCY:.0%} of bandwidth",
        gpus=gpus,
        prefill=PrefillCost(
            base_s=2e-3,
            per_token_s=2 * num_parameters / flops_per_s,
            per_token_squared_s=2 * num_layers * query_width / flops_per_s,
        ),
        decode=(
            DecodeRegime(
                from_batch=0,
                cost=DecodeCost(
                    base_s=weight_bytes / bytes_per_s,
                    per_request_s=2 * num_parameters / flops_per_s,
                    per_context_token_s=kv_bytes_per_token / bytes_per_s,
                ),
            ),
        ),
        kv_capacity_tokens=int(free_bytes / kv_bytes_per_token),
        kv_bytes_per_token=kv_bytes_per_token,
        start_s=start_s,
    )


LLAMA_8B_H100 = h100_roofline(
    name="llama-3-8b-h100",
    num_parameters=8.03e9,
    num_layers=32,
    query_width=4096,
    kv_bytes_per_token=131_072,
    gpus=1,
    start_s=40.0,
)
LLAMA_70B_H100 = h100_roofline(
    name="llama-3-70b-4h100",
    num_parameters=70.6e9,
    num_layers=80,
    query_width=8192,
    kv_bytes_per_token=327_680,
    gpus=4,
    start_s=90.0,
)

PROFILES = {
    profile.name: profile
    for profile in (
        OPT_13B_VLLM,
        OPT_13B_DISTSERVE_PREFILL,
        OPT_13B_DISTSERVE_DECODE,
        LLAMA_8B_H100,
        LLAMA_70B_H100,
    )
}
"""Offered by name on the command line."""
