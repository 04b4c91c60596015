"""Conversations: what was read and drawn before is not read again, and answers are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm import Message, disk_cache
from edgevlm.errors import ContextOverflow, PromptError
from edgevlm.export import export_bundle
from edgevlm.runtimes import prefixes
from edgevlm.runtimes.engines import Block, BlockAttention, Float, following, sequential
from edgevlm.runtimes.llama.cached_rows import CachedRows
from edgevlm.runtimes.messages import ImagePart, TextPart
from edgevlm.types import Reply
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.llava_next import write_next
from tests.checkpoints.llava_onevision import write_onevision
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv

pytestmark = pytest.mark.usefixtures("children_inside")

A, B = np.random.default_rng(3).integers(0, 256, (2, 50, 90, 3), np.uint8)
CAUSAL: dict[str, Callable[[Path], Path]] = {
    "llava": write_llava,
    "smolvlm": write_smolvlm,
    "internvl": write_internvl,
    "deepseek-vl": write_deepseek_vl,
    "llava-next": write_next,
    "onevision": write_onevision,
    "tinygptv": partial(write_tinygptv, stage=4),
}
# Their originals tokenize an answer anew with its neighbours: noise may come out otherwise.
REREAD = ("onevision", "tinygptv")
QUESTIONS = ("what is it?", "and where is that?", "is it red?")
EMBEDDINGS = np.random.default_rng(0).standard_normal((100, 4), np.float32)


def exported(write: Callable[[Path], Path], folder: Path, quant: str) -> Path:
    source, out = write(folder / "source"), folder / "out"
    return export_bundle(source, out, quant=quant, vision_precision="fp32", verify=False).folder


@pytest.mark.parametrize("name", CAUSAL)
def test_a_conversation_reads_only_what_is_new_and_answers_as_a_fresh_one(
    name: str, tmp_path: Path
) -> None:
    folder = exported(CAUSAL[name], tmp_path, "f32")
    with (
        edgevlm.load(folder, cache=False) as vlm,
        vlm.chat(A) as chat,
        edgevlm.load(folder, cache=False) as fresh,
    ):
        said: list[Message] = []
        for question in QUESTIONS:
            before = chat.reply if chat.turns else None
            reply = chat.ask(question, max_tokens=4)
            image = {"type": "image", "image": A}
            text = {"type": "text", "text": question}
            said.append({"role": "user", "content": [text] if said else [image, text]})  # type: ignore[list-item]
            if before:
                # All but the last token, which nothing was drawn after.
                least = before.tokens.prompt + before.tokens.generated - 1
                assert reply.tokens.kept >= (reply.tokens.image if name in REREAD else least)
                assert reply.tokens.kept < reply.tokens.prompt
            fresh.forget()
            again = fresh.ask(said, max_tokens=4)
            assert again.tokens.kept == 0 and again.tokens.prompt == reply.tokens.prompt
            assert again.token_ids == reply.token_ids
            said.append({"role": "assistant", "content": reply})


def test_pictures_in_later_questions_go_on_from_the_answers_before(tmp_path: Path) -> None:
    folder = exported(write_smolvlm, tmp_path, "f32")

    def question(text: str, image: np.ndarray) -> Message:
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return {"role": "user", "content": content}  # type: ignore[typeddict-item]

    with edgevlm.load(folder, cache=False) as vlm:
        first = [question("what is it?", A)]
        reply = vlm.ask(first, max_tokens=4)
        both = [*first, {"role": "assistant", "content": reply}, question("and this?", B)]
        second = vlm.ask(both, max_tokens=4)  # type: ignore[arg-type]
        assert second.tokens.kept >= reply.tokens.prompt + reply.tokens.generated - 1
        vlm.forget()
        assert vlm.ask(both, max_tokens=4).token_ids == second.token_ids  # type: ignore[arg-type]


def picture(image: np.ndarray) -> ImagePart:
    return {"type": "image", "image": image}


@pytest.mark.parametrize("name", ["internvl", "onevision"])
def test_a_chat_with_pictures_in_any_turn_answers_as_a_fresh_one(name: str, tmp_path: Path) -> None:
    folder = exported(CAUSAL[name], tmp_path, "f32")
    fresh = edgevlm.load(folder, cache=False)
    with fresh, edgevlm.load(folder, cache=False) as vlm:
        chat = vlm.chat(A, system="Be brief.")
        said: list[Message] = [{"role": "system", "content": "Be brief."}]

        def asked(question: str, *images: np.ndarray) -> Message:
            words: TextPart = {"type": "text", "text": question}
            content: list[TextPart | ImagePart] = [*map(picture, images), words]
            return {"role": "user", "content": content}

        def check(question: str, reply: Reply, *images: np.ndarray) -> None:
            """Compares an answer with that of a model that reads all of it anew."""
            said.append(asked(question, *images))
            fresh.forget()
            again = fresh.ask(said, max_tokens=4)
            assert again.tokens.kept == 0 and again.tokens.prompt == reply.tokens.prompt
            assert again.token_ids == reply.token_ids
            said.append({"role": "assistant", "content": reply})

        check("one?", chat.ask("one?", max_tokens=4), A)
        chat.add_image(B)
        assert len(chat.pictures) == 2 and chat.takes_more_images
        check("two?", chat.ask("two?", max_tokens=4), B)
        # Taken back, with its picture, and asked otherwise.
        assert chat.undo() == "two?"
        del said[-2:]
        check("three?", chat.ask("three?", max_tokens=4), B)
        # Again, in place of the last.
        before = chat.reply
        again = chat.retry(max_tokens=4).finish()
        assert again.token_ids == before.token_ids and len(chat.turns) == 2
        assert again.tokens.prompt == before.tokens.prompt
        # What turns out to be too large, or nothing was asked about for another reason, can go.
        chat.add_image([A, B])
        assert len(chat.pictures) == 4
        chat.next_image = A
        assert chat.next_image is A and len(chat.pictures) == 3
        chat.next_image = None
        check("four?", chat.ask("four?", max_tokens=4))
        chat.save(tmp_path / "saved")
        del said[-2:]
        chat.undo()
        resumed = vlm.chat()
        resumed.load(tmp_path / "saved")
        assert [q for q, _ in resumed.turns] == ["one?", "three?", "four?"]
        assert resumed.undo() == "four?"
        check("four?", resumed.ask("four?", max_tokens=4))


def test_what_is_taken_back_is_not_read_by_the_next_question(tmp_path: Path) -> None:
    """LLaVA's shape, whose picture comes with the first question."""
    folder = exported(write_llava, tmp_path, "f32")
    with edgevlm.load(folder, cache=False) as vlm, vlm.chat(A) as chat:
        first = chat.ask("one?", max_tokens=4)
        chat.ask("two?", max_tokens=4)
        assert (chat.undo(), chat.undo(), chat.begun) == ("two?", "one?", False)
        again = chat.ask("one?", max_tokens=4)
        assert (again.token_ids, again.tokens.prompt) == (first.token_ids, first.tokens.prompt)
        assert not chat.takes_more_images
        for show in (chat.add_image, partial(setattr, chat, "next_image")):
            with pytest.raises(PromptError, match="first question only; set `image`"):
                show(B)
        chat.image = B
        assert chat.turns and not chat.begun and chat.ask("x", max_tokens=1).tokens.image
        with pytest.raises(ContextOverflow):
            chat.ask("x" * 10_000)
        assert [question for question, _ in chat.turns] == ["one?", "x"]


