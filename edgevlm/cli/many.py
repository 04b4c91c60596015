"""One prompt about many pictures, each by itself, an answer for each."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm import store
from edgevlm.bundle import read_manifest
from edgevlm.cli.common import Command, Run, as_dict, print_stats
from edgevlm.cli.jsonl import AnswerFile, Record, placed
from edgevlm.cli.signals import last_words
from edgevlm.errors import EngineError, ImageError, PromptError
from edgevlm.models import resolve
from edgevlm.sampling import Sampling
from edgevlm.types import Reply

if TYPE_CHECKING:
    from edgevlm.cli.progress import PictureBar
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.session import VLM

# Pictures that are read while another one is answered; each may take 256 MiB.
_AHEAD = 1
# Failures that are named at the end; the others are counted.
_NAMED = 5
_OPTIONS = (
    click.option("--each", is_flag=True,
                 help="Ask about every picture by itself; folders, patterns and --jsonl imply it."),
    click.option("-r", "--recursive", is_flag=True, help="Also look into the folders of a folder."),
    click.option("--jsonl", type=click.Path(path_type=Path), metavar="OUT",
                 help="Write each answer to OUT as a JSON line, and go on there after a stop."),
    click.option("--overwrite", is_flag=True, help="Drop the answers that are in OUT."),
)  # fmt: skip


@dataclass(frozen=True)
class Many:
    """Values of the options for many pictures."""

    each: bool
    recursive: bool
    jsonl: Path | None
    overwrite: bool


def many_options(command: Command) -> Command:
    """Adds the options for many pictures; passes them as `many: Many`."""

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        command(many=Many(**{name: values.pop(name) for name in Many.__annotations__}), **values)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


@dataclass(frozen=True)
class NamedPicture:
    """A picture to ask about: `file` is how answers name it, `image` is what is read.

    `facts` tell a file from an older or newer one of its name; a URL has none.
    """

    file: str
    image: str | Path
    facts: dict[str, int] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The name that is the same wherever it is asked from."""
        return placed(self.file)


def each_source(images: Sequence[str], many: Many) -> list[NamedPicture] | None:
    """The pictures that are asked about one by one; None where all of them make one request.

    Raises click.UsageError for what does not go together, ImageError for a folder or a pattern
    without pictures.
    """
    if many.jsonl == Path() or (many.overwrite and not many.jsonl):
        raise click.UsageError("--jsonl and --overwrite need the name of a file")
    from edgevlm.image.listing import listed

    found = [listed(image, recursive=many.recursive) for image in images if image != "-"]
    if not (many.each or many.jsonl or any(f is not None for f in found)):
        if many.recursive:
            raise click.UsageError("--recursive goes with a folder; name one with -i")
        return None
    if not images:
        raise click.UsageError("name pictures, a folder or a pattern with -i")
    if any(image == "-" or image.strip()[:5].lower() == "data:" for image in images):
        raise click.UsageError("a picture without a name (-, data:) is not one of many")
    sources: dict[str, NamedPicture] = {}
    for image, paths in zip(images, found, strict=True):
        if paths == []:
            raise ImageError(image, _nothing_found(image, many))
        for source in map(_file_source, paths) if paths else [_named_source(image)]:
            sources.setdefault(source.place, source)
    if many.jsonl:
        sources.pop(placed(str(many.jsonl)), None)
    return list(sources.values())


def _nothing_found(image: str, many: Many) -> str:
    deeper = os.path.isdir(image) and not many.recursive
    cure = "--recursive looks into its folders" if deeper else "name another folder or pattern"
    return f"no pictures there; {cure}"


def _named_source(name: str) -> NamedPicture:
    from edgevlm.image.names import located
    from edgevlm.image.urls import without_credentials

    if not name.strip():
        raise ImageError("the picture's name", "is empty; name a file or a URL")
    place = located(name)
    if isinstance(place, Path):
        return _file_source(place)
    return NamedPicture(without_credentials(name), name)


def _file_source(path: Path) -> NamedPicture:
    try:
        about = path.stat()
    except (OSError, ValueError):  # Reading it says why.
        return NamedPicture(str(path), path)
    return NamedPicture(str(path), path, {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns})


def ask_each(
    prompt: str, sources: list[NamedPicture], many: Many, run: Run, *, as_json: bool
) -> None:
    """Answers the prompt about every source that OUT has no answer about.

    What fails is listed at the end, with exit code 1.
    """
    Sampling.of(run.sampling)  # Otherwise every picture is told that an option is wrong.
    question = _question(prompt, run)
    out = AnswerFile(many.jsonl) if many.jsonl else None
    done = set[object]()
    if out:
        records = out.records()
        done = {_key(r) for r in records if "text" in r and not many.overwrite}
    todo = [s for s in sources if _key({"file": s.file, **s.facts, **question}) not in done]
    tally = _Tally(len(sources), len(sources) - len(todo), many.jsonl, many.overwrite)
    if todo:
        again = {(source.place, question["asked"]) for source in todo}

        def keep(record: Record) -> bool:
            return not many.overwrite and (placed(record["file"]), record["asked"]) not in again

        with last_words(tally.last_words), run.load([], "both") as vlm:
            if out:
                with out.writing(keep) as write:
                    _ask_all(vlm, todo, question, run, tally, _Shown(as_json, run.stats, write))
            else:
                _ask_all(vlm, todo, question, run, tally, _Shown(as_json, run.stats))
    tally.summarize()


