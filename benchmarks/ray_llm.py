"""Serves Ray Serve LLM's own prefill/decode app, one replica each, until SIGINT.

Owns the peer's configuration, as shipped and tuned. What makes it tuned lies in part in the
environment, which must be set before Ray starts: `benchmarks.systems` does that.
`python -m benchmarks.ray_llm --help` is the command.
"""

import argparse
import contextlib
import signal
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_pd_openai_app

from benchmarks.systems import CPU_WORKER


def llm_config(options: argparse.Namespace) -> LLMConfig:
    """The configuration of one pool; both pools have the same."""
    transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    # vLLM keeps KV in CPU memory here, and NIXL must be told.
    transfer["kv_buffer_device"] = "cpu"
    experimental: dict[str, Any] = {}
    if options.tuned:
        transfer["kv_connector_module_path"] = "benchmarks.nixl_without_spin"
        experimental["stream_batching_interval_ms"] = 0
    return LLMConfig(
        model_loading_config={"model_id": options.served_name, "model_source": options.model},
        # A bundle without GPUs is how Ray Serve LLM is told to use the CPU.
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        deployment_config={"num_replicas": 1},
        engine_kwargs={
            "max_model_len": options.max_model_len,
            "enforce_eager": True,
            # On a processor with AMX the first bfloat16 request would end it.
            "worker_cls": CPU_WORKER,
            "kv_transfer_config": transfer,
        },
        experimental_configs=experimental,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_llm", description=__doc__)
    parser.add_argument("--model", required=True, help="what vLLM is to load")
    parser.add_argument("--served-name", default="demo", help="the model's name in the API")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of context")
    parser.add_argument("--port", type=int, default=8000, help="the HTTP port")
    parser.add_argument("--temp-dir", required=True, help="Ray's session folder")
    parser.add_argument("--tuned", action="store_true", help="unbatched stream, NIXL that waits")
    options = parser.parse_args()

    # The app asks for more logical CPUs than a small machine has; they reserve nothing.
    ray.init(address="local", num_cpus=16, include_dashboard=False, _temp_dir=options.temp_dir)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(
        build_pd_openai_app(
            {"prefill_config": llm_config(options), "decode_config": llm_config(options)}
        )
    )
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
