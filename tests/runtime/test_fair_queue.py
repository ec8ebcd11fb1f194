"""Who is next: priorities, and users served alike."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fssa_runtime.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Job:
    user: str
    cost: float = 1
    priority: int = 0


def add(queue: FairQueue[Job], job: Job) -> Job:
    queue.add(job, job.user, job.priority)
    return job


def run_one(queue: FairQueue[Job]) -> Job:
    """Take the next job, serve it in full and let it go."""
    job = queue.pop()
    assert job is not None
    queue.serve(job.user, job.priority, job.cost)
    queue.leave(job.user, job.priority)
    return job


def test_priorities_go_first() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [add(queue, Job(user, priority=p)) for p in (0, 2, -1, 1) for user in "ab"]
    order = [run_one(queue).priority for _ in jobs]
    assert order == [2, 2, 1, 1, 0, 0, -1, -1]
    assert queue.pop() is None
    assert queue.peek() is None


def test_service_at_one_priority_is_not_held_against_another() -> None:
    """Those served first anyway must not make newcomers below wait behind who came earlier."""
    queue: FairQueue[Job] = FairQueue()
    for _ in range(100):
        add(queue, Job("early"))
    for _ in range(50):
        add(queue, Job("urgent", cost=1000, priority=1))
        run_one(queue)
    add(queue, Job("late"))
    assert "late" in [run_one(queue).user for _ in range(3)]


def test_a_user_s_own_jobs_keep_their_order() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [add(queue, Job("a")) for _ in range(5)]
    first = queue.pop()
    assert first is jobs[0]
    queue.add(first, "a", 0, front=True)
    queue.leave("a", 0)
    assert [run_one(queue) for _ in jobs] == jobs


def test_a_heavy_user_does_not_starve_a_light_one() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(1000):
        add(queue, Job("heavy", cost=10))
    for _ in range(200):
        run_one(queue)
    for user in ("light", "lighter"):
        add(queue, Job(user))
    assert {"light", "lighter"} <= {run_one(queue).user for _ in range(4)}


def test_service_is_counted_in_tokens() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(2000):
        add(queue, Job("long", cost=30))
        add(queue, Job("short", cost=10))
    taken = Counter(run_one(queue).user for _ in range(400))
    assert taken["long"] == pytest.approx(100, abs=2)
    assert taken["short"] == pytest.approx(300, abs=2)


def test_users_with_work_waiting_are_served_alike() -> None:
    draw = random.Random(0)
    queue: FairQueue[Job] = FairQueue()
    for user in "abcde":
        for _ in range(1000):
            add(queue, Job(user, cost=draw.randint(1, 50)))
    served: Counter[str] = Counter()
    for _ in range(1500):
        job = run_one(queue)
        served[job.user] += int(job.cost)
        assert max(served.values()) - min(served[user] for user in "abcde") <= 50


@pytest.mark.parametrize("stays", [False, True])
def test_a_pause_earns_nothing(stays: bool) -> None:
    """Whether a user was away, or had something running all the time but nothing waiting."""
    queue: FairQueue[Job] = FairQueue()
    add(queue, Job("back"))
    assert queue.pop() is not None
    if not stays:
        queue.leave("back", 0)
    for _ in range(500):
        add(queue, Job("busy", cost=10))
    for _ in range(200):
        run_one(queue)
    for _ in range(100):
        add(queue, Job("back", cost=10))
    taken = Counter(run_one(queue).user for _ in range(20))
    assert taken["back"] == pytest.approx(10, abs=2)


def test_to_leave_and_come_back_earns_nothing() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(500):
        add(queue, Job("stays", cost=10))
    taken: Counter[str] = Counter()
    add(queue, Job("comes and goes", cost=10))
    for _ in range(200):
        job = run_one(queue)
        taken[job.user] += 1
        if job.user == "comes and goes":
            add(queue, Job(job.user, cost=10))
    assert taken["comes and goes"] <= 101


def test_who_is_away_is_remembered_among_many() -> None:
    queue: FairQueue[Job] = FairQueue()
    add(queue, Job("stays"))
    much = add(queue, Job("much"))
    queue.serve("much", 0, 10_000)
    queue.remove(much, "much", 0)
    for number in range(5000):
        job = add(queue, Job(f"{number}"))
        queue.remove(job, job.user, 0)
    add(queue, Job("much"))
    add(queue, Job("new"))
    assert [run_one(queue).user for _ in range(3)] == ["stays", "new", "much"]


def test_who_goes_away_loses_the_place() -> None:
    queue: FairQueue[Job] = FairQueue()
    first, _ = add(queue, Job("first")), add(queue, Job("second"))
    queue.remove(first, "first", 0)
    add(queue, first)
    assert [run_one(queue).user for _ in range(2)] == ["second", "first"]


def test_who_was_served_much_is_reached_though_others_keep_coming() -> None:
    queue: FairQueue[Job] = FairQueue()
    add(queue, Job("much"))
    queue.serve("much", 0, 500)
    for number in range(2000):
        add(queue, Job(f"new {number}"))
        if run_one(queue).user == "much":
            return
    pytest.fail("starved")


@pytest.mark.parametrize("index", range(4))
def test_any_item_can_be_removed(index: int) -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [add(queue, Job(user)) for user in "aaba"]
    assert not queue.remove(Job("a"), "a", 0)
    assert not queue.remove(jobs[index], jobs[index].user, 1)
    assert not queue.remove(jobs[index], "nobody", 0)
    assert queue.remove(jobs[index], jobs[index].user, 0)
    assert not queue.remove(jobs[index], jobs[index].user, 0)
    rest = [job for job in jobs if job is not jobs[index]]
    assert len(queue) == 3
    assert set(queue) == set(rest)
    assert {run_one(queue) for _ in rest} == set(rest)
    assert len(queue) == 0


def test_an_item_that_cannot_be_added_leaves_nothing() -> None:
    queue: FairQueue[Job] = FairQueue()
    with pytest.raises(TypeError):
        queue.add(Job("a"), [], 0)  # type: ignore[arg-type]
    assert len(queue) == 0
    assert not queue._lines


def size(queue: FairQueue[Job]) -> int:
    return sum(
        len(line.waiting) + len(line.present) + len(line.served)
        + len(line._heap) + len(line._tickets)
        for line in queue._lines.values()
    )  # fmt: skip


def test_nothing_is_kept_of_users_who_left() -> None:
    queue: FairQueue[Job] = FairQueue()
    for number in range(100):
        add(queue, Job(f"user {number}", priority=number % 3))
    for _ in range(100):
        run_one(queue)
    assert not queue._lines


@pytest.mark.parametrize("how", ["served", "removed before its turn", "added again and again"])
def test_memory_does_not_grow_with_users_who_left(how: str) -> None:
    queue: FairQueue[Job] = FairQueue()
    add(queue, Job("always there"))
    assert queue.pop() is not None
    add(queue, Job("first", priority=1))
    add(queue, Job("waits", cost=0))
    for number in range(20_000):
        if how == "served":
            add(queue, Job(f"{number}", cost=100, priority=2))
            add(queue, Job(f"{number}", cost=100))
            run_one(queue)
            job = next(job for job in queue if job.user == f"{number}")
            queue.serve(job.user, 0, 100)
            queue.remove(job, job.user, 0)
        else:
            user = f"{number}" if how == "removed before its turn" else "same"
            job = add(queue, Job(user))
            assert queue.remove(job, user, 0)
        assert size(queue) < 10_000


class Queue(RuleBasedStateMachine):
    """Against a model that looks through all items for who is next."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Job] = FairQueue()
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.lines: dict[int, _Counts] = {}

    def users(self, priority: int) -> set[str]:
        return {job.user for job in self.waiting + self.running if job.priority == priority}

    @rule(user=st.sampled_from("abcd"), priority=st.integers(0, 1))
    def add(self, user: str, priority: int) -> None:
        self._start(user, priority)
        self.waiting.append(add(self.queue, Job(user, priority=priority)))

    @rule()
    def pop(self) -> None:
        head, job = self.queue.peek(), self.queue.pop()
        if not self.waiting:
            assert head is None
            assert job is None
            return
        assert job is not None
        assert head == (job, job.user, job.priority)
        assert job.priority == max(other.priority for other in self.waiting)
        line = [other for other in self.waiting if other.priority == job.priority]
        assert job is next(other for other in line if other.user == job.user)
        counts = self.lines[job.priority]
        assert counts.served[job.user] == min(counts.served[other.user] for other in line)
        counts.clock = max(counts.clock, counts.served[job.user])
        self.waiting.remove(job)
        self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 9))
    def serve(self, data: st.DataObject, num_tokens: int) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.queue.serve(job.user, job.priority, num_tokens)
        counts = self.lines[job.priority]
        counts.served[job.user] += num_tokens
        counts.clock += num_tokens / len(self.users(job.priority))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.running.remove(job)
        self.queue.leave(job.user, job.priority)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.running.remove(job)
        self.waiting.insert(0, job)
        self.queue.add(job, job.user, job.priority, front=True)
        self.queue.leave(job.user, job.priority)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(job)
        assert self.queue.remove(job, job.user, job.priority)

    @invariant()
    def agree(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue) == set(self.waiting)
        for priority in list(self.lines):
            if not self.users(priority):
                del self.lines[priority]

    def _start(self, user: str, priority: int) -> None:
        counts = self.lines.setdefault(priority, _Counts())
        if all(job.user != user for job in self.waiting if job.priority == priority):
            counts.served[user] = max(counts.served.get(user, 0.0), counts.clock)


@dataclass
class _Counts:
    served: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
