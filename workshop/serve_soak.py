"""`python -m workshop.serve_soak [MODEL]`: many clients, one server, everything at random.

Clients ask, stream and hang up, each about a picture and a question of its own. Every answer is
compared with the one that the model gave beforehand in this process. Ends with exit code 1 where
one differs, where another error than 429 comes, or where the server's memory grows by more than a
twentieth.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import click
import httpx
import psutil
from PIL import Image

import edgevlm
from edgevlm.export.parity.images import drawn
from workshop.soak import growth

_PROMPTS = ("caption en", "answer en what shape is red?", "detect circle", "ocr")
_TOKENS = 24
# Of the clients; the others are told to come back.
_ADMITTED = 0.75
_TIMEOUT_S = 120


class Clients:
    """Clients of one server, the answers that they must get, and what came of it."""

    def __init__(self, base: str, model: str | None, name: str) -> None:
        self._url, self._name = f"{base}/v1/chat/completions", name
        self._pictures = drawn()[:3]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        with edgevlm.load(model) as vlm:
            self._expected = {
                (i, prompt): vlm.ask(prompt, picture, max_tokens=_TOKENS).text
                for i, picture in enumerate(self._pictures)
                for prompt in _PROMPTS
            }

    def work(self, seed: int, end: float) -> None:
        """Does one thing after another until time.monotonic reaches `end`."""
        rng = random.Random(seed)
        with httpx.Client(timeout=_TIMEOUT_S) as client:
            while time.monotonic() < end:
                try:
                    self._one(client, rng)
                except Exception as error:
                    self.faults.append(repr(error))

    def _one(self, client: httpx.Client, rng: random.Random) -> None:
        key = rng.randrange(len(self._pictures)), rng.choice(_PROMPTS)
        how = rng.choice(("ask", "stream", "stream", "hang up"))
        body = self._body(*key) | {"stream": how != "ask"}
        with client.stream("POST", self._url, json=body) as response:
            if response.status_code == 429:
                self.counts["429"] += 1
                # Sooner than it says, to keep the queue full.
                time.sleep(rng.random() * int(response.headers["retry-after"]) / 4)
                return
            self.counts[how] += 1
            if how == "hang up":
                next(response.iter_lines())
                return
            text = _streamed(response) if how == "stream" else _whole(response)
        if text != self._expected[key]:
            self.faults.append(f"{how} {key}: {text!r}, not {self._expected[key]!r}")

    def _body(self, i: int, prompt: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(self._pictures[i]).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": parts}]
        return {"model": self._name, "messages": messages, "max_tokens": _TOKENS}


def _whole(response: httpx.Response) -> str:
    found = json.loads(response.read())
    return str(found["choices"][0]["message"]["content"]) if "choices" in found else repr(found)


def _streamed(response: httpx.Response) -> str:
    text, done = "", False
    for line in response.iter_lines():
        done = line == "data: [DONE]"
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return repr(event)
            text += event["choices"][0]["delta"].get("content", "")
            done = False
        elif done:
            return text
    return f"{text} (broken off)"


@click.command()
@click.argument("model", required=False)
@click.option("--minutes", default=5.0, show_default=True, help="Time for the clients.")
@click.option("--clients", default=16, show_default=True, help="Clients at once.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def main(model: str | None, minutes: float, clients: int, seed: int) -> None:
    """Ask a server by many clients at once, and see whether answers and memory stay."""
    command = [sys.executable, "-m", "edgevlm", "serve", *([model] if model else ["pico"])]
    command += ["--port", "0", "--max-requests", str(max(1, int(clients * _ADMITTED)))]
    command += ["--threads", "1"]  # the clients want cores, too
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        line = server.stderr.readline()
        found = re.fullmatch(r"Serving (.+) at (http://\S+); Ctrl-C ends\.\n", line)
        if not found:
            raise click.ClickException(line + server.stderr.read())
        asking, memory = Clients(found[2], model, found[1]), list[float]()
        end = time.monotonic() + 60 * minutes
        workers = [
            threading.Thread(target=asking.work, args=(seed + i, end)) for i in range(clients)
        ]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            memory.append(psutil.Process(server.pid).memory_info().rss / 2**20)
            time.sleep(min(1.0, minutes))
        server.terminate()
        said = server.stderr.read()
    counts = ", ".join(f"{n} {name}" for name, n in sorted(asking.counts.items()))
    flat = growth(memory)
    faults = asking.faults + said.splitlines()
    click.echo(f"{clients} clients, {minutes:g} min: {counts}; {len(faults)} faults; {flat}")
    for fault in faults[:5]:
        click.echo(f"  {fault}")
    sys.exit(bool(faults or "grows" in flat))


if __name__ == "__main__":
    main()
