"""Whatever happens around it, a request gets what it would get alone: to the bit, on a CPU.

Users' weights are mutually orthogonal, so that another user's weights or cached keys cannot go
unnoticed; answers are compared by log-probabilities, since a wrong user's text may look the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from fssa_runtime.conditioning.table import ModulationTable
from fssa_runtime.conditioning.user_weights import UserWeights
from fssa_runtime.engine.engine import Engine
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import PromptToken, Request, SamplingParams, Token

from .conditioned import random_conditioning, small_model

NUM_USERS = 64
Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("isolation") / "model")


class World:
    """Users of a small model, and engines that serve them."""

    def __init__(self, model: LanguageModel, family: str = "gated-wide", seed: int = 0) -> None:
        self.model = model
        self.modulator = random_conditioning(model, family, seed=seed).modulator
        width = self.modulator.layout.width
        generator = torch.Generator().manual_seed(seed)
        # Twice as many: those whom users change into.
        basis = torch.linalg.qr(torch.randn(width, 2 * NUM_USERS, generator=generator)).Q.T
        rows = self.modulator.layout.identity() + 6.0 * basis
        self.rows = [UserWeights.of_row(row) for row in rows]

    def engine(self, **settings: object) -> Engine:
        limits: dict = {"max_batch_size": 6, "max_kv_tokens": 96, "page_size": 4, **settings}
        slots = limits.pop("slots", 6)
        table = ModulationTable(self.modulator.layout, slots)
        nobody = torch.zeros(0, dtype=torch.int32)
        modulation = self.modulator.bind(table.rows, nobody, dtype=self.model.decoder.dtype)
        return Engine(
            self.model.decoder,
            frozenset({257}),
            modulation,
            table,
            tokenizer=self.model.copy_tokenizer(),
            debug=True,
            **limits,
        )


@dataclass
class Heard:
    """What came of a request so far."""

    request: Request
    answers: dict[int, Answer] = field(default_factory=dict)
    tops: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    prompt: list[PromptToken] | None = None
    ended: dict[int, str] = field(default_factory=dict)

    def hear(self, event: Token) -> None:
        tokens, logprobs = self.answers.setdefault(event.answer, ([], []))
        if event.token >= 0:
            tokens.append(event.token)
            logprobs.append(event.logprob)
        if event.top is not None:
            self.tops.setdefault(event.answer, []).append(event.top)
        if event.prompt is not None:
            self.prompt = event.prompt
        self.texts[event.answer] = self.texts.get(event.answer, "") + event.text
        if event.finish_reason is not None:
            self.ended[event.answer] = event.finish_reason


def run_alone(engine: Engine, request: Request) -> Heard:
    heard = Heard(request)
    engine.add(request)
    while len(engine):
        for event in engine.step():
            heard.hear(event)
    return heard


def any_request(world: World, people: list[UserWeights | None], draw: random.Random) -> Request:
    # Few different beginnings, so that prompts of several users agree for some pages.
    start = [draw.randrange(3)] * draw.choice([0, 4, 9, 16])
    prompt = start + [draw.randrange(256) for _ in range(draw.randint(1, 9))]
    wishes: dict = draw.choice(
        [
            {},
            {},
            {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.2},
            {"logit_bias": {draw.randrange(256): 9.0, draw.randrange(256): -9.0}},
            {"stop": [chr(draw.randrange(97, 123))], "top_logprobs": 3},
            {"stop_token_ids": list(range(0, 256, 16)), "min_tokens": 1, "prompt_logprobs": 1},
            {"regex": "[a-z]{2}( [0-9]{1,4})*"},
        ]
    )
    return Request(
        prompt,
        draw.choice(people),
        SamplingParams(
            max_tokens=draw.randint(1, 16),
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.randrange(1000),
            **wishes,
        ),
        n=draw.choice([1, 1, 1, 3]),
        priority=draw.choice([0, 0, 1]),
        timeout=draw.choice([None, None, None, 40.0]),
    )


def test_users_are_orthogonal_and_far_from_the_base(model: LanguageModel) -> None:
    world = World(model)
    rows = torch.stack([user.make_row() for user in world.rows[:NUM_USERS]])
    moved = rows - world.modulator.layout.identity()
    gram = moved @ moved.T
    assert torch.allclose(gram, 36.0 * torch.eye(NUM_USERS), atol=1e-3)
    alone = world.engine()
    prompt, forced = list(range(20)), list(range(30, 40))
    scores = [
        torch.tensor(alone.generate([Request(prompt, user, forced_tokens=forced)])[0].logprobs)
        for user in (None, *world.rows[:8])
    ]
    for first in range(len(scores)):
        for second in range(first):
            assert (scores[first] - scores[second]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gated-wide", "mixed"])
def test_canaries(family: str, model: LanguageModel) -> None:
    """Thousands of random steps: add, abort, preempt, expire, change, delete, start anew."""
    world = World(model, family)
    num_steps = 4_000 if family == "gated-wide" else 1_000
    draw = random.Random(1)
    now = [0.0]
    spare = list(world.rows[NUM_USERS:])
    people: list[UserWeights | None] = [None, *world.rows[:NUM_USERS]]
    crowd = world.engine(clock=lambda: now[0])
    heard: dict[int, Heard] = {}
    finished: list[Heard] = []
    preempted: dict[int, int] = {}
    counts = {"abort": 0, "changed": 0, "deleted": 0, "reload": 0, "deadline": 0, "preempted": 0}
    for _ in range(num_steps):
        now[0] += 1.0
        while len(crowd) < 12 and draw.random() < 0.7:
            request = any_request(world, people, draw)
            heard[crowd.add(request)] = Heard(request)
        if draw.random() < 0.02 and heard:
            number = draw.choice(list(heard))
            assert crowd.abort(number)
            del heard[number]
            counts["abort"] += 1
        if draw.random() < 0.05:
            # A user's latent changes while requests of theirs may be running.
            index = draw.randrange(1, len(people))
            people[index], spare[0] = spare[0], people[index]  # type: ignore[call-overload]
            draw.shuffle(spare)
            counts["changed"] += 1
        if draw.random() < 0.02:
            user = people[draw.randrange(1, len(people))]
            assert user is not None
            crowd.forget(user)
            counts["deleted"] += 1
        if draw.random() < 0.005:
            # As after loading other weights: nothing that was computed may be used again.
            crowd.scheduler.pool.forget_all()
            counts["reload"] += 1
        for event in crowd.step():
            told = heard[event.request]
            told.hear(event)
            if len(told.ended) == told.request.n or event.finish_reason == "deadline":
                counts["deadline"] += event.finish_reason == "deadline"
                if len(told.ended) == told.request.n:
                    finished.append(told)
                    del heard[event.request]
        for stream in crowd.scheduler.waiting:
            preempted[stream.order] = stream.num_preempted
    counts["preempted"] = sum(preempted.values())
    assert min(counts.values()) > 0, counts
    assert counts["preempted"] > num_steps / 200
    assert len(finished) > num_steps / 20
    alone = world.engine(prefix_cache=False, max_kv_tokens=400)
    for told in finished:
        request = told.request
        expected = run_alone(
            alone, Request(request.prompt_tokens, request.user, request.sampling, n=request.n)
        )
        for index, (tokens, logprobs) in told.answers.items():
            right_tokens, right_logprobs = expected.answers[index]
            count = len(tokens)
            if told.ended[index] != "deadline":
                assert count == len(right_tokens)
                assert told.ended[index] == expected.ended[index]
                assert told.texts[index] == expected.texts[index]
            assert tokens == right_tokens[:count]
            assert logprobs == right_logprobs[:count]  # the same bits
            assert told.tops.get(index, []) == expected.tops.get(index, [])[:count]
            if count:
                assert told.prompt == expected.prompt


def cached_tokens(engine: Engine, request: Request) -> tuple[int, Heard]:
    """(tokens of the prompt that were not computed, what came of it)."""
    before = engine.scheduler.pool.stats.found
    heard = run_alone(engine, request)
    return engine.scheduler.pool.stats.found - before, heard


def test_cached_keys_belong_to_the_weights_that_made_them(model: LanguageModel) -> None:
    world = World(model)
    engine, fresh = world.engine(), world.engine(prefix_cache=False)
    prompt = list(range(50, 71))  # five pages of four and one token
    ana, ben, changed = world.rows[:3]
    sampling = SamplingParams(max_tokens=5)

    def ask(user: UserWeights | None) -> int:
        request = Request(prompt, user, sampling)
        found, heard = cached_tokens(engine, request)
        assert heard.answers == run_alone(fresh, request).answers
        return found

    assert ask(ana) == 0
    assert ask(ben) == 0  # the same prompt, another user
    assert ask(None) == 0
    assert ask(ana) == 20
    assert ask(ben) == 20
    assert ask(changed) == 0  # ana, after an update
    # The same numbers under another name are the same user.
    assert ask(UserWeights.of_row(ana.make_row())) == 20


def test_another_user_s_keys_would_be_noticed(model: LanguageModel) -> None:
    """The check above can fail: keys found by tokens alone give other log-probabilities."""
    world = World(model)
    engine, fresh = world.engine(), world.engine(prefix_cache=False)
    prompt, sampling = list(range(50, 71)), SamplingParams(max_tokens=5)
    ana, ben = world.rows[:2]
    run_alone(engine, Request(prompt, ana, sampling))
    forged = UserWeights(ana.fingerprint, ben.make_row)
    assert engine.slots is not None
    engine.slots.forget(ana)
    found, heard = cached_tokens(engine, Request(prompt, forged, sampling))
    assert found == 20
    assert heard.answers != run_alone(fresh, Request(prompt, ben, sampling)).answers


def test_answers_to_one_prompt_share_its_pages(model: LanguageModel) -> None:
    world = World(model)
    engine = world.engine(prefix_cache=False)
    request = Request(
        list(range(18)), world.rows[0], SamplingParams(max_tokens=6, temperature=1.0, seed=3), n=4
    )
    heard = Heard(request)
    engine.add(request)
    most = 0
    while len(engine):
        for event in engine.step():
            heard.hear(event)
        running = engine.scheduler.running
        most = max(most, len({page for stream in running for page in stream.pages}))
    assert len(heard.answers) == 4
    assert len({tuple(tokens) for tokens, _ in heard.answers.values()}) > 1
    # Four full pages once; of the fifth, half full, and the sixth, one for each.
    assert most <= 4 + 4 * 2
    alone = world.engine(prefix_cache=False)
    assert run_alone(alone, request).answers == heard.answers


def test_more_users_than_slots(model: LanguageModel) -> None:
    world = World(model)
    engine = world.engine(slots=6)
    requests = [Request([5, 6, 7], user, SamplingParams(max_tokens=3)) for user in world.rows[:40]]
    expected = [world.engine().generate([request])[0] for request in requests]
    for _ in range(2):
        assert engine.generate(requests) == expected
    assert engine.slots is not None
    assert engine.slots.stats.filled == 80
    again = engine.generate([requests[-1]])
    assert again == [expected[-1]]
    assert engine.slots.stats.filled == 80


def test_a_tenant_has_one_turn_whosever_weights_it_asks_for(model: LanguageModel) -> None:
    world = World(model)
    sampling = SamplingParams(max_tokens=2)

    def ended_before_the_light_one(**tenants: str) -> int:
        engine = world.engine()
        heavy = tenants.get("heavy")
        for user in world.rows[:60]:
            engine.add(Request([5, 6, 7], user, sampling, tenant=heavy))
        engine.step()
        light = engine.add(Request([5, 6, 7], world.rows[0], sampling, tenant=tenants.get("light")))
        while light in engine:
            engine.step()
        ended = 61 - len(engine)
        while len(engine):
            engine.step()
        return ended

    # Everybody who has weights of their own has a turn: who comes last waits for all.
    assert ended_before_the_light_one() > 40
    assert ended_before_the_light_one(heavy="heavy", light="light") < 20


def test_a_table_too_small_for_a_batch_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="has 3 slots, a batch of 6 may have as many users"):
        World(model).engine(slots=3)
