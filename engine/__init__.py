"""Hosting one vLLM engine core, and the wire between it and the routers.

Owns the engine's start, stop and health, its processes, and the channel its outputs travel on.
Never knows which phase it serves.
"""
