"""Settings measured on this machine: comparisons, what is remembered, what loads with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import edgevlm
from edgevlm import machine
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli import cli
from edgevlm.errors import EngineError, PromptError
from edgevlm.export import export_bundle
from edgevlm.models import built_in
from edgevlm.runtimes import rules, tuned, tuning
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.rules import GOALS, EngineSettings
from edgevlm.runtimes.tuned import Tuning

SETTINGS = EngineSettings(1, 1, 1, "decode", False, (), batch=64, flash_attention="off")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def pico() -> Bundle:
    return open_bundle(built_in())


def made(bundle: Bundle, settings: EngineSettings = SETTINGS) -> Tuning:
    here = tuned.facts(ggml.cpu_features())
    goals = {str(goal): settings for goal in GOALS}
    return Tuning(tuned.FORMAT, here, tuned.files(bundle), goals, (), ())


# Comparisons


def test_choices_take_turns_and_the_first_run_warms_up() -> None:
    values = {"a": iter([9.0, 5.0, 4.0, 6.0]), "b": iter([8.0, 4.4, 4.3, 4.2])}
    order: list[str] = []

    def run(word: str) -> float:
        order.append(word)
        return next(values[word])

    found = tuning.fastest({word: lambda word=word: run(word) for word in values})  # type: ignore[misc]
    assert order == ["a", "b"] * 4
    assert found == {"a": 4.0, "b": 4.2}


def test_a_hopeless_choice_is_not_run_again_and_the_first_one_always() -> None:
    count = {"slow": 0, "fast": 0, "hopeless": 0}

    def run(word: str, ms: float) -> float:
        count[word] += 1
        return ms

    tuning.fastest(
        {
            "slow": lambda: run("slow", 9.0),
            "fast": lambda: run("fast", 1.0),
            "hopeless": lambda: run("hopeless", 2.0),
        }
    )
    assert count == {"slow": 4, "fast": 4, "hopeless": 1}


@pytest.mark.parametrize(("runs_left", "compared"), [(1, False), (2, True), (5, True)])
def test_time_that_is_over_ends_a_comparison(runs_left: int, compared: bool) -> None:
    left = iter([False] * runs_left)
    found = tuning.fastest({"a": lambda: 1.0, "b": lambda: 2.0}, lambda: next(left, True))
    assert found == ({"a": 1.0, "b": 2.0} if compared else {})


@pytest.mark.parametrize(("second", "chosen"), [(96.0, "held"), (94.0, "other"), (120.0, "held")])
def test_a_change_has_to_be_worth_it(second: float, chosen: str) -> None:
    assert tuning.winner({"held": 100.0, "other": second}) == chosen


def test_what_is_to_be_fast_decides_about_repacking() -> None:
    times = {
        "load": {"off": 100.0, "on": 1000.0},
        "prefill": {"off": 10.0, "on": 12.0},
        "decode": {"off": 50.0, "on": 40.0},
    }
    best = {
        goal: min(("off", "on", "decode"), key=lambda r: tuning.cost_ms(r, goal, 200, times))  # type: ignore[arg-type]
        for goal in GOALS
    }
    assert best == {"chat": "decode", "caption": "off", "both": "decode"}


# Remembered


def test_a_tuning_is_used_by_the_next_load(pico: Bundle) -> None:
    tuned.remember(made(pico))
    with edgevlm.load() as vlm:
        found = vlm.settings
        assert found.tuned and found.repacking == "decode"
        assert (found.threads, found.prefill_threads, found.vision_threads) == (1, 1, 1)
        assert str(vlm.ask("answer en what shape is red?", "examples/shapes.png")) == "circle"
    with edgevlm.load(threads=2, repack=False) as vlm:
        assert (vlm.settings.threads, vlm.settings.repacking) == (2, "off")
    assert tuned.forget(pico, ggml.cpu_features())
    assert not tuned.forget(pico, ggml.cpu_features())
    with edgevlm.load() as vlm:
        assert not vlm.settings.tuned


def test_a_tuning_of_another_machine_is_of_no_account(
    pico: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tuned.remember(made(pico))
    features = ggml.cpu_features()
    assert tuned.recall(pico, features)
    assert tuned.recall(pico, [*features, "AVX1024"]) is None
    # A home that was copied: the file goes by the right name, and says another machine.
    data = json.loads(path.read_text(encoding="utf-8"))
    data["machine"]["processor"] = "another"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert tuned.recall(pico, features) is None
    tuned.remember(made(pico))
    monkeypatch.setattr(machine, "processor_name", lambda: "another")
    assert tuned.recall(pico, features) is None


@pytest.mark.fault("Caches", "a damaged file of `tune`", "counts as none")
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "\x00", '{"format": 2}'])
def test_a_damaged_tuning_counts_as_none(pico: Bundle, damage: str) -> None:
    path = tuned.remember(made(pico))
    path.write_text(damage, encoding="utf-8")
    assert tuned.recall(pico, ggml.cpu_features()) is None


def test_a_tuning_of_another_bundle_is_of_no_account(
    pico: Bundle, paligemma_bundle: Bundle
) -> None:
    tuned.remember(made(pico))
    assert tuned.recall(paligemma_bundle, ggml.cpu_features()) is None
    other = replace(pico, manifest=replace(pico.manifest, alternatives={}, components={}))
    assert tuned.recall(other, ggml.cpu_features()) is None


@pytest.mark.fault("Home", "nowhere to keep what `tune` measured", "one line")
def test_a_place_that_cannot_be_written_is_an_error_of_one_line(pico: Bundle, home: Path) -> None:
    home.write_text("", encoding="utf-8")
    with pytest.raises(EngineError, match="cannot be kept .*EDGEVLM_HOME"):
        tuned.remember(made(pico))


# Measured


def test_a_tuning_compares_every_setting() -> None:
    seen: list[str] = []
    found = tuning.tune(built_in(), progress=lambda p: seen.append(p.stage))
    assert set(found.goals) == {"chat", "caption", "both"} and not found.skipped
    parts = {(c.part, c.setting) for c in found.compared}
    assert {("prefill", "repacking"), ("decode", "repacking")} <= parts
    assert ("prefill", "flash attention") in parts
    assert len(seen) == len(set(seen)) >= len(parts)
    for compared in found.compared:
        assert compared.chosen in compared.choices and min(compared.choices.values()) > 0
    tuned.remember(found)
    with edgevlm.load(goal="chat") as vlm:
        assert vlm.settings.tuned
        assert vlm.settings.repacking == found.goals["chat"].repacking


def test_one_goal_is_for_every_command() -> None:
    found = tuning.tune(built_in(), "chat", seconds=0.2)
    assert found.goals["chat"] == found.goals["caption"] == found.goals["both"]


def test_without_time_everything_stays() -> None:
    found = tuning.tune(built_in(), seconds=0.0)
    assert not found.compared and found.skipped
    held = rules.settings(rules.this_machine("q8_0", short_answers=True))
    assert found.goals["both"].decode_threads == held.decode_threads


def test_a_bundle_without_a_decoder_is_refused(pico: Bundle, tmp_path: Path) -> None:
    from edgevlm.manifest import write_manifest

    for file in pico.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    components = {k: v for k, v in pico.manifest.components.items() if k != "decoder"}
    write_manifest(tmp_path, replace(pico.manifest, components=components))
    with pytest.raises(PromptError, match="no decoder to tune"):
        tuning.tune(tmp_path)


def test_the_command_says_what_it_chose_and_keeps_it(pico: Bundle) -> None:
    done = CliRunner().invoke(cli, ["tune", "pico", "--seconds", "5"])
    assert done.exit_code == 0, done.output
    assert "repacking for chat" in done.stdout and "Kept in" in done.stderr
    assert tuned.recall(pico, ggml.cpu_features())
    done = CliRunner().invoke(cli, ["tune", "pico", "--forget"])
    assert (done.exit_code, done.stderr) == (0, "forgotten\n")
    assert "nothing" in CliRunner().invoke(cli, ["tune", "pico", "--forget"]).stderr


# Two orders of the weights


def test_words_drawn_with_re_ordered_weights_are_the_same(
    paligemma_bundle: Bundle, smolvlm_checkpoint: Path, tmp_path: Path
) -> None:
    """In float32 and float16 nothing is re-ordered, so that every number must be the same."""
    picture = "examples/shapes.png"
    causal = export_bundle(
        smolvlm_checkpoint, tmp_path / "causal", quant="f16", vision_precision="fp32", verify=False
    )
    for bundle in (paligemma_bundle, causal):
        found = []
        for repack in (False, "decode"):
            with edgevlm.load(bundle.folder, repack=repack, threads=1) as vlm:
                answers = [vlm.ask("caption en", picture, max_tokens=8) for _ in range(2)]
                scores = vlm.score("caption en", ["a", "b c", "the red"], picture)
                with vlm.chat(picture) as chat:
                    turns = [chat.ask(q, max_tokens=4).token_ids for q in ("one", "two")]
                drawn = vlm.ask("x", temperature=1.0, seed=3, max_tokens=8)
                found.append(
                    (
                        [a.token_ids for a in answers],
                        scores.tolist(),
                        turns,
                        drawn.token_ids,
                        [a.tokens.kept for a in answers],
                    )
                )
                with pytest.raises(edgevlm.ModelClosed):
                    vlm.close()
                    vlm.ask("x")
        assert found[0] == found[1]
