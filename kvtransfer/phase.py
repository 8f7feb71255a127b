"""The two phases of a request's inference; each has engines, a pool and a deployment of its own."""

from typing import Literal

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
