"""One question, or one task, about many pictures, each by itself, an answer for each."""

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
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm import store
from edgevlm.cli.common import Command, Run, as_dict, print_stats
from edgevlm.cli.jsonl import AnswerFile, Record, placed
from edgevlm.cli.signals import last_words
from edgevlm.cli.tally import Tally
from edgevlm.errors import EngineError, ImageError, PromptError
from edgevlm.manifest import Manifest, read_manifest
from edgevlm.models import check_answers, resolve
from edgevlm.sampling import Sampling, SamplingOptions, task_options
from edgevlm.types import Reply

if TYPE_CHECKING:
    from edgevlm.cli.progress import PictureBar
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.session import VLM

# Pictures that are read while another one is answered; each may take 256 MiB.
_AHEAD = 1
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


def _text_line(record: Record) -> list[str]:
    return [record["text"]]


def _plain(_: VLM, reply: Reply) -> Record:
    return as_dict(reply)


@dataclass(frozen=True)
class Asked:
    """A question about every picture: its prompt and options in terms of a model, and what becomes
    of an answer: a record, and lines of text for stdout, which follow the file's name.

    `system` is the system message. `kind` tells records of one prompt apart that hold different
    things. `end` is called with the records of all pictures that have an answer, those of an
    earlier run among them.
    """

    prompt: Callable[[Manifest], str]
    options: Callable[[Manifest], SamplingOptions] = lambda _: {}
    system: str | None = None
    kind: str = ""
    record: Callable[[VLM, Reply], Record] = _plain
    lines: Callable[[Record], list[str]] = _text_line
    end: Callable[[list[Record]], None] | None = None


def asked_task(
    task: str, text: str | Sequence[str] = "", language: str = "en", **forms: Any
) -> Asked:
    """A model's own task, about a question or objects by name, for every picture; `forms` as those
    of Asked.
    """
    from edgevlm.prompt import task_prompt

    return Asked(
        lambda manifest: task_prompt(manifest.prompt, task, text, language),
        lambda manifest: task_options(task, manifest.answer),
        **forms,
    )


def ask_each(
    asked: Asked, sources: list[NamedPicture], many: Many, run: Run, *, as_json: bool
) -> None:
    """Asks about every source that OUT has no answer about.

    What fails is listed at the end, with exit code 1.
    """
    Sampling.of(run.sampling)  # Otherwise every picture is told that an option is wrong.
    question, run = _question(asked, run)
    out = AnswerFile(many.jsonl) if many.jsonl else None
    done = dict[object, Record | None]()
    if out:
        records = (r for r in out.records() if "text" in r and not many.overwrite)
        done = {_key(r): r if asked.end else None for r in records}
    keys = [_key({"file": source.file, **source.facts, **question}) for source in sources]
    todo = [source for source, key in zip(sources, keys, strict=True) if key not in done]
    tally = Tally(len(sources), len(sources) - len(todo), many.jsonl, many.overwrite)
    if todo:
        again = {(source.place, question["asked"]) for source in todo}

        def keep(record: Record) -> bool:
            return not many.overwrite and (placed(record["file"]), record["asked"]) not in again

        with last_words(tally.last_words), run.load([], "both") as vlm:
            with out.writing(keep) if out else nullcontext() as write:
                shown = _Shown(asked, as_json, run.stats, write, done)
                _ask_all(vlm, todo, question, run, tally, shown)
    if asked.end:
        asked.end([record for key in keys if (record := done.get(key))])
    tally.summarize()


def _question(asked: Asked, run: Run) -> tuple[Record, Run]:
    """All that an answer depends on beside the picture: prompt and model to read, and a hash; and
    the run with the options of what is asked.
    """
    manifest = read_manifest(resolve(run.model if run.model is not None else store.default()))
    check_answers(manifest)
    prompt = asked.prompt(manifest)
    if asked.system is not None:
        from edgevlm.runtimes.request import check_system

        check_system(manifest, asked.system)
    sampling: SamplingOptions = {**asked.options(manifest), **run.sampling}
    files = sorted(file.sha256 for part in manifest.all_components for file in part.files)
    options: tuple[object, ...] = (sorted(sampling.items()), run.loading.get("max_tiles"))
    if pixels := run.loading.get("max_pixels"):
        # A run from before there was the option goes on.
        options = (*options, pixels)
    kind = (asked.kind, asked.system) if asked.system else asked.kind
    facts = repr((kind, prompt, manifest.name, files, options))
    digest = hashlib.sha256(facts.encode(errors="surrogatepass")).hexdigest()[:16]
    question = {"prompt": prompt, "model": manifest.name, "asked": digest}
    return question, replace(run, sampling=sampling)


def _key(record: Record) -> object:
    facts = (record.get("bytes"), record.get("mtime_ns"))
    return (placed(record["file"]), *facts, record["asked"])


@dataclass(frozen=True)
class _Shown:
    """The places that answers go to: OUT, stdout as text or JSON lines, and `done` for the end."""

    asked: Asked
    as_json: bool
    stats: bool
    write: Callable[[Record], None] | None
    done: dict[object, Record | None]

    def show(self, record: Record, reply: Reply | None, vlm: VLM, bar: PictureBar) -> None:
        """Shows or writes an answer or, without a reply, a failure."""
        if self.write:
            self.write(record)
        lines: list[str] = []
        if self.as_json:
            lines = [json.dumps(record)]
        elif reply and not self.write:
            lines = [f"{record['file']}: {line}" for line in self.asked.lines(record)]
        if lines:
            with bar.aside():
                click.echo("\n".join(lines))
                sys.stdout.flush()
        if reply and self.asked.end:
            self.done[_key(record)] = record
        if reply and self.stats:
            with bar.aside():
                click.echo(f"{record['file']}:", err=True)
                print_stats(reply, vlm.devices)


def _ask_all(
    vlm: VLM, todo: Sequence[NamedPicture], question: Record, run: Run, tally: Tally, shown: _Shown
) -> None:
    from edgevlm.cli.progress import PictureBar

    with PictureBar(tally.total, tally.before) as bar:
        for source, reading in _read_ahead(vlm, todo, shown.asked.system):
            reply: Reply | None = None
            about: Record = {"file": source.file}
            try:
                chat, decode_ms = reading.result()
                reply = _whole(chat.ask(question["prompt"], **run.sampling))
                timings = replace(reply.timings, image_decode_ms=decode_ms)
                found = shown.asked.record(vlm, replace(reply, timings=timings))
                about |= _without_tokens(found)
            except (ImageError, PromptError, EngineError) as error:
                reply = None
                about["error"] = error.reason if isinstance(error, ImageError) else str(error)
                tally.fail(source.file, about["error"])
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
    vlm: VLM, sources: Sequence[NamedPicture], system: str | None
) -> Iterator[tuple[NamedPicture, Future[tuple[Chat, float]]]]:
    """Each source with its picture, which is read in another thread while others are answered."""

    def read(source: NamedPicture) -> tuple[Chat, float]:
        start = time.perf_counter()
        chat = vlm.chat(source.image, system=system)
        return chat, (time.perf_counter() - start) * 1e3

    reading = deque[tuple[NamedPicture, "Future[tuple[Chat, float]]"]]()
    with ThreadPoolExecutor(1, "pictures") as pool:
        for source in sources:
            reading.append((source, pool.submit(read, source)))
            if len(reading) > _AHEAD:
                yield reading.popleft()
        yield from reading
