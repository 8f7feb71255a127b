"""What a config may say, and the one line about what it may not."""

import json
from typing import Any

import pytest

from cluster.config import ClusterConfig, parse_args
from cluster.errors import ConfigError
from cluster.scaling_args import scaling_args, settings_from

WRONG = [
    ("policy", {"router": {"policy": "p3c"}},
     "router.policy: 'p3c' is not one of p2c, least_work, round_robin, random"),
    ("connector", {"transfer": {"connector": "tcp"}},
     "transfer.connector: 'tcp' is not one of nixl, nccl"),
    ("unknown", {"prefil": {}}, "prefil: no such field; did you mean prefill?"),
    ("unknown-inside", {"router": {"polcy": "p2c"}},
     "router.polcy: no such field; did you mean policy?"),
    ("unknown-far", {"slo": {"zzz": 1}},
     "slo.zzz: no such field; known are itl_s, percentile, ttft_s"),
    ("not-a-mapping", {"prefill": 3}, "prefill: 3 is not a mapping"),
    ("count-as-text", {"prefill": {"replicas": "2"}},
     "prefill.replicas: '2' is not a whole number"),
    ("count-zero", {"decode": {"replicas": 0}}, "decode.replicas: 0 is not at least 1"),
    ("count-as-bool", {"router": {"replicas": True}},
     "router.replicas: True is not a whole number"),
    ("negative", {"slo": {"ttft_s": -1}}, "slo.ttft_s: -1 is not greater than 0"),
    ("not-finite", {"slo": {"itl_s": float("nan")}}, "slo.itl_s: nan is not a finite number"),
    ("percentile", {"slo": {"percentile": 100}}, "slo.percentile: 100 is not less than 100"),
    ("local-prefill", {"router": {"local_prefill": True}},
     "router.local_prefill: True is not one of auto, never"),
    ("admission", {"router": {"admission": "reject"}},
     "router.admission: 'reject' is not one of queue, refuse"),
    ("max-queued", {"router": {"max_queued": 0}}, "router.max_queued: 0 is not at least 1"),
    ("queue-timeout", {"router": {"queue_timeout_s": 0}},
     "router.queue_timeout_s: 0 is not greater than 0"),
    ("body", {"router": {"max_body_mib": 0}}, "router.max_body_mib: 0 is not at least 1e-06"),
    ("choices", {"router": {"max_choices": 0}}, "router.max_choices: 0 is not at least 1"),
    ("priorities", {"router": {"client_priority": [10, -10]}},
     "router.client_priority: the least must come first"),
    ("priority", {"router": {"client_priority": [True, 1]}},
     "router.client_priority.0: True is not a whole number"),
    ("model-empty", {"model": ""}, "model: '' is not a non-empty text"),
    ("model-blank", {"model": " "}, "model: ' ' is not a printable text"),
    ("name-newline", {"served_name": "a\nb"}, "served_name: 'a\\nb' is not a printable text"),
    ("count-huge", {"prefill": {"replicas": 2**40}},
     "prefill.replicas: 1099511627776 is not at most 100000"),
    ("cache-nothing", {"decode": {"kv_cache_gib": 1e-9}},
     "decode.kv_cache_gib: 1e-09 is not at least 0.001"),
    ("cache-endless", {"decode": {"kv_cache_gib": 1e300}},
     "decode.kv_cache_gib: 1e+300 is not at most 1e+06"),
    ("model-null", {"model": None}, "model: None is not a text"),
    ("backends-text", {"transfer": {"backends": "UCX"}}, "transfer.backends: 'UCX' is not a list"),
    ("backends-none", {"transfer": {"backends": []}},
     "transfer.backends: [] is not a list of at least 1"),
    ("backends-twice", {"transfer": {"backends": ["UCX", "UCX"]}},
     "transfer.backends: a backend is named twice"),
    ("backends-of-nccl", {"transfer": {"connector": "nccl", "backends": ["UCX"]}},
     "transfer.backends: are of nixl; transfer.connector nccl has none"),
    ("lease-short", {"transfer": {"lease_s": 0.5}}, "transfer.lease_s: 0.5 is not at least 1"),
    ("tls-half", {"network": {"tls": {"certificate": "/c.pem", "ca": "/ca.pem"}}},
     "network.tls.key: field required"),
    ("tls-relative", {"network": {"tls": {"certificate": "/c", "key": "k.pem", "ca": "/ca"}}},
     "network.tls.key: must be an absolute path"),
    ("env-name", {"decode": {"env": {"A=B": "c"}}},
     "decode.env.A=B: is not the name of an environment variable"),
    ("env-nul", {"decode": {"env": {"A": "b\0"}}},
     "decode.env.A: a NUL may not be in an environment variable"),
    ("resource-unnamed", {"decode": {"resources": {"": 1}}},
     "decode.resources: a resource must have a name"),
    ("cache-bytes-on-cpu", {"engine": {"kv_cache_memory_bytes": 10**9}},
     "prefill.engine.kv_cache_memory_bytes: is for pools on GPUs; set prefill.kv_cache_gib "
     "instead"),
    ("data-parallel-local", {"engine": {"data_parallel_size_local": 2}},
     "engine.data_parallel_size_local: may not be set here: raise the pool's replicas instead"),
    ("data-parallel-rank", {"engine": {"data_parallel_rank": 0}},
     "engine.data_parallel_rank: may not be set here: raise the pool's replicas instead"),
    ("data-parallel-lb", {"decode": {"engine": {"data_parallel_external_lb": True}}},
     "decode.engine.data_parallel_external_lb: may not be set here: raise the pool's replicas "
     "instead"),
    ("nodes-of-vllm", {"engine": {"nnodes": 2}},
     "engine.nnodes: may not be set here: set nodes of the pool instead"),
    ("node-rank", {"engine": {"node_rank": 1}},
     "engine.node_rank: may not be set here: set nodes of the pool instead"),
    ("nodes-without-ranks", {"decode": {"nodes": 2}},
     "decode.nodes: 2 does not divide 1, its engine's tensor_parallel_size times "
     "pipeline_parallel_size: each node has as many ranks"),
    ("nodes-uneven", {"prefill": {"nodes": 3, "engine": {"tensor_parallel_size": 4}}},
     "prefill.nodes: 3 does not divide 4, its engine's tensor_parallel_size times "
     "pipeline_parallel_size: each node has as many ranks"),
    ("nodes-zero", {"decode": {"nodes": 0}}, "decode.nodes: 0 is not at least 1"),
    ("nodes-executor",
     {"decode": {"nodes": 2, "engine": {"tensor_parallel_size": 2,
                                        "distributed_executor_backend": "uni"}}},
     "decode.nodes: 2 does not go with distributed_executor_backend uni; only mp, which is what it "
     "is if left out, spans nodes"),
    ("nodes-address",
     {"decode": {"nodes": 2, "engine": {"tensor_parallel_size": 2},
                 "env": {"VLLM_HOST_IP": "::1"}}},
     "decode.env.VLLM_HOST_IP: would be the same on each of decode.nodes, 2; each takes its own "
     "from Ray"),
    ("scheduling", {"engine": {"scheduling_policy": "fcfs"}},
     "engine.scheduling_policy: may not be set here: prefill runs prompts in the order of their "
     "latest starts"),
    ("offloading", {"engine": {"kv_offloading_size": 1}},
     "engine.kv_offloading_size: may not be set here: the engine's one KV connector is transfer's"),
    ("pooling", {"engine": {"runner": "pooling"}},
     "engine.runner: may not be set here: pdserve serves models that generate text"),
    ("lora-in-one-pool", {"decode": {"engine": {"enable_lora": True}}},
     "engine.enable_lora: unset in prefill and True in decode must be the same; set it once, in "
     "the shared engine"),
    ("draft-in-one-pool", {"decode": {"engine": {"speculative_config": {"method": "eagle3"}}}},
     "engine.speculative_config: a draft with weights has KV of its own, so both pools have the "
     "same draft or neither has one; set it in the shared engine"),
    ("env-number", {"decode": {"env": {"DEBUG": 1}}}, "decode.env.DEBUG: 1 is not a text"),
    ("resource-gpu", {"decode": {"resources": {"GPU": 1}}},
     "decode.resources.GPU: may not be set here: use gpus of the pool"),
    ("router-resource-gpu", {"router": {"resources": {"GPU": 1}}},
     "router.resources.GPU: may not be set here: a router computes nothing"),
    ("router-resource-cpu", {"router": {"resources": {"CPU": 1}}},
     "router.resources.CPU: may not be set here: use cpus of the router"),
    ("engine-owned", {"engine": {"model": "other"}},
     "engine.model: may not be set here: set by the top-level model"),
    ("engine-owned-in-pool", {"prefill": {"engine": {"kv_transfer_config": {}}}},
     "prefill.engine.kv_transfer_config: may not be set here: set from transfer"),
    ("context-parallel", {"decode": {"engine": {"decode_context_parallel_size": 2}}},
     "decode.engine.decode_context_parallel_size: may not be set here: KV moves between ranks that "
     "hold all tokens; raise tensor_parallel_size instead"),
    ("context-parallel-prefill", {"prefill": {"engine": {"prefill_context_parallel_size": 2}}},
     "prefill.engine.prefill_context_parallel_size: may not be set here: KV moves between ranks "
     "that hold all tokens; raise tensor_parallel_size instead"),
    ("too-few-gpus", {"prefill": {"gpus": 1, "engine": {"tensor_parallel_size": 2}}},
     "prefill.gpus: 1 is not 2, its engine's tensor_parallel_size times pipeline_parallel_size: "
     "each rank has a GPU of its own"),
    ("too-many-gpus", {"decode": {"gpus": 4}, "engine": {"pipeline_parallel_size": 2}},
     "decode.gpus: 4 is not 2, its engine's tensor_parallel_size times pipeline_parallel_size: "
     "each rank has a GPU of its own"),
    ("ranks-text", {"engine": {"tensor_parallel_size": "2"}},
     "engine.tensor_parallel_size: '2' is not a whole number from 1"),
    ("ranks-zero", {"decode": {"engine": {"pipeline_parallel_size": 0}}},
     "decode.engine.pipeline_parallel_size: 0 is not a whole number from 1"),
    ("pools-differ", {"prefill": {"engine": {"max_model_len": 64}}},
     "engine.max_model_len: 64 in prefill and unset in decode must be the same; set it once, in "
     "the shared engine"),
    ("min-over-max", {"prefill": {"min_replicas": 3, "max_replicas": 2}},
     "prefill.min_replicas: 3 is more than prefill.max_replicas, 2"),
    ("min-without-max", {"decode": {"min_replicas": 0}},
     "decode.min_replicas: is for a pool that scales; set decode.max_replicas too"),
    ("warm-without-max", {"decode": {"warm_replicas": 1}},
     "decode.warm_replicas: is for a pool that scales; set decode.max_replicas too"),
    ("min-negative", {"decode": {"min_replicas": -1, "max_replicas": 2}},
     "decode.min_replicas: -1 is not at least 0"),
    ("starts-outside", {"decode": {"replicas": 5, "max_replicas": 4}},
     "decode.replicas: 5 is not between decode.min_replicas and decode.max_replicas, 1 and 4"),
    ("budget-below-minimums",
     {"prefill": {"gpus": 2, "engine": {"tensor_parallel_size": 2}, "min_replicas": 2,
                  "max_replicas": 4}, "decode": {"gpus": 1, "replicas": 3}, "gpu_budget": 6},
     "gpu_budget: 6 is less than the 7 that the smallest pools need: 2 prefill and 3 decode "
     "replicas"),
    ("budget-below-start",
     {"prefill": {"gpus": 1, "replicas": 4, "max_replicas": 4}, "gpu_budget": 4},
     "gpu_budget: 4 is less than the 5 that the pools start with: 4 prefill and 1 decode replicas"),
    ("up-delay-negative", {"scaling": {"up_delay_s": -1}},
     "scaling.up_delay_s: -1 is not at least 0"),
    ("cpu-cache-on-gpu", {"decode": {"gpus": 1, "kv_cache_gib": 2}},
     "decode.kv_cache_gib: is for pools on CPU; with gpus set "
     "decode.engine.gpu_memory_utilization"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "line"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_value_is_told_in_one_line(args: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert str(caught.value) == line


def test_nothing_need_be_set() -> None:
    config = parse_args({})
    assert config.public_name == "demo"
    assert config.prefill == config.decode
    assert config.transfer.backends == ("UCX",)


def test_sizes_of_pools() -> None:
    config = parse_args(
        {
            "prefill": {"replicas": 2, "max_replicas": 6, "min_replicas": 0},
            "decode": {"max_replicas": 8, "min_replicas": 3, "warm_replicas": 1},
        }
    )
    assert config.scales
    prefill, decode = config.limits("prefill"), config.limits("decode")
    assert (prefill.min_replicas, prefill.max_replicas) == (0, 6)
    assert (decode.min_replicas, decode.max_replicas, decode.warm_replicas) == (3, 8, 1)
    assert (config.initial_replicas("prefill"), config.initial_replicas("decode")) == (2, 3)
    fixed = parse_args({"prefill": {"replicas": 2}})
    assert not fixed.scales
    assert fixed.limits("prefill").min_replicas == fixed.limits("prefill").max_replicas == 2


def test_scaling_settings_survive_json() -> None:
    config = parse_args({"prefill": {"max_replicas": 6}, "gpu_budget": 9})
    args = scaling_args(config)
    assert json.loads(json.dumps(args)) == args
    settings = settings_from(args)
    assert settings.prefill == config.limits("prefill")
    assert settings.targets.share == 0.9
    assert settings.gpu_budget == 9


def test_pool_options_go_over_shared_ones() -> None:
    config = parse_args(
        {
            "engine": {"max_model_len": 512, "max_num_seqs": 8},
            "decode": {"engine": {"max_num_seqs": 64, "enforce_eager": False}},
        }
    )
    assert config.pool_engine("prefill") == {"max_model_len": 512, "max_num_seqs": 8}
    assert config.pool_engine("decode") == {
        "enforce_eager": False,
        "max_model_len": 512,
        "max_num_seqs": 64,
    }


def test_pools_may_differ_in_parallelism() -> None:
    config = parse_args(
        {"prefill": {"gpus": 2, "engine": {"tensor_parallel_size": 2}}, "decode": {"gpus": 1}}
    )
    assert [config.num_ranks("prefill"), config.num_ranks("decode")] == [2, 1]
    assert config.pool_engine("decode") == {}


def test_every_field_has_a_description() -> None:
    def missing(schema: Any) -> list[str]:
        return [
            name
            for section in [schema, *schema["$defs"].values()]
            for name, field in section["properties"].items()
            if not field.get("description")
        ]

    assert missing(ClusterConfig.model_json_schema()) == []
