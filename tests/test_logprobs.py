"""Log-probabilities of the tokens of an answer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.errors import PromptError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import SamplingOptions

SHAPES = str(Path(__file__).parent.parent / "examples" / "shapes.png")
CAPTION = "caption en"
GREEDY = SamplingOptions(logprobs=0)
SAMPLED = SamplingOptions(
    logprobs=3, temperature=1.5, top_k=5, seed=1, repetition_penalty=1.3, max_tokens=8
)


@pytest.fixture(scope="module")
def pico() -> Iterator[VLM]:
    with edgevlm.load() as vlm:
        yield vlm


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_they_add_up_to_the_score_of_the_answer(pico: VLM, options: SamplingOptions) -> None:
    reply = pico.ask(CAPTION, SHAPES, **options)
    assert [t.token_id for t in reply.logprobs] == list(reply.token_ids)
    assert b"".join(t.data for t in reply.logprobs).decode() == reply.text
    ids = pico.engines.tokenize(reply.text)
    if ids == list(reply.token_ids):  # what is sampled may be spelled in other tokens
        (score,) = pico.score(CAPTION, [reply.text], SHAPES)
        assert sum(t.logprob for t in reply.logprobs) == pytest.approx(score, abs=1e-3)
    else:
        assert options is SAMPLED


def test_the_likeliest_tokens_come_first(pico: VLM) -> None:
    reply = pico.ask(CAPTION, SHAPES, logprobs=4)
    for token in reply.logprobs:
        values = [other.logprob for other in token.top]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        # A greedy answer is the likeliest token each time.
        assert (token.top[0].token_id, token.top[0].logprob) == (token.token_id, token.logprob)
        assert sum(np.exp(values)) <= 1 and not any(other.top for other in token.top)


def test_pieces_bring_those_of_their_tokens(pico: VLM) -> None:
    answer = pico.stream(CAPTION, SHAPES, logprobs=1)
    pieces = list(answer)
    assert sum((p.logprobs for p in pieces), ()) == answer.reply.logprobs
    assert all(len(p.logprobs) == len(p.token_ids) for p in pieces)


def test_there_are_none_unless_asked_for(pico: VLM) -> None:
    assert pico.ask(CAPTION, SHAPES).logprobs == ()
    assert not any(piece.logprobs for piece in pico.stream(CAPTION, SHAPES))


def test_the_numbers_are_of_the_full_softmax_in_float64() -> None:
    (first, *_) = fakes.vlm("é").ask("x", logprobs=2).logprobs
    # The fake's logits are ten for its answer and zero for 257 other tokens.
    assert first.logprob == pytest.approx(10 - np.log(np.exp(10.0) + 257), abs=1e-12)
    assert (first.text, first.data) == ("�", "é".encode()[:1])
    assert [t.token_id for t in first.top] == [first.token_id, 0]  # the lower id of equal ones


@pytest.mark.parametrize("n", [-1, 21, 1.5])
def test_other_numbers_are_refused(n: int) -> None:
    with pytest.raises(PromptError, match="logprobs must be from 0 to 20"):
        fakes.vlm().ask("x", logprobs=n)
