"""Which replicas have which beginnings of prompts cached, as far as this router knows. Pure.

A prompt is cut into blocks; each block's hash is chained with the one before it, so that one hash
stands for all up to there. vLLM's own hashes are cryptographic and made in the engine: these need
only be quick, as a wrong guess costs a prefill that was thought to be cached. Sessions need no
header to stay where they are: the turns of a conversation begin alike.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

MAX_ENTRIES = 1_000_000
"""Blocks that one index remembers, all replicas together; about 360 bytes each."""
MIN_BLOCK_SIZE = 128
"""Smaller blocks of engines are taken together."""
MAX_HOLDERS = 32
"""Replicas that one lookup names, those with most of the prompt first."""
TRUST_STEP = 0.05
"""How far one report of an engine moves the trust in this index."""


def index_block_size(engine_block_size: int) -> int:
    """Tokens of one block here: whole blocks of the engine's, and not too few to be worth it."""
    return engine_block_size * max(1, MIN_BLOCK_SIZE // engine_block_size)


def extend_chain(
    chain: Sequence[int], tokens: Sequence[int], block_size: int, *, seed: Hashable = None
) -> list[int]:
    """The hashes of all full blocks of `tokens`, of which `chain` has the first ones already.

    Args:
        seed: what else must be equal for cached blocks to be used, such as a cache salt.
    """
    content = tuple(tokens)
    last = chain[-1] if chain else hash(seed)
    found = list(chain)
    for end in range((len(chain) + 1) * block_size, len(content) + 1, block_size):
        last = hash((last, content[end - block_size : end]))
        found.append(last)
    return found


class PrefixIndex:
    """The blocks of each replica of one pool, least recently used first. Owns them."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        self._capacity: dict[str, int] = {}
        self._holders: dict[int, dict[str, None]] = {}
        self.trust = 1.0
        """Share of the tokens thought to be cached that engines found to be so."""

    def insert(self, replica_id: str, capacity: int) -> None:
        """A replica has joined, whose cache holds `capacity` blocks."""
        self._blocks[replica_id] = OrderedDict()
        self._capacity[replica_id] = capacity

    def remove(self, replica_id: str) -> None:
        """A replica has left: its cache is gone."""
        for block in self._blocks.pop(replica_id, ()):
            self._drop(block, replica_id)
        self._capacity.pop(replica_id, None)

    def add(self, replica_id: str, chain: Sequence[int]) -> None:
        """A replica gets a prompt and will have its blocks."""
        blocks = self._blocks.get(replica_id)
        if blocks is None:
            return
        # The first block last: it is needed by all that follow it, and so forgotten after them.
        for block in reversed(chain):
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
                self._holders.setdefault(block, {})[replica_id] = None
        capacity = min(self._capacity[replica_id], self._max_entries // len(self._blocks))
        while len(blocks) > capacity:
            self._drop(blocks.popitem(last=False)[0], replica_id)

    def lookup(self, chain: Sequence[int]) -> dict[str, int]:
        """How many blocks of a prompt replicas have, for at most MAX_HOLDERS of them."""
        levels: list[dict[str, None]] = []
        for block in chain:
            holders = self._holders.get(block)
            if not holders:
                break
            levels.append(holders)
        found: dict[str, int] = {}
        for num_blocks in range(len(levels), 0, -1):
            holders = levels[num_blocks - 1]
            if len(holders) == len(found):
                continue  # the same ones
            for replica_id in holders:
                if len(found) == MAX_HOLDERS:
                    return found
                found.setdefault(replica_id, num_blocks)
        return found

    def observe(self, *, num_predicted: int, num_cached: int) -> None:
        """An engine says how many tokens of a prompt were cached; `num_predicted` were thought to
        be, without regard to trust, and are more than 0."""
        self.trust += TRUST_STEP * (min(1.0, num_cached / num_predicted) - self.trust)

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks.values())

    def _drop(self, block: int, replica_id: str) -> None:
        holders = self._holders[block]
        holders.pop(replica_id, None)
        if not holders:
            del self._holders[block]
