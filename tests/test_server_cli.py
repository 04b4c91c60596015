"""`edgevlm serve`: its options, its refusals, its end."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

import edgevlm
from edgevlm import machine
from edgevlm.cli import cli, serve
from edgevlm.cli.ask import ask
from edgevlm.errors import EdgeVLMError, EngineMissing
from edgevlm.machine import Memory
from edgevlm.manifest import write_manifest
from edgevlm.models import built_in
from edgevlm.runtimes import fakes
from edgevlm.server import listening
from tests.serving import question


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The servers that commands would have run."""
    found: list[Any] = []
    monkeypatch.delenv("EDGEVLM_API_KEY", raising=False)
    monkeypatch.setattr(listening.Runner, "run", lambda runner, _: found.append(runner))
    return found


def run(*arguments: str, **env: str) -> tuple[int, str]:
    """The exit code and what is said, as the command `edgevlm` says it."""
    result = CliRunner().invoke(cli, ["serve", "--port", "0", *arguments], env=env)
    error = result.exception
    return result.exit_code, str(error) if isinstance(error, EdgeVLMError) else result.output


def access_of(runner: Any) -> Any:
    (guard,) = (m for m in runner.config.app.user_middleware if "access" in m.kwargs)
    return guard.kwargs["access"]


def test_it_says_where_it_serves(started: list[Any]) -> None:
    code, said = run()
    assert code == 0 and re.fullmatch(r"Serving pico at http://127.0.0.1:\d+; Ctrl-C ends.\n", said)
    assert access_of(started[0]).key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "box.lan"])
def test_other_machines_need_a_key(started: list[Any], host: str) -> None:
    code, said = run("--host", host)
    assert code == 2 and "set a key with EDGEVLM_API_KEY or --api-key, or give --no-api-key" in said
    assert not started


def test_keys_and_hosts(started: list[Any]) -> None:
    assert run("--host", "0.0.0.0", EDGEVLM_API_KEY="secret")[0] == 0
    assert run("--host", "0.0.0.0", "--no-api-key", "--allow-host", "box.lan")[0] == 0
    assert run("--api-key", "other", EDGEVLM_API_KEY="secret")[0] == 0
    assert [access_of(s).key for s in started] == ["secret", None, "other"]
    assert access_of(started[1]).hosts == ("0.0.0.0", "box.lan")
    for odd in ("with blank", "sécret", "\n"):
        code, said = run("--api-key", odd)
        assert code == 2 and "the key must be of letters, digits and signs of ASCII" in said
    code, said = run("--no-api-key", "--api-key", "x")
    assert code == 2 and "--no-api-key goes without --api-key" in said


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/page", "*"])
def test_origins_are_checked(started: list[Any], origin: str) -> None:
    code, said = run("--allow-origin", origin)
    assert code == 2 and f"{origin} is not an origin" in said


def test_models_go_by_their_names(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    for folder in (tmp_path / "models" / "mine", tmp_path / "elsewhere", tmp_path / "pico"):
        folder.symlink_to(built_in())
    assert "Serving pico, mine at" in run()[1]
    assert "Serving mine, elsewhere at" in run("mine", str(tmp_path / "elsewhere"))[1]
    code, said = run("pico", str(tmp_path / "pico"))
    assert code == 2 and "two models go by the name pico" in said
    code, said = run("nobody")
    assert code == 1 and "nobody: no such bundle folder" in said
    (tmp_path / "default").write_text("gone\n", encoding="utf-8")
    code, said = run()
    assert code == 1 and "gone: no such bundle folder" in said


def test_photos_are_searched_by_a_model_that_embeds(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.setattr(edgevlm, "load_dual", lambda *_, **__: fakes.dual())
    photos = ("--photos", str(tmp_path))
    code, said = run(*photos)
    assert code == 1 and "no CLIP or SigLIP is installed" in said
    for name in ("clip", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
        write_manifest(tmp_path / "models" / name, fakes.dual().manifest)
    code, said = run("pico", *photos)
    assert code == 1 and "--photos is searched by a CLIP or SigLIP; name one" in said
    code, said = run(*photos)
    assert code == 1 and "name one of clip, other with -m" in said
    assert not started
    code, said = run("pico", "other", *photos, "--index", str(tmp_path / "index"))
    assert code == 0 and "Serving pico, other at" in said and (tmp_path / "index").is_file()
    assert re.search(rf"Pictures of {tmp_path} are searched at http://[\d.:]+/photos\.", said)
    assert run("clip")[0] == 0  # it embeds
    (tmp_path / "default").write_text("other\n", encoding="utf-8")
    assert "Serving pico, clip, other at" in run(*photos)[1]
    assert len(started) == 3
    code, said = run("--index", "x")
    assert code == 2 and "--index goes with --photos" in said
    code, said = run("--photos", str(tmp_path / "nowhere"))
    assert code == 2 and "does not exist" in said


def test_a_model_must_fit(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run("--memory", "0.2")
    assert code == 1 and re.search(r"pico needs about 0\.\d+ GB .* --memory raises", said)
    monkeypatch.setattr(machine, "memory", lambda: Memory(1 << 30, 200 << 20))
    assert run()[0] == 1 and not started
    monkeypatch.setattr(machine, "memory", lambda: Memory(1 << 30, 1 << 30))
    assert run()[0] == 0


def test_models_are_loaded_as_by_other_commands(started: list[Any]) -> None:
    """Every option of loading that `ask` has is there, and reaches the load."""
    load = set(inspect.signature(edgevlm.load).parameters) - {"model"}
    loading = {p.name for p in ask.params if str(p.name).removeprefix("no_") in load}
    loading -= {"image", "progress"}
    assert {"threads", "device", "kv"} <= loading <= {p.name for p in serve.serve.params}
    code, said = run("--device", "cuda:7")
    assert code == 1 and "cuda:7" in said


def test_limits_are_those_of_the_options() -> None:
    limits = serve._limits(
        {"max_request_mb": 1.5, "max_pictures": 3, "max_megapixels": 2.5, "max_requests": 4,
         "timeout": 9.0, "image_urls": True}
    )  # fmt: skip
    assert (limits.body_bytes, limits.pictures, limits.pixels) == (3 << 19, 3, 2_500_000)
    assert (limits.requests, limits.seconds, limits.image_urls) == (4, 9.0, True)


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "prometheus_client"])
def test_without_its_packages_the_extra_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineMissing, match=rf"{name} is missing.*pip install .edgevlm\[server\]"):
        serve._check_packages()


@pytest.mark.fault(
    "Server",
    "SIGTERM or SIGINT",
    "ends with the signal's exit code, without a traceback",
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code(number: int, code: int) -> None:
    with process_of(serving_command()) as (process, base):
        asked = {"model": "pico", "messages": [question("caption en")]}
        answer = httpx.post(f"{base}/v1/chat/completions", json=asked, timeout=60)
        assert answer.status_code == 200
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr and process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to ignore")
def test_a_signal_that_a_shell_ignores_stays_ignored() -> None:
    ignoring = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ignoring += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = serving_command()
    with process_of([command[0], "-c", ignoring, *command[1:]]) as (process, base):
        process.send_signal(signal.SIGINT)
        assert httpx.get(f"{base}/health").json()["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def serving_command() -> list[str]:
    return [sys.executable, "-m", "edgevlm", "serve", "--port", "0", "--threads", "1"]


@contextmanager
def process_of(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and its address."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            line = process.stderr.readline()
            found = re.search(r"http://\S+(?=;)", line)
            assert found, line
            yield process, found[0]
        finally:
            process.kill()
