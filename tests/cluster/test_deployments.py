"""What Serve is told of the deployments."""

from typing import Any

from cluster.app import build


def deployments(args: dict[str, Any]) -> dict[str, Any]:
    router = build(args)._bound_deployment
    pools = [each._bound_deployment for each in router.init_args[1:]]
    return {each.name: each.ray_actor_options for each in (router, *pools)}


def test_each_deployment_is_where_its_section_says() -> None:
    place = {"labels": {"zone": "a"}, "resources": {"nic": 0.5}}
    told = deployments({"router": place, "decode": place})
    for name, is_placed in (("router", True), ("prefill", False), ("decode", True)):
        options = told[name]
        assert options.get("label_selector") == ({"zone": "a"} if is_placed else None)
        assert options["resources"] == ({"nic": 0.5} if is_placed else {})


def test_vllm_takes_no_gpu_in_a_router() -> None:
    told = deployments({"decode": {"gpus": 1}})
    devices = {
        name: options["runtime_env"]["env_vars"].get("VLLM_TARGET_DEVICE")
        for name, options in told.items()
    }
    assert devices == {"router": "cpu", "prefill": None, "decode": None}


def test_routers_know_of_drafts_in_either_pool() -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    for name in ("prefill", "decode"):
        pools = {each: {"gpus": 1} for each in ("prefill", "decode")}
        pools[name] = {"gpus": 1, "engine": {"speculative_config": drafts}}  # type: ignore[dict-item]
        settings = build(pools)._bound_deployment.init_args[0]
        assert settings.frontend.options["speculative_config"] == drafts


def test_a_replica_of_several_nodes_has_as_much_of_each() -> None:
    pool = {
        "nodes": 2,
        "gpus": 4,
        "cpus": 3,
        "resources": {"nic": 1},
        "labels": {"zone": "a"},
        "engine": {"tensor_parallel_size": 4},
    }
    router = build({"decode": pool})._bound_deployment
    prefill, decode = (each._bound_deployment for each in router.init_args[1:])
    told = decode._replica_config
    assert told.placement_group_bundles == [{"GPU": 2, "CPU": 1.5, "nic": 0.5}] * 2
    assert told.placement_group_strategy == "STRICT_SPREAD"
    assert told.placement_group_bundle_label_selector == [{"zone": "a"}] * 2
    own = decode.ray_actor_options
    assert (own["num_cpus"], own["num_gpus"], own["resources"]) == (1.5, 2, {"nic": 0.5})
    # Ray takes a label of the group's nodes from the group.
    assert "label_selector" not in own
    assert decode.init_args[1].nodes == 2
    assert prefill._replica_config.placement_group_bundles is None
    assert prefill.init_args[1].nodes == 1