@pytest.mark.parametrize("repack", [False, True, "decode"])
def test_answers_are_kept_whatever_order_the_weights_are_in(
    repack: edgevlm.types.Repacking | bool, tmp_path: Path
) -> None:
    folder = exported(write_llava, tmp_path, "q4_0")
    with edgevlm.load(folder, cache=False, repack=repack) as vlm, vlm.chat(A) as chat:
        first = chat.ask("what is it?", max_tokens=6)
        second = chat.ask("and where?", max_tokens=6)
        assert second.tokens.kept >= first.tokens.prompt + first.tokens.generated - 1


def test_a_longer_context_holds_what_the_shorter_one_held(tmp_path: Path) -> None:
    folder = exported(write_llava, tmp_path, "q8_0")
    with edgevlm.load(folder, cache=False) as vlm, vlm.chat(A) as chat:
        first = chat.ask("what is it?", max_tokens=4)
        short = vlm.settings.context
        second = chat.ask("and where?", max_tokens=short)
        assert vlm.settings.context > short
        assert second.tokens.kept >= first.tokens.prompt + first.tokens.generated - 1
        with edgevlm.load(folder, cache=False) as fresh:
            asked = [("what is it?", first), ("and where?", None)]
            said: list[Message] = []
            for question, answer in asked:
                image = {"type": "image", "image": A}
                text = {"type": "text", "text": question}
                said.append({"role": "user", "content": [text] if said else [image, text]})  # type: ignore[list-item]
                if answer:
                    said.append({"role": "assistant", "content": answer})
            assert fresh.ask(said, max_tokens=8).token_ids == second.token_ids[:8]


