"""A decode worker's end of its pairs without an engine."""

import queue
from typing import Any

import torch
from p2p_prefill import HOST, SECRET, TIMEOUT_S, new_pages

from kvtransfer.p2p_fetch import FetchJob, Local, Outcome, PairClient, Remote
from kvtransfer.p2p_handshake import KVLayout
from kvtransfer.p2p_link import Transport, transport_for


class Decode:
    """A decode worker's end of its pairs, without an engine."""

    def __init__(
        self,
        layout: KVLayout,
        timeout_s: float = TIMEOUT_S,
        secret: str = SECRET,
        transport: Transport | None = None,
    ) -> None:
        pages, self.layers = new_pages(0)
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.clients: list[PairClient] = []
        self.local = Local(
            engine_id="decode",
            secret=secret,
            rank=(0, 0),
            layout=layout,
            pages=pages,
            transport=transport or transport_for(torch.device("cpu"), HOST, timeout_s=timeout_s),
            timeout_s=timeout_s,
        )

    def client(self, engine_id: str, port: int) -> PairClient:
        remote = Remote(engine_id=engine_id, host=HOST, port=port)
        self.clients.append(PairClient(self.local, remote, self.outcomes))
        return self.clients[-1]

    def outcome(self) -> Outcome:
        return self.outcomes.get(timeout=30)

    def stop(self) -> None:
        for client in self.clients:
            client.stop()
            client.join(5)


def job(local: tuple[int, ...], remote: tuple[int, ...], **other: Any) -> FetchJob:
    fields: dict[str, Any] = {
        "request_id": "mine",
        "remote_request_id": "r",
        "lease_id": 1,
        "awaited": True,
    }
    return FetchJob(local_block_ids=(local,), remote_block_ids=(remote,), **(fields | other))