def _question(prompt: str, run: Run) -> Record:
    """All that an answer depends on beside the picture: prompt and model to read, and a hash."""
    manifest = read_manifest(resolve(run.model if run.model is not None else store.default()))
    files = sorted(file.sha256 for part in manifest.all_components for file in part.files)
    options = (sorted(run.sampling.items()), run.loading.get("max_tiles"))
    facts = repr((prompt, manifest.name, files, options))
    asked = hashlib.sha256(facts.encode(errors="surrogatepass")).hexdigest()[:16]
    return {"prompt": prompt, "model": manifest.name, "asked": asked}


def _key(record: Record) -> object:
    facts = (record.get("bytes"), record.get("mtime_ns"))
    return (placed(record["file"]), *facts, record["asked"])


@dataclass
class _Tally:
    """Counts of a run, and its first failures."""

    total: int
    before: int
    out: Path | None
    afresh: bool
    answered: int = 0
    cut: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def last_words(self) -> str:
        """The way to go on after a signal."""
        count = f"{self.before + self.answered} of {self.total} pictures are answered"
        if self.out:
            command = "the same command without --overwrite" if self.afresh else "the same command"
            return f"edgevlm: {count}; {command} goes on from there ({self.out})"
        return f"edgevlm: {count}; --jsonl OUT keeps answers, and goes on from there"

    def summarize(self) -> None:
        """Says on stderr what was done and what failed; raises Exit(1) if anything did."""
        if self.out:
            before = f", {self.before} were before" if self.before else ""
            click.echo(
                f"{self.answered} answered{before}, {self.failed} failed: {self.out}", err=True
            )
        if self.cut:
            click.echo(f"{self.cut} cut at --max-tokens or a full context.", err=True)
        if self.failed:
            for failure in self.failures:
                click.echo(f"edgevlm: {failure}", err=True)
            if more := self.failed - len(self.failures):
                click.echo(f"edgevlm: and {more} more that failed", err=True)
            raise click.exceptions.Exit(1)


@dataclass(frozen=True)
class _Shown:
    """The places that answers go to: OUT, or stdout as text or JSON lines."""

    as_json: bool
    stats: bool
    write: Callable[[Record], None] | None = None

    def show(self, record: Record, reply: Reply | None, vlm: VLM, bar: PictureBar) -> None:
        """Shows or writes an answer or, without a reply, a failure."""
        if self.write:
            self.write(record)
        if self.as_json or (reply and not self.write):
            text = json.dumps(record) if self.as_json else f"{record['file']}: {record['text']}"
            with bar.aside():
                click.echo(text)
                sys.stdout.flush()
        if reply and self.stats:
            with bar.aside():
                click.echo(f"{record['file']}:", err=True)
                print_stats(reply, vlm.devices)


def _ask_all(
    vlm: VLM, todo: Sequence[NamedPicture], question: Record, run: Run, tally: _Tally, shown: _Shown
) -> None:
    from edgevlm.cli.progress import PictureBar

    with PictureBar(tally.total, tally.before) as bar:
        for source, reading in _read_ahead(vlm, todo):
            reply: Reply | None = None
            about: Record = {"file": source.file}
            try:
                chat, decode_ms = reading.result()
                reply = _whole(chat.ask(question["prompt"], **run.sampling))
                timings = replace(reply.timings, image_decode_ms=decode_ms)
                about |= _without_tokens(as_dict(replace(reply, timings=timings)))
            except (ImageError, PromptError, EngineError) as error:
                about["error"] = error.reason if isinstance(error, ImageError) else str(error)
                tally.failed += 1
                if len(tally.failures) < _NAMED:
                    tally.failures.append(f"{source.file}: {about['error']}")
            shown.show({**about, **question, **source.facts}, reply, vlm, bar)
            if reply:
                tally.answered += 1
                tally.cut += reply.finish_reason == "length"
            bar.advance()


def _whole(reply: Reply) -> Reply:
    """The reply; raises PromptError where it was held to a form and is not whole."""
    if reply.constraint:
        _ = reply.parsed
    return reply


def _without_tokens(reply: Record) -> Record:
    return {name: value for name, value in reply.items() if name != "token_ids"}


def _read_ahead(
    vlm: VLM, sources: Sequence[NamedPicture]
) -> Iterator[tuple[NamedPicture, Future[tuple[Chat, float]]]]:
    """Each source with its picture, which is read in another thread while others are answered."""

    def read(source: NamedPicture) -> tuple[Chat, float]:
        start = time.perf_counter()
        chat = vlm.chat(source.image)
        return chat, (time.perf_counter() - start) * 1e3

    reading = deque[tuple[NamedPicture, "Future[tuple[Chat, float]]"]]()
    with ThreadPoolExecutor(1, "pictures") as pool:
        for source in sources:
            reading.append((source, pool.submit(read, source)))
            if len(reading) > _AHEAD:
                yield reading.popleft()
        yield from reading