def test_what_is_kept_on_disk_does_not_end_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE")
    monkeypatch.setattr(prefixes, "MIN_ROWS", 1)
    folder = exported(write_llava, tmp_path, "q8_0")
    with edgevlm.load(folder) as vlm, vlm.chat(A) as chat:
        first = chat.ask("what is it?", max_tokens=6)
        assert disk_cache.pictures_folder().bytes()
        second = chat.ask("and where?", max_tokens=6)
        assert second.tokens.kept >= first.tokens.prompt + first.tokens.generated - 1
        with edgevlm.load(folder, cache=False) as fresh, fresh.chat(A) as again:
            assert again.ask("what is it?", max_tokens=6).token_ids == first.token_ids
            assert again.ask("and where?", max_tokens=6).token_ids == second.token_ids


def test_another_question_is_read_in_the_batches_of_a_first_one(tmp_path: Path) -> None:
    """Otherwise its logits would depend on what was asked before it."""
    folder = exported(write_llava, tmp_path, "q8_0")
    with edgevlm.load(folder, cache=False) as vlm:
        alone = vlm.score("what is that?", ["a", "b"], A)
        vlm.ask("what is it?", A, max_tokens=3)
        assert vlm.score("what is that?", ["a", "b"], A).tolist() == alone.tolist()


# Rows


def embed(tokens: Sequence[int]) -> Float:
    return EMBEDDINGS[list(tokens)]


def block(tokens: Sequence[int], start: int = 0, attention: BlockAttention = "causal") -> Block:
    return sequential(embed(tokens), attention, start)


def cached(blocks: list[Block], tokens: list[int]) -> CachedRows:
    rows = CachedRows()
    rows.read(following(0, sum(len(b.rows) for b in blocks), mrope=False))
    rows.prompt(blocks, 0)
    n = len(rows.positions)
    rows.drew(tokens, following(n, len(tokens), mrope=False))
    return rows


@pytest.mark.parametrize(
    ("asked", "common"),
    [
        ([block([1, 2]), block([3, 4, 5, 6, 7], 2)], 6),  # both tokens drawn, and more
        ([block([1, 2]), block([3, 4, 5, 6], 2)], 5),  # nothing after the answer: one is read
        ([block([1, 2]), block([3, 4, 5, 9, 7], 2)], 5),  # another second token
        ([block([1, 2]), block([3, 4, 9, 6, 7], 2)], 2),  # another answer
        ([block([1, 2]), block([3, 4], 2)], 2),  # the same question
        ([block([1, 2]), block([3, 9, 5], 2)], 2),  # a question that begins alike
        ([block([1, 2, 3, 4, 5])], 0),  # the same rows in other batches
        ([block([1, 9]), block([3, 4, 5, 6, 7], 2)], 0),
        ([block([1, 2]), block([3, 4, 5], 2), block([8, 9], 5)], 5),  # a picture after the answer
    ],
)
def test_rows_in_common(asked: list[Block], common: int) -> None:
    rows = cached([block([1, 2]), block([3, 4], 2)], [5, 6])
    assert rows.common(asked, embed) == common
    assert rows.copy().common(asked, embed) == common


def test_blocks_behind_an_answer_are_no_state_for_others() -> None:
    """Its rows were read one by one, which rounds otherwise than a batch."""
    first, question = block([1, 2]), block([3, 4], 2)
    rows = cached([first, question], [5, 6])
    assert rows.leading == [first]
    longer, picture, words = block([3, 4, 5, 6, 7], 2), block([8, 9], 7), block([1], 9)
    asked = [first, longer, picture, words]
    kept = rows.common(asked, embed)
    rows.cut(kept)
    rows.read(following(kept, 10 - kept, mrope=False))
    rows.prompt(asked, kept)
    assert rows.leading == [first]
    # Neither in the next turn nor in a question about the same.
    other = [first, longer, picture, block([2], 9)]
    kept = rows.common(other, embed)
    assert kept == 9
    rows.cut(kept)
    rows.read(following(9, 1, mrope=False))
    rows.prompt(other, kept)
    assert rows.leading == [first]
    # From the pure block on everything is read as by anybody.
    anew = [first, block([9, 9], 2), words]
    kept = rows.common(anew, embed)
    rows.cut(kept)
    rows.read(following(2, 3, mrope=False))
    rows.prompt(anew, kept)
    assert rows.leading == anew[:2]


def test_a_bidirectional_block_has_no_rows_of_its_own() -> None:
    whole = [block([1, 2, 3], attention="bidirectional")]
    rows = cached(whole, [4])
    longer = [block([1, 2, 3, 4, 5], attention="bidirectional")]
    assert rows.common(longer, embed) == 0


@pytest.mark.parametrize(("left", "common"), [(6, 6), (5, 5), (4, 2), (3, 2), (2, 2), (1, 0)])
def test_rows_that_are_gone_are_not_in_common(left: int, common: int) -> None:
    rows = cached([block([1, 2]), block([3, 4], 2)], [5, 6])
    rows.cut(left)
    assert len(rows.positions) == left
    assert rows.common([block([1, 2]), block([3, 4, 5, 6, 7], 2)], embed) == common
