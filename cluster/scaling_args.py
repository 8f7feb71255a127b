"""A scaling plan's settings as Serve carries them: plain values, from the config and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluster.config import ClusterConfig
from cluster.scaling import PoolLimits, ScaleSettings, Targets
from router.slo import Slo


def scaling_args(config: ClusterConfig) -> dict[str, Any]:
    """The settings of a config, fit for JSON."""
    slo, scaling = config.slo, config.scaling
    settings = ScaleSettings(
        targets=Targets(slo=Slo(ttft_s=slo.ttft_s, itl_s=slo.itl_s), share=slo.percentile / 100),
        prefill=config.limits("prefill"),
        decode=config.limits("decode"),
        gpu_budget=config.gpu_budget,
        up_delay_s=scaling.up_delay_s,
        down_delay_s=scaling.down_delay_s,
        look_back_s=scaling.look_back_s,
        idle_s=scaling.idle_s,
        expected_start_s=scaling.expected_start_s,
    )
    return {**dataclasses.asdict(settings), "interval_s": scaling.interval_s}


def settings_from(args: Mapping[str, Any]) -> ScaleSettings:
    """The settings in what `scaling_args` made."""
    plain = {name: value for name, value in args.items() if name != "interval_s"}
    return ScaleSettings(
        **plain
        | {
            "targets": Targets(slo=Slo(**args["targets"]["slo"]), share=args["targets"]["share"]),
            "prefill": PoolLimits(**args["prefill"]),
            "decode": PoolLimits(**args["decode"]),
        }
    )
