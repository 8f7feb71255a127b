"""What a workload asks of engines, as if it were a fluid: replicas' worth of work over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import Arrival
from router.slo import Slo

KV_LIMIT = 0.9
"""Of the KV capacity that a batch is planned to fill."""


def prefill_work_s(profile: EngineProfile, num_tokens: int) -> float:
    """Engine seconds of one prompt in a busy engine."""
    return (
        profile.idle_ttft_s(num_tokens)
        - profile.overhead_s
        - profile.prefill_overhead_s
        - profile.prefill.base_s
    )


def max_batch(profile: EngineProfile, context_tokens: float, itl_s: float) -> int:
    """The most requests of that mean context that step within the target and fit; at least 1."""
    most = min(profile.max_num_seqs, int(KV_LIMIT * profile.kv_capacity_tokens / context_tokens))
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if profile.step_s(middle, middle * context_tokens) <= itl_s:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanShape:
    """The average request of a workload."""

    prompt_tokens: float
    output_tokens: float
    prefill_s: float

    @property
    def context_tokens(self) -> float:
        """That it holds on average while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


def mean_shape(workload: Sequence[Arrival], profile: EngineProfile) -> MeanShape:
    count = len(workload)
    return MeanShape(
        prompt_tokens=sum(each.prompt_tokens for each in workload) / count,
        output_tokens=sum(each.output_tokens for each in workload) / count,
        prefill_s=sum(prefill_work_s(profile, each.prompt_tokens) for each in workload) / count,
    )


def decode_requests_per_s(profile: EngineProfile, shape: MeanShape, itl_s: float) -> float:
    """What one decode replica sustains of such requests within the target."""
    batch = max_batch(profile, shape.context_tokens, itl_s)
    return batch / profile.step_s(batch, batch * shape.context_tokens) / shape.output_tokens


def mean_gpus(
    workload: Sequence[Arrival], prefill: EngineProfile, decode: EngineProfile, slo: Slo
) -> float:
    """GPUs that are busy on average where nothing is ever idle."""
    duration_s = max(workload[-1].arrival_s - workload[0].arrival_s, 1.0)
    rate = len(workload) / duration_s
    shape = mean_shape(workload, prefill)
    in_prefill = rate * shape.prefill_s * prefill.gpus
    return in_prefill + rate / decode_requests_per_s(decode, shape, slo.itl_s) * decode.gpus


def reachable_slo(workload: Sequence[Arrival], prefill: EngineProfile, slo: Slo) -> Slo:
    """`slo`, its TTFT raised where the longest prompts take an idle engine too long.

    To twice what the 99.7th percentile of prompts takes, in whole half seconds: below that no
    number of replicas gives 99 % of the requests their first token in time.
    """
    prompts = sorted(each.prompt_tokens for each in workload)
    long_s = prefill.idle_ttft_s(prompts[int(0.997 * (len(prompts) - 1))])
    return Slo(ttft_s=max(slo.ttft_s, math.ceil(4 * long_s) / 2), itl_s=slo.itl_s)
