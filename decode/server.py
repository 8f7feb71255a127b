"""The server of the decode pool's replicas."""

from engine.server import EngineServer


class DecodeServer(EngineServer):
    """A replica that decodes. The engine's connector does the pulling; nothing is added here."""

    phase = "decode"
