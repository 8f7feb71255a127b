"""The other nodes of an engine that spans several, as its replica sees them.

Owns the actors that run its ranks there, one in each bundle of the replica's placement group but
the first. Never knows what they compute.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.exit_cause import MAX_TEXT, EngineExit
from engine.follower import Follower, Share
from engine.meeting import Meeting


class Followers:
    """Of one engine. `stop` ends them, and so does the end of this process, which Ray watches."""

    def __init__(self, actors: Sequence[Any], meeting: Meeting) -> None:
        self._actors = actors
        self._meeting = meeting
        self._watches: list[asyncio.Task[None]] = []
        self.ended: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()
        """Done where one of them has ended, which the engine does not outlive."""

    @classmethod
    async def start(cls, host: str, share: Share) -> "Followers":
        """Has each other node run its share of an engine. Returns when all have begun.

        `host` is this node's address, where the ranks meet; `share` is the engine's, to which each
        node's own options are added.

        Raises:
            RayError: an actor did not start.
        """
        group = ray.util.get_current_placement_group()
        assert group is not None, "a replica that spans nodes has a placement group"
        bundles = group.bundle_specs
        actors = [
            ray.remote(Follower).options(**_placed(group, index, bundles[index])).remote()
            for index in range(1, len(bundles))
        ]
        followers = cls(actors, Meeting(host, len(bundles)))
        try:
            addresses = await asyncio.gather(*(each.address.remote() for each in actors))
        except BaseException:
            followers.stop()
            raise
        followers._watches = [
            asyncio.create_task(followers._watch(actor, address, followers._share_of(node, share)))
            for node, (actor, address) in enumerate(zip(actors, addresses, strict=True), start=1)
        ]
        return followers

    def options(self) -> dict[str, Any]:
        """vLLM's engine arguments on this node, beside the engine's own."""
        return self._meeting.options(0)

    def _share_of(self, node: int, share: Share) -> Share:
        return replace(share, options={**share.options, **self._meeting.options(node)})

    async def _watch(self, actor: Any, address: str, share: Share) -> None:
        try:
            how: EngineExit = await actor.run.remote(share)
        except RayError as error:
            # Its node, its process, or what was raised in it; Ray says it in many lines.
            reason = " ".join(str(getattr(error, "cause", None) or error).split())
            text = f"on node {address}, the engine's ranks are gone: {reason}"
            how = EngineExit(cause="error", text=text[:MAX_TEXT])
        if not self.ended.done():
            self.ended.set_result(how)

    def stop(self) -> None:
        """Ends them by force, and hears of it no more."""
        for watch in self._watches:
            watch.cancel()
        for actor in self._actors:
            ray.kill(actor)


def _placed(group: PlacementGroup, index: int, bundle: Mapping[str, float]) -> dict[str, Any]:
    """All of one bundle."""
    others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "resources": others,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index
        ),
    }
