"""One simulated engine: iterations of prompts' chunks and decode steps, and the KV they hold.

Iteration-level, yet an event per change and not per step: while the batch stays the same, the
steps' times are a sum in closed form. Knows no router and no pool. What it takes for an iteration
is `profiles`' business.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from benchmarks.simulate.model.event_queue import EventQueue
from benchmarks.simulate.model.iterations import DecodeRun, PromptIteration
from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import SimRequest
from engine.lateness import LastStep, put_back_late_prompts
from engine.step_limit import LEAST_PIECE


class EngineListener(Protocol):
    """Whom an engine tells what becomes of requests."""

    def prefilled(self, engine: "Engine", request: SimRequest) -> None:
        """Its prompt is done and its first token is out, which may have been its last."""

    def pulled(self, engine: "Engine", request: SimRequest) -> None:
        """Its KV has come from the engine that prefilled it."""

    def finished(self, engine: "Engine", request: SimRequest) -> None:
        """Its last token is out of a decode batch."""


class Engine:
    """Owns its queue, its batch and its KV."""

    def __init__(
        self, events: EventQueue, profile: EngineProfile, listener: EngineListener
    ) -> None:
        self.profile = profile
        self.is_alive = True
        self.waiting = _InOrder()
        """For KV."""
        self.on_busy_changed: Callable[[], None] | None = None
        """Told when it begins after it had nothing to do, and when it has nothing to do again."""
        self.kv_used = 0
        self._events = events
        self._listener = listener
        self._prefilling = _InOrder()
        self._joining: list[SimRequest] = []
        self._running: list[tuple[int, int, SimRequest]] = []
        """A heap by the step that ends the request."""
        self._step = 0
        self._context = 0
        self._num_incoming = 0
        self._num_joined = 0
        self._doing: DecodeRun | PromptIteration | None = None
        self._event = 0
        self._end_s = 0.0
        """When what it does ends, as planned."""
        self._slowdown = 1.0
        self._began_s = 0.0
        self._oldest_since_s = 0.0
        self._link_free_s = 0.0
        self._last_step = LastStep()

    # What an owner asks.

    @property
    def is_busy(self) -> bool:
        return self._doing is not None

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._joining) + len(self._prefilling) + self._num_incoming

    @property
    def num_requests(self) -> int:
        return self.num_running + len(self.waiting)

    @property
    def kv_usage_fraction(self) -> float:
        return self.kv_used / self.profile.kv_capacity_tokens

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        in_queue = sum(each.num_tokens for each in self.waiting)
        return in_queue + sum(
            each.num_tokens - each.num_computed_tokens for each in self._prefilling
        )

    @property
    def prefill_left_s(self) -> float:
        """True seconds of the prompts that it has, less what it has read of them."""
        cost = self.profile.prefill
        is_reading = isinstance(self._doing, PromptIteration)
        left_s = self._began_s - self._events.now_s if is_reading else 0.0
        for request in (*self.waiting, *self._prefilling):
            num_tokens = request.num_tokens
            uncached = num_tokens - request.num_computed_tokens
            left_s += cost.seconds(num_uncached=uncached, num_tokens=num_tokens)
        return left_s

    @property
    def progress_s(self) -> float:
        """Time since it began with the oldest prompt, at most its work, as replicas report it."""
        oldest = next(iter(self._prefilling), None) or next(iter(self.waiting), None)
        if oldest is None:
            return 0.0
        return min(self._events.now_s - self._oldest_since_s, oldest.work_s)

    def submit(self, request: SimRequest) -> None:
        """Takes a request: to be prefilled, or with all but its last token's KV to be pulled."""
        if not self.num_requests:
            self._oldest_since_s = self._events.now_s
        self.waiting.add_request(request)
        self._look()

    def release(self, num_tokens: int) -> None:
        """Frees KV that was kept for a decode engine to pull."""
        self.kv_used -= num_tokens
        self._look()

    def slow_down(self, factor: float) -> None:
        """From now on, or from a decode step's end on, all takes `factor` times as long."""
        if factor == self._slowdown:
            return
        if isinstance(self._doing, DecodeRun):
            self._cut_short(self._doing)
        elif self._doing is not None:
            left_s = self._end_s - self._events.now_s
            self._plan_end(self._events.now_s + left_s * factor / self._slowdown)
        self._slowdown = factor

    def fail(self) -> list[SimRequest]:
        """Dies at once; returns the requests it had, with the tokens they got so far."""
        self._settle_run()
        self.is_alive = False
        self._event += 1
        left = [*self.waiting, *self._prefilling, *self._joining]
        for end_step, _, request in self._running:
            request.num_output_tokens = request.arrival.output_tokens - (end_step - self._step)
            left.append(request)
        for each in left:
            each.num_computed_tokens = 0
        self.waiting.clear()
        self._prefilling.clear()
        self._joining.clear()
        self._running.clear()
        return left

    # The loop.

    def _look(self) -> None:
        """Something came or became free: goes on where idle, cuts a run short where it may join."""
        if self._doing is None:
            self._next()
            if self._doing is not None:
                self._tell_busy()
        elif isinstance(self._doing, DecodeRun) and (self._joining or self._may_admit()):
            self._cut_short(self._doing)

    def _cut_short(self, run: DecodeRun) -> None:
        num_steps = run.steps_begun(self._events.now_s - run.start_s)
        if num_steps < run.num_steps:
            run.num_steps = num_steps
            self._plan_end(run.start_s + run.length_s(num_steps))

    def _plan_end(self, time_s: float) -> None:
        self._event += 1
        self._end_s = time_s
        self._events.at(time_s, _Ending(self, self._event).run)

    def ended(self, event: int) -> None:
        """What was under way is over, unless it was cut short."""
        if event != self._event or not self.is_alive:
            return
        doing, self._doing = self._doing, None
        if isinstance(doing, DecodeRun):
            self._advance(doing.num_steps)
        elif doing is not None:
            self._end_iteration(doing)
        if self._doing is None and self.is_alive:
            self._next()
            if self._doing is None:
                self._tell_busy()

    def _tell_busy(self) -> None:
        if self.on_busy_changed is not None:
            self.on_busy_changed()

    def _next(self) -> None:
        self._admit()
        for request in self._joining:
            self._join(request)
        self._joining.clear()
        if self._prefilling:
            self._start_iteration()
        elif self._running:
            self._start_run()

    def _may_admit(self) -> bool:
        if not self.waiting or self.num_running >= self.profile.max_num_seqs:
            return False
        request = self.waiting[0]
        return self._fits(request) and (
            request.num_computed_tokens > 0 or self._has_tokens_for(request)
        )

    def _has_tokens_for(self, request: SimRequest) -> bool:
        """Whether the next step gets to its prompt: until then it waits without KV."""
        return self._num_tokens_before(request) < self.profile.max_batched_tokens

    def _num_tokens_before(self, request: SimRequest) -> int:
        """Of the prompts that it reads, as far as they go before this one."""
        return sum(
            each.num_tokens - each.num_computed_tokens
            for each in self._prefilling
            if _order(each) <= _order(request)
        )

    def _fits(self, request: SimRequest) -> bool:
        room = self.profile.kv_capacity_tokens - self.kv_used
        # What could never fit runs alone, as if its end were cut off.
        return request.num_tokens + 1 <= room or self.kv_used == 0

    def _admit(self) -> None:
        self._put_back_late_prompts()
        while self._may_admit():
            request = self.waiting.popleft()
            self.kv_used += request.num_tokens
            if request.num_computed_tokens:
                self._pull(request)
            else:
                self._prefilling.add_request(request)
                self._put_back_late_prompts()

    def _put_back_late_prompts(self) -> None:
        """Of those with a latest start, one by one as they are about to begin."""
        if self.waiting and self.waiting[0].priority:
            put_back_late_prompts(
                self.waiting,
                reading=[
                    (each.priority, each.num_tokens - each.num_computed_tokens)
                    for each in self._prefilling
                ],
                num_step_tokens=1,
                now_s=self._events.now_s,
                last=self._last_step,
            )

    def _pull(self, request: SimRequest) -> None:
        """KV comes over this engine's link, one request after the other."""
        profile, now_s = self.profile, self._events.now_s
        num_bytes = request.num_computed_tokens * profile.kv_bytes_per_token
        bytes_per_s = request.link_bytes_per_s or profile.link_bytes_per_s
        self._link_free_s = max(self._link_free_s, now_s) + num_bytes / bytes_per_s
        self._num_incoming += 1
        self._events.at(self._link_free_s + profile.link_latency_s, lambda: self._pulled(request))

    def _pulled(self, request: SimRequest) -> None:
        if not self.is_alive:
            return
        self._num_incoming -= 1
        self._joining.append(request)
        self._listener.pulled(self, request)
        self._look()

    def _join(self, request: SimRequest) -> None:
        self._num_joined += 1
        self._context += request.num_tokens
        heapq.heappush(self._running, (self._step + request.num_left, self._num_joined, request))

    # Prompts.

    def _start_iteration(self) -> None:
        profile = self.profile
        steps_batch = bool(self._running) and profile.chunks_prefill
        if steps_batch and not self._has_room_for_a_step():
            self._preempt()
            steps_batch = bool(self._running)
        batch = len(self._running) if steps_batch else 0
        chunks, num_tokens, squares = self._pick_chunks(self._prompt_tokens_of_a_step(batch))
        prefill = profile.prefill
        chunks_s = prefill.per_token_s * num_tokens + prefill.per_token_squared_s * squares
        overhead_s = profile.overhead_s + profile.overhead_per_token_s * (num_tokens + batch)
        length_s = overhead_s + profile.prefill_overhead_s + chunks_s
        if steps_batch:
            cost = profile.decode_cost(batch)
            length_s += max(cost.base_s, prefill.base_s)
            length_s += cost.per_request_s * batch + cost.per_context_token_s * self._context
        else:
            length_s += prefill.base_s
        length_s *= self._slowdown
        self._doing = PromptIteration(chunks, steps_batch)
        self._last_step = LastStep(
            seconds=length_s,
            num_prefill_tokens=num_tokens,
            is_full=num_tokens + batch >= profile.max_batched_tokens,
        )
        self._began_s = self._events.now_s
        self._plan_end(self._events.now_s + length_s)

    def _prompt_tokens_of_a_step(self, batch: int) -> int:
        """As many as fit, or as the strictest limit on a step leaves beside the answers.

        Real engines find that number by trial (`engine.step_limit`); it is where they end up.
        """
        most = self.profile.max_batched_tokens - batch
        limits = [each.step_limit_s for each in self._prefilling if each.step_limit_s is not None]
        if not limits or not batch:
            return most
        profile, cost = self.profile, self.profile.prefill
        answers_s = profile.step_s(batch, self._context) + profile.prefill_overhead_s
        token_s = profile.overhead_per_token_s + cost.per_token_s
        token_s += 2 * cost.per_token_squared_s * self._prefilling[0].num_computed_tokens
        fitting = int((min(limits) - answers_s) / token_s)
        return max(min(fitting, most), min(LEAST_PIECE, most))

    def _pick_chunks(self, budget: int) -> tuple[list[tuple[SimRequest, int]], int, int]:
        """Takes prompts in order until the budget is used; returns them with sums of n and n²."""
        if not self.profile.chunks_prefill:
            return self._pick_whole(budget)
        chunks: list[tuple[SimRequest, int]] = []
        num_tokens = squares = 0
        for request in self._prefilling:
            chunk = min(request.num_tokens - request.num_computed_tokens, budget - num_tokens)
            if chunk <= 0:
                break
            chunks.append((request, chunk))
            num_tokens += chunk
            squares += (request.num_computed_tokens + chunk) ** 2 - request.num_computed_tokens**2
        return chunks, num_tokens, squares

    def _pick_whole(self, budget: int) -> tuple[list[tuple[SimRequest, int]], int, int]:
        """Takes whole prompts in order, at least one, padded to the longest where engines pad."""
        chunks: list[tuple[SimRequest, int]] = []
        max_paddings = self.profile.max_paddings
        num_tokens = squares = longest = 0
        for request in self._prefilling:
            length = request.num_tokens - request.num_computed_tokens
            longest_then = max(longest, length)
            padded = (len(chunks) + 1) * longest_then
            wasted = padded - num_tokens - length
            if max_paddings is None:
                is_over = num_tokens + length > budget
            else:
                is_over = padded > budget or wasted > max_paddings
            if chunks and is_over:
                break
            chunks.append((request, length))
            num_tokens += length
            squares += request.num_tokens**2 - request.num_computed_tokens**2
            longest = longest_then
        if max_paddings is not None:
            num_tokens, squares = len(chunks) * longest, len(chunks) * longest**2
        return chunks, num_tokens, squares

    def _end_iteration(self, iteration: PromptIteration) -> None:
        if iteration.steps_batch:
            self._advance(1)
        done = []
        for request, chunk in iteration.chunks:
            request.num_computed_tokens += chunk
            if request.num_computed_tokens >= request.num_tokens:
                self._prefilling.popleft()
                self._oldest_since_s = self._events.now_s
                done.append(request)
        for request in done:
            self._first_token(request)

    def _first_token(self, request: SimRequest) -> None:
        num_held = request.num_tokens
        request.num_output_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = self._events.now_s
        if not request.num_left:
            request.ended_s = self._events.now_s
            self.kv_used -= num_held
        elif not request.hands_over:
            self.kv_used += 1
            self._joining.append(request)
        self._listener.prefilled(self, request)

    # Answers.

    def _start_run(self) -> None:
        if not self._has_room_for_a_step():
            self._preempt()
        batch = len(self._running)
        cost = self.profile.decode_cost(batch)
        run = DecodeRun(
            start_s=self._events.now_s,
            num_steps=self._running[0][0] - self._step,
            fixed_s=self.profile.step_s(batch, 0) * self._slowdown,
            per_context_token_s=cost.per_context_token_s * self._slowdown,
            context=self._context,
            batch=batch,
        )
        if batch > 1:  # the last one may grow over what others hold: somebody has to get done
            room = self.profile.kv_capacity_tokens - self.kv_used
            run.num_steps = min(run.num_steps, max(room // batch, 1))
        self._doing = run
        self._plan_end(run.start_s + run.length_s(run.num_steps))

    def _settle_run(self) -> None:
        """Counts the steps that a run has got through."""
        if isinstance(self._doing, DecodeRun):
            run = self._doing
            elapsed_s = self._events.now_s - run.start_s
            self._step += max(run.steps_begun(elapsed_s) - 1, 0)

    def _advance(self, num_steps: int) -> None:
        """The running batch has made `num_steps` steps; ends what is complete."""
        grown = num_steps * len(self._running)
        self._step += num_steps
        self._context += grown
        self.kv_used += grown
        running = self._running
        while running and running[0][0] <= self._step:
            request = heapq.heappop(running)[2]
            self._leave(request, request.arrival.output_tokens)
            request.ended_s = self._events.now_s
            self._listener.finished(self, request)

    def _leave(self, request: SimRequest, num_output_tokens: int) -> None:
        request.num_output_tokens = num_output_tokens
        self._context -= request.num_tokens
        self.kv_used -= request.num_tokens

    def _has_room_for_a_step(self) -> bool:
        room = self.profile.kv_capacity_tokens - self.kv_used
        return room >= len(self._running) or self.num_requests == 1

    def _preempt(self) -> None:
        """Takes the KV of those that joined last, until a step has room: they are computed anew."""
        while len(self._running) > 1 and not self._has_room_for_a_step():
            index = max(range(len(self._running)), key=lambda each: self._running[each][1])
            end_step, _, request = self._running[index]
            self._running[index] = self._running[-1]
            self._running.pop()
            heapq.heapify(self._running)
            self._leave(request, request.arrival.output_tokens - (end_step - self._step))
            request.num_computed_tokens = 0
            request.num_preempted += 1
            self.waiting.appendleft(request)


class _InOrder(deque[SimRequest]):
    """By latest start, then by arrival; those without one as they come. A `WaitingQueue`."""

    def peek_request(self) -> SimRequest:
        return self[0]

    def pop_request(self) -> SimRequest:
        return self.popleft()

    def add_request(self, request: SimRequest) -> None:
        insort(self, request, key=_order)


def _order(request: SimRequest) -> tuple[int, float]:
    return request.priority, request.arrival_time if request.priority else 0.0


@dataclass(slots=True)
class _Ending:
    """The end of what an engine does, unless something else was planned since."""

    engine: Engine
    event: int

    def run(self) -> None:
        self.engine.ended(self.event)
