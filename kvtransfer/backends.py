"""Which backends NIXL has for reads between engines.

Owns that question. Needs no GPU and no vLLM.
"""

_MEMORY = {"DRAM_SEG", "VRAM_SEG"}


def engine_backends() -> tuple[str, ...] | None:
    """NIXL's backends, less those that move data to a storage; None where NIXL is not installed.

    A backend that cannot be loaded here, for want of a GPU or of a network card, may be elsewhere.
    """
    try:
        from nixl._api import nixlBind
    except ImportError:
        return None
    agent = nixlBind.nixlAgent("backends", nixlBind.nixlAgentConfig())
    names = agent.getAvailPlugins()
    return tuple(name for name in names if _memories(agent, name) <= _MEMORY)


def _memories(agent: object, name: str) -> set[str]:
    from nixl._api import nixlBind

    try:
        _, memories = agent.getPluginParams(name)  # type: ignore[attr-defined]
    except nixlBind.nixlNotFoundError:
        return set()
    return set(memories)
