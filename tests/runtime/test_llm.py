"""The offline interface: users by name, mixtures, several answers, errors that cost nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import pytest
import torch

from fssa_runtime import LLM, AsyncEngine, Choice, SamplingParams
from fssa_runtime.conditioning import beliefs
from fssa_runtime.conditioning.embedding import embed_options
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.training.data import Message

from .conditioned import CHOICES, LATENT_DIM, random_conditioning, small_model

PROMPTS = ["Why?", "What is a cat?", "Tell me of the sea."]
GREEDY = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture
def llm(model: LanguageModel) -> LLM:
    made = LLM(model, random_conditioning(model, "gated"))
    for seed, name in enumerate(("ana", "ben")):
        generator = torch.Generator().manual_seed(seed)
        made.users.set_latent(name, torch.randn(LATENT_DIM, generator=generator))
    return made


def logprobs(llm: LLM, user: object, prompt: str = PROMPTS[0]) -> list[float]:
    (output,) = llm.generate([prompt], user, GREEDY, progress=False)  # type: ignore[arg-type]
    return output.answers[0].logprobs


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    people = ["ana", None, {"ana": 0.5, "ben": 0.5}]
    outputs = llm.generate(PROMPTS, people, GREEDY, progress=False)
    assert [output.prompt for output in outputs] == PROMPTS
    for output, user in zip(outputs, people, strict=True):
        (alone,) = llm.generate([output.prompt], [user], GREEDY, progress=False)
        assert alone == output
        assert output.text == llm.model.decode(output.answers[0].tokens)


def test_text_alone_is_a_list_of_one(llm: LLM) -> None:
    alone = llm.generate("Why?", "ana", GREEDY, progress=False)
    assert alone == llm.generate(["Why?"], ["ana"], GREEDY, progress=False)
    with pytest.raises(InputError, match="prompts: expected a list, got int"):
        llm.generate(5, progress=False)  # type: ignore[arg-type]


def test_a_bar_is_for_terminals_and_never_among_the_output(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate("Why?", "ana", GREEDY)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate("Why?", "ana", GREEDY)
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 prompts" in err


def test_what_a_prompt_may_be(llm: LLM) -> None:
    expected = llm.model.tokenizer("user: Why?\nassistant: ")["input_ids"]
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    for prompt in (
        "Why?",
        [{"role": "user", "content": "Why?"}],
        [("user", "Why?")],
        (Message("user", "Why?"),),
        [{"role": "user", "content": parts}],
    ):
        assert llm.request(prompt).prompt_tokens == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"role": "user", "content": "hi"}, "prompt: expected text or chat messages"),
        (["Hello", "World"], r"prompt: expected text or chat messages, got \['Hello', 'World'\]"),
        ([("user", "hi", "x")], "prompt: expected text or chat"),
        ([["user", "hi"]], "prompt: expected text or chat"),
        ([{"role": "user"}], "prompt: expected text or chat"),
        ([], r"prompt: expected text or chat messages, got \[\]"),
        (5, "prompt: expected text or chat messages, got 5"),
        (None, "prompt: expected text or chat"),
        ([{"role": "user", "content": None}], "prompt: message 0: content: expected .* got None"),
        ([{"role": 1, "content": "hi"}], "prompt: message 0: role: expected text, got 1"),
        (
            [("user", "hi"), {"role": "user", "content": [{"type": "image_url", "text": "hi"}]}],
            "prompt: message 1: content: expected text or parts of it, got",
        ),
        ([{"role": "user", "content": ["hi"]}], "prompt: message 0: content: expected"),
    ],
)
def test_a_prompt_of_another_shape_is_refused(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate([prompt], progress=False)  # type: ignore[list-item]


def test_what_a_chat_template_refuses_is_said(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must alternate') if messages[1] else messages[0].x.y }}"
    monkeypatch.setattr(llm.model.tokenizer, "chat_template", template)
    for turns, reason in ((2, "roles must alternate"), (1, "has no attribute 'x'")):
        with pytest.raises(InputError, match=f"chat template refuses it: .*{reason}"):
            llm.request([("user", "hi")] * turns)


def test_a_mixture_goes_from_nobody_through_one_to_the_other(llm: LLM) -> None:
    assert logprobs(llm, {"ana": 1.0}) == logprobs(llm, "ana")
    nothing = llm.generate([PROMPTS[0]], [{"ana": 0.0}], GREEDY, progress=False)[0].answers[0]
    nobody = llm.generate([PROMPTS[0]], None, GREEDY, progress=False)[0].answers[0]
    assert nothing == nobody
    weights = llm.users.weights({"ana": 0.7, "ben": 0.3})
    assert weights is not None
    assert llm.conditioning is not None
    z = 0.7 * llm.users["ana"].latent + 0.3 * llm.users["ben"].latent
    torch.testing.assert_close(weights.make_row(), llm.conditioning.row(z))
    assert weights.fingerprint != llm.users["ana"].weights.fingerprint


def test_a_user_is_inferred_learns_and_is_forgotten(llm: LLM) -> None:
    first = llm.users.infer("cy", CHOICES[:1])
    told = logprobs(llm, "cy")
    more = llm.users.add_choices("cy", CHOICES[1:])
    assert more.choices == CHOICES
    assert more.weights.fingerprint != first.weights.fingerprint
    assert logprobs(llm, "cy") != told
    assert logprobs(llm, first.weights) == told  # who holds the old weights keeps them
    at_once = llm.users.infer("dan", CHOICES)
    torch.testing.assert_close(at_once.latent, more.latent)
    assert more.belief is not None
    assert more.belief.count == 3
    assert list(llm.users) == ["ana", "ben", "cy", "dan"]
    llm.users.delete("cy")
    assert "cy" not in llm.users
    with pytest.raises(InputError, match="user 'cy' is not known"):
        logprobs(llm, "cy")


def rows_in_use(llm: LLM) -> int:
    """Rows of the table that hold numbers; a freed one is NaN."""
    assert llm.engine.slots is not None
    return int((~llm.engine.slots._table.rows[1:].isnan()).any(1).sum())


def test_no_row_of_a_deleted_user_is_left(llm: LLM) -> None:
    logprobs(llm, "ben")
    llm.users.infer("cy", CHOICES[:1])
    logprobs(llm, "cy")
    llm.users.add_choices("cy", CHOICES[1:])
    logprobs(llm, "cy")
    llm.users.set_latent("cy", llm.users["cy"].latent)  # no change: the row stays
    assert rows_in_use(llm) == 2
    llm.users.delete("cy")
    assert rows_in_use(llm) == 1  # ben's


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_the_row_of_a_deleted_user_goes_with_their_last_request(
    llm: LLM, steps_before: int
) -> None:
    llm.engine.debug = True
    for max_tokens in (2, 5):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        last = llm.engine.add(llm.request("Why?", "ana", sampling))
    for _ in range(steps_before):
        llm.engine.step()
    llm.users.delete("ana")
    while last in llm.engine:
        llm.engine.step()
        assert rows_in_use(llm) == (last in llm.engine)


def test_a_choice_may_be_a_mapping(llm: LLM) -> None:
    """What is learnt is in its values: its keys are words, too, and the same for everybody."""
    named = llm.users.infer("cy", [choice._asdict() for choice in CHOICES])
    assert named.choices == CHOICES
    assert torch.equal(named.latent, llm.users.infer("dan", CHOICES).latent)


def test_a_new_choice_is_all_that_is_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.users.infer("cy", CHOICES[:2])
    read: list[int] = []
    original = beliefs.embedding_steps

    def counted(model: object, config: object, options: list, max_tokens: int) -> object:
        read.append(len(options))
        return original(model, config, options, max_tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(beliefs, "embedding_steps", counted)
    llm.users.add_choices("cy", CHOICES[2:])
    assert read == [2]  # the chosen and the rejected text of one choice
    # A latent that was given is replaced by what is chosen from then on.
    llm.users.set_latent("cy", torch.ones(LATENT_DIM))
    assert llm.users["cy"].belief is None
    again = llm.users.add_choices("cy", CHOICES[2:])
    torch.testing.assert_close(again.latent, llm.users.infer("dan", CHOICES[2:]).latent)


def test_several_answers(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=1)
    (output,) = llm.generate([PROMPTS[0]], "ana", params, n=3, progress=False)
    assert len(output.answers) == 3
    assert len({answer.text for answer in output.answers}) > 1
    (single,) = llm.generate([PROMPTS[0]], "ana", params, progress=False)
    assert single.answers[0] == output.answers[0]


def test_what_a_prompt_took_is_said(llm: LLM) -> None:
    """As many tokens as it has, and how many of them were found in the cache."""
    prompt = "Why? " * 20
    num_tokens = len(llm.model.chat_tokens(prompt))
    found = []
    for user in ("ana", "ana", "ben"):
        (output,) = llm.generate([prompt], user, GREEDY, n=2, progress=False)
        assert [answer.num_prompt_tokens for answer in output.answers] == [num_tokens] * 2
        found.append([answer.num_cached_tokens for answer in output.answers])
    whole_pages = (num_tokens - 1) // 16 * 16
    assert found == [[0, 0], [whole_pages] * 2, [0, 0]]


def test_sampling_for_each_prompt(llm: LLM) -> None:
    lengths = [2, 4, 3]
    outputs = llm.generate(
        PROMPTS, "ben", [SamplingParams(max_tokens=n) for n in lengths], progress=False
    )
    assert [len(output.answers[0].tokens) for output in outputs] == lengths


def test_what_a_model_recommends_refuses_no_prompt(model: LanguageModel) -> None:
    """Its length is shortened to the room there is; one that was asked for is not."""
    recommended = SamplingParams(max_tokens=480, ignore_eos=True)
    for limits, room in (({}, 512), ({"max_kv_tokens": 160}, 161)):
        llm = LLM(dataclasses.replace(model, default_sampling=recommended), **limits)
        prompt = "x" * 100
        num_tokens = len(llm.request(prompt).prompt_tokens)
        (output,) = llm.generate([prompt], progress=False)
        assert len(output.answers[0].tokens) == min(480, room - num_tokens)
        with pytest.raises(InputError, match="prompt and answer need"):
            llm.generate([prompt], sampling=recommended, progress=False)
        with pytest.raises(InputError, match="prompt and answer need"):
            llm.generate(["x" * 600], progress=False)  # not one token fits
    assert llm.request("Why?").sampling.max_tokens == 161 - len(b"user: Why?\nassistant: ")


def test_one_may_be_preferred_to_several(llm: LLM) -> None:
    """By hand from the encoder: h1 is averaged over what was rejected in a choice."""
    several = [
        CHOICES[0],
        Choice("And a dog?", "Loyal.", ["A dog is a dog.", "Woof, woof, woof."]),
        ("Why?", "Because.", ("No.", "There are reasons.", "Who knows.")),
    ]
    known = llm.users.infer("cy", several)
    assert llm.conditioning is not None
    encoder = llm.conditioning.encoder
    encoded = []
    for prompt, chosen, rejected in several:
        others = [rejected] if isinstance(rejected, str) else rejected
        options = embed_options(
            llm.model, llm.conditioning.embedding, [(prompt, text) for text in (chosen, *others)]
        )
        taken, *passed_over = encoder.scaler(options)
        pairs = torch.stack([torch.cat([taken, option]) for option in passed_over])
        encoded.append(encoder.h1(pairs).mean(0))
    count = torch.tensor([4.0]).log()
    z = encoder.h2(torch.cat([torch.stack(encoded).mean(0), count]))
    torch.testing.assert_close(known.latent, z, atol=1e-5, rtol=1e-4)
    in_turn = [llm.users.infer("dan", several[:1]), llm.users.add_choices("dan", several[1:])]
    torch.testing.assert_close(in_turn[-1].latent, known.latent)
    torch.testing.assert_close(llm.conditioning.infer(llm.model, known.choices), known.latent)
    assert not torch.equal(in_turn[0].latent, known.latent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(users="eve"), "user 'eve' is not known"),
        (dict(users={"ana": 0.5, "eve": 0.5}), "user 'eve' is not known"),
        (dict(users={}), "expected at least one, got none"),
        (dict(users={"ana": float("nan")}), "share of a user: expected a finite number"),
        (dict(users=["ana"]), "users: expected one for all or 3"),
        (dict(users=["ana", 5, None]), "user: expected a name, .* got int"),
        (dict(sampling=[GREEDY, 5, None]), "sampling: expected SamplingParams or None, got int"),
        (dict(sampling=[GREEDY]), "sampling: expected one for all or 3"),
        (dict(n=0), "n must be at least 1"),
        (dict(sampling=SamplingParams(max_tokens=600)), "request 0: prompt and answer need"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_runs(
    llm: LLM, arguments: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(PROMPTS, **arguments, progress=False)
    assert len(llm.engine) == 0
    assert logprobs(llm, "ana")


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("", CHOICES, "a user needs a name"),
        (7, CHOICES, "a user's name: expected text, got int"),
        ("eve", [("Why?", "Because.", "Because.")], "choice 0: chosen and rejected are the same"),
        ("eve", [CHOICES[0], ("Why?", "Because.")], "choice 1: expected .prompt, chosen, rejected"),
        ("eve", [7], "choice 0: expected"),
        ("eve", [("Why?", "Because.", " ")], "choice 0: expected words as rejected, got ' '"),
        ("eve", [("Why?", "Because.", [])], "choice 0: expected at least one rejected answer"),
        ("eve", [("Why?", "Yes.", ["No.", "Yes."])], "choice 0: chosen and rejected are the same"),
        ("eve", [("Why?", "Yes.", ["No.", "No."])], "choice 0: an answer was rejected twice"),
        ("eve", [("Why?", "Yes.", ["No.", ""])], "choice 0: expected words as rejected, got ''"),
        ("eve", [("Why?", "Yes.", None)], "choice 0: rejected: expected text or chat messages"),
        ("eve", [("Why?", None, "No.")], "choice 0: chosen: expected text or chat messages"),
        ("eve", [{"prompt": "Why?", "chosen": "a"}], "choice 0: expected .prompt, chosen, rej"),
        ("eve", [("Why?", "Because.", "why " * 20000)], "an option has .* tokens, the model holds"),
    ],
)
def test_bad_choices_store_nothing(llm: LLM, name: str, choices: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.users.infer(name, choices)
    assert name not in llm.users


def test_a_latent_is_kept_as_it_was_given(llm: LLM) -> None:
    """A user's own weights and their part of a mixture come from the same latent."""
    given = torch.ones(LATENT_DIM, dtype=torch.float64, requires_grad=True)
    kept = llm.users.set_latent("cy", given)
    with torch.no_grad():
        given.mul_(-3)
    assert torch.equal(kept.latent, torch.ones(LATENT_DIM))
    assert not kept.latent.requires_grad
    assert logprobs(llm, "cy") == logprobs(llm, {"cy": 1.0})


