"""The names inside vLLM and Ray that the router relies on, checked before it starts.

Both are pinned exactly (pyproject.toml). Whoever moves a pin reads this list first.
"""

from importlib import import_module

from router.errors import RouterInternalsChanged

RELIED_ON = {
    "vllm.v1.engine.async_llm": ("AsyncLLM", "EngineCoreClient"),
    "vllm.v1.engine.core_client": ("EngineCoreClient",),
    "vllm.entrypoints.launchers.app": ("build_app",),
    "vllm.entrypoints.launchers.api_server.app_state": ("init_app_state",),
    "vllm.entrypoints.launchers.cli_args": (
        "FrontendArgs",
        "make_arg_parser",
        "validate_parsed_serve_args",
    ),
    "vllm.entrypoints.launchers.launcher": ("validate_api_server_args",),
    "vllm.entrypoints.serve.middleware.authenticate": ("AuthenticationMiddleware",),
    "vllm.config:ParallelConfig": ("_api_process_count",),
    "vllm.v1.executor.abstract": ("Executor",),
    "vllm.sampling_params:SamplingParams": ("_validate_structured_outputs",),
    "vllm.v1.engine.input_processor": ("InputProcessor",),
    "vllm.v1.structured_output.request": ("get_structured_output_key",),
    "vllm.v1.structured_output.backend_xgrammar": (
        "has_xgrammar_unsupported_json_features",
        "validate_xgrammar_grammar",
    ),
    "vllm.renderers.hf": (
        "_CONTENT_FORMATS",
        "_CONTENT_FORMATS_MAXSIZE",
        "_resolve_chat_template_content_format",
        "safe_apply_chat_template",
    ),
    "vllm.renderers.hf:HfRenderer": ("_render_with_timeout", "render_messages_async"),
    "ray.serve._private.common": ("DeploymentID",),
    "ray.serve._private.constants": (
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        "SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER",
    ),
    "ray.serve._private.replica:ReplicaActor": ("perform_graceful_shutdown",),
    "ray.serve._private.long_poll": ("LongPollClient", "LongPollNamespace"),
    "ray.serve.context": ("_get_global_client",),
    "ray._common.utils": ("hex_to_binary",),
    "ray._private.worker": ("global_worker",),
    "ray._raylet:InnerGcsClient": ("get_all_node_info",),
    "ray.core.generated.gcs_pb2:GcsNodeInfo": ("DEAD",),
    "ray.core.generated.gcs_service_pb2:GetAllNodeInfoRequest": ("NodeSelector",),
    "ray.experimental.internal_kv": ("_internal_kv_get", "_internal_kv_put"),
}


def check_internals() -> None:
    """Raises RouterInternalsChanged, in one line, where vLLM or Ray lacks a name we call."""
    for place, names in RELIED_ON.items():
        module_name, _, class_name = place.partition(":")
        try:
            owner = import_module(module_name)
            owner = getattr(owner, class_name) if class_name else owner
        except (ImportError, AttributeError) as error:
            raise RouterInternalsChanged(f"cannot import {place}: {error}") from None
        for name in names:
            if not hasattr(owner, name):
                raise RouterInternalsChanged(
                    f"{place} has no {name}: see the pinned versions in pyproject.toml"
                )
