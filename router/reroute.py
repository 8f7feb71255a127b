"""Whether a prompt is rerouted, now that its replica has acknowledged it. Pure.

Routers hear of each other's requests through the replicas, a moment late: where one sends a prompt,
another may just have sent its own. The acknowledgement says what is ahead of the prompt, and one
that waits costs nothing to withdraw. Asking before sending would cost each prompt a round trip;
this costs one to those alone that went to the wrong place.
"""

from router.policies import Policy

MAX_ACKNOWLEDGEMENTS = 2
"""After which a prompt may be rerouted; in simulation more gained little."""

MIN_GAIN = 0.25
"""Of a prompt's own work, that a reroute must save. Less is within what is not known of others."""


def asks_acknowledgements(policy: Policy, *, num_routers: int) -> bool:
    """Whether a router asks for any: one that is alone knows everything, and a policy that does not
    go by predictions is not corrected by them."""
    return num_routers > 1 and policy.is_predictive


def is_rerouted(*, here_s: float, there_s: float, request_s: float) -> bool:
    """Whether another route is worth it.

    Args:
        here_s: until the prompt is read where it is, as its replica has just said.
        there_s: the same for the best other way, as predicted.
        request_s: the prompt's own work.
    """
    return there_s + MIN_GAIN * request_s < here_s