@pytest.mark.parametrize(
    ("name", "latent", "message"),
    [
        ("", torch.zeros(LATENT_DIM), "a user needs a name, got an empty one"),
        (7, torch.zeros(LATENT_DIM), "a user's name: expected text, got int"),
        ("eve", [0.0] * LATENT_DIM, r"latent: expected a tensor \[5\], got list"),
        ("eve", torch.zeros(LATENT_DIM + 1), r"latent: expected shape \[5\], got \[6\]"),
    ],
)
def test_bad_latents_store_nothing(llm: LLM, name: str, latent: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.users.set_latent(name, latent)
    assert list(llm.users) == ["ana", "ben"]


def test_one_thread_at_a_time(llm: LLM) -> None:
    requests = [llm.request(prompt, "ana", GREEDY) for prompt in PROMPTS]
    expected = llm.run(requests)
    inside, go_on = threading.Event(), threading.Event()
    got = []

    def wait(_request: int, _token: int) -> None:
        inside.set()
        go_on.wait(60)

    thread = threading.Thread(target=lambda: got.extend(llm.run(requests, on_token=wait)))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(InputError, match="another call runs this engine"):
            llm.generate(["Why?"], "ben", GREEDY, progress=False)
        with pytest.raises(InputError, match="a call of generate runs this model's engine"):
            AsyncEngine(llm)
        assert len(llm.engine) == len(PROMPTS)
    finally:
        go_on.set()
        thread.join(60)
    assert got == expected
    assert llm.run(requests) == expected


def test_its_threads_are_set_before_a_step_is_recorded(model: LanguageModel) -> None:
    before = torch.get_num_threads()
    try:
        assert LLM(model, threads=2).generate(["Why?"], sampling=GREEDY, progress=False)
        assert torch.get_num_threads() == 2
        with pytest.raises(InputError, match="threads: expected at least 1, got 0"):
            LLM(model, threads=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", 5, "model: expected a name, a folder or a LanguageModel, got int"),
        ("device", "gpu", "device: expected 'cpu' or 'cuda', got 'gpu'"),
        ("max_batch_size", 0, "max_batch_size: expected at least 1, got 0"),
        ("max_batch_size", 2.5, "max_batch_size must be an integer, got float"),
        ("max_batch_tokens", None, "max_batch_tokens must be an integer, got NoneType"),
        ("max_kv_tokens", 0, "max_kv_tokens: expected at least 1, got 0"),
        ("max_resident_users", "x", "max_resident_users must be an integer, got str"),
        ("max_resident_users", -5, "max_resident_users: expected at least 1, got -5"),
    ],
)
def test_wrong_arguments_are_named(
    model: LanguageModel, argument: str, value: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LLM(**{"model": str(model.folder), argument: value})  # type: ignore[arg-type]


def test_a_folder_may_be_a_path(model: LanguageModel) -> None:
    assert LLM(model.folder).model.fingerprint == model.fingerprint


def test_without_a_conditioning_nobody_can_be_steered(model: LanguageModel) -> None:
    plain = LLM(model)
    assert plain.generate(["Why?"], sampling=GREEDY, progress=False)[0].answers
    with pytest.raises(InputError, match="nobody can be steered"):
        plain.users.infer("ana", [Choice("a", "b", "c")])


def test_the_package_loads_nothing_heavy_before_it_is_asked_to() -> None:
    code = (
        "import sys, fssa_runtime; assert 'torch' not in sys.modules; "
        "fssa_runtime.LLM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
