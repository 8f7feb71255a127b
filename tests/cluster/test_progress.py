"""What Serve's status comes to, in one line."""

from typing import Any

import pytest

from cluster.progress import NOT_YET, Progress, read_progress

STARTING = {"status": "UPDATING", "message": "", "target_num_replicas": 2}


def application(status: str, message: str, **deployments: Any) -> dict[str, Any]:
    return {
        "applications": {
            "pdserve": {"status": status, "message": message, "deployments": deployments}
        }
    }


ROWS = [
    ("nothing-yet", {}, NOT_YET),
    ("another", {"applications": {"other": {}}}, NOT_YET),
    ("building", application("DEPLOYING", ""), Progress(summary="the application is being built")),
    ("starting",
     application("DEPLOYING", "",
                 prefill=STARTING | {"replicas": [{"state": "STARTING"}, {"state": "RUNNING"}]},
                 decode=STARTING),
     Progress(summary="decode 0/2, prefill 1/2")),
    ("retrying",
     application("DEPLOYING", "", decode=STARTING | {"message": "no memory\n"}),
     Progress(summary="decode 0/2", trouble="no memory")),
    ("slow-and-no-trouble",
     application("DEPLOYING", "", decode=STARTING | {"message":
         "Deployment 'decode' in application 'pdserve' has 1 replicas that have taken more than 30s"
         " to initialize.\nThis may be caused by a slow __init__ or reconfigure method."}),
     Progress(summary="decode 0/2")),
    ("waits-for-room",
     application("DEPLOYING", "", decode=STARTING | {"message":
         "Deployment 'decode' has 1 replicas that have taken more than 30s to be scheduled."}),
     Progress(summary="decode 0/2", trouble="Deployment 'decode' has 1 replicas that have taken"
                                            " more than 30s to be scheduled.")),
    ("an-engine-ended",
     application("DEPLOYING", "", decode=STARTING | {"message":
         "A replica failed to start with exception. Retrying 2 more time(s). Error:\nTraceback\n"
         "  File engine/host.py\nengine.errors.EngineEnded: the engine was ended by SIGILL"}),
     Progress(summary="decode 0/2", trouble="the engine was ended by SIGILL")),
    ("unhealthy-is-replaced",
     application("UNHEALTHY", "The deployments are UNHEALTHY.",
                 decode=STARTING | {"message": "A replica's health check failed."}),
     Progress(summary="decode 0/2", trouble="A replica's health check failed.")),
    ("given-up",
     application("DEPLOY_FAILED", "no memory", decode=STARTING | {"message": "no memory"}),
     Progress(summary="decode 0/2", trouble="no memory", failed=True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("details", "progress"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_read_progress(details: dict[str, Any], progress: Progress) -> None:
    assert read_progress(details, "pdserve") == progress
