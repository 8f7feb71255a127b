"""What a client is told whose request is not taken, or not kept."""

from dataclasses import dataclass
from http import HTTPStatus

from router.admission import AdmissionPlan

RETRY_AFTER_S = 10
MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request gets no answer, and when to come back."""

    status: HTTPStatus
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    closes: bool = False
    """The connection: what else comes on it is not worth reading."""


def unavailable(message: str) -> Refusal:
    """Status 503: what is missing may come back."""
    return Refusal(
        status=HTTPStatus.SERVICE_UNAVAILABLE, message=message, retry_after_s=RETRY_AFTER_S
    )


def bad_request(message: str) -> Refusal:
    """Status 400: it will not be taken later either."""
    return Refusal(status=HTTPStatus.BAD_REQUEST, message=message)


def rejected(reason: str) -> Refusal:
    """Status 400: an engine does not take it."""
    return bad_request(f"The engine does not take the request: {reason[:MAX_REASON_CHARS]}")


def too_many(plan: AdmissionPlan) -> Refusal:
    """Status 429: there is more to do than can be done in time."""
    return Refusal(
        status=HTTPStatus.TOO_MANY_REQUESTS,
        message=f"The cluster is too busy ({plan.reason}), try again in {plan.retry_after_s} s.",
        retry_after_s=plan.retry_after_s,
    )
