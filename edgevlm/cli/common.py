"""Options that the answering commands share, and how answers are shown."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgevlm
from edgevlm import store
from edgevlm.byte_sizes import byte_size
from edgevlm.cli.forms import read_forms
from edgevlm.cli.names import InstalledName
from edgevlm.cli.waiting import StageLine
from edgevlm.errors import ImageError, PromptError
from edgevlm.sampling import SamplingOptions
from edgevlm.types import Devices, Reply

if TYPE_CHECKING:
    from edgevlm.image import ImageSource
    from edgevlm.runtimes.answer import Answer
    from edgevlm.runtimes.rules import Goal
    from edgevlm.runtimes.session import VLM

Command = Callable[..., None]


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # it is generic from click 8.3 on
    """A size such as 2GB, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click.ParamType."""
        try:
            return byte_size(value, "the size")
        except PromptError as e:
            self.fail(str(e), param, ctx)


_LOADING_OPTIONS = (
    click.option("--threads", type=int, metavar="N",
                 help="Threads of both engines  [default: cores]"),
    click.option("--device", default="auto", show_default=True, metavar="DEVICE",
                 help="auto, cpu, gpu, npu or one that `edgevlm doctor` lists."),
    click.option("--vision-device", metavar="DEVICE", help="Device for the vision encoder."),
    click.option("--decoder-device", metavar="DEVICE", help="Device for the decoder."),
    click.option("--kv", type=click.Choice(["f16", "q8_0"]),
                 help="Type of the KV cache; q8_0 halves it  [default: f16]"),
    click.option("--max-tiles", type=click.IntRange(min=1), metavar="N",
                 help="Most tiles of a picture, for models that cut it up; 1 cuts none."),
    click.option("--max-pixels", type=click.IntRange(min=1), metavar="N",
                 help="Most pixels of a picture, for models that take it in its own size."),
    click.option("--max-memory", type=ByteSize(), metavar="SIZE",
                 help="Most memory to hold, such as 2GB; encoder and decoder take turns in it "
                 "where it has no room for both."),
    click.option("--no-cache", is_flag=True,
                 help="Keep nothing of pictures on disk, and read nothing that is there."),
)  # fmt: skip
model_option = click.option(
    "-m", "--model", type=InstalledName(), envvar="EDGEVLM_MODEL", metavar="MODEL",
    help="Bundle folder or installed name  [env: EDGEVLM_MODEL; default: the one that "
    "`edgevlm use` chose]",
)  # fmt: skip
_ANSWERING = (
    model_option,
    click.option("--max-tokens", type=int, metavar="N", help="Longest answer in tokens."),
    click.option("--temperature", type=float, metavar="T", help="0 (the default) is greedy."),
    click.option("--top-k", type=int, metavar="K", help="Draw among the K likeliest tokens."),
    click.option("--top-p", type=float, metavar="P", help="Draw among the likeliest, up to P."),
    click.option("--min-p", type=float, metavar="P", help="Drop tokens below P x the likeliest."),
    click.option("--repetition-penalty", type=float, metavar="R", help="1 is none."),
    click.option("--seed", type=int, metavar="N", help="Random seed."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer here; repeatable."),
    *_LOADING_OPTIONS,
    click.option("--stats", is_flag=True, help="Show how long each stage took (stderr)."),
)  # fmt: skip
_IMAGE = click.option(
    "-i", "--image", "images", multiple=True, metavar="IMAGE",
    help="Path, URL or - for stdin; repeatable where the model takes several.",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
_SYSTEM = click.option(
    "--system", metavar="TEXT", help="System message, where the model's template has one.",
)  # fmt: skip
_VIDEO = click.option("--video", type=click.Path(), metavar="FILE", help="Video to ask about.")
_FPS = click.option(
    "--fps", type=click.FloatRange(min=0, min_open=True), metavar="N",
    help="Frames of the video that are taken a second.  [default: the model's own]",
)  # fmt: skip
_PLAIN = click.option("--plain", is_flag=True, help="Print answers as they are, no Markdown.")
_LOGPROBS = click.option(
    "--logprobs", type=click.IntRange(0, 20), metavar="N",
    help="Log-probability of each token and the N likeliest; with --json.",
)  # fmt: skip
_SAMPLING = tuple(SamplingOptions.__annotations__)
_LOADING = (
    *("device", "vision_device", "decoder_device", "threads", "kv"),
    *("max_tiles", "max_pixels", "max_memory"),
)


def answering(command: Command) -> Command:
    """Adds the options of model, sampling and device; passes them as `run: Run`."""

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        sampling = {k: v for k in _SAMPLING if (v := values.pop(k, None)) not in (None, ())}
        if "logprobs" in sampling and not (values["as_json"] or values.get("jsonl")):
            raise click.UsageError("--logprobs goes with --json")
        run = Run(
            values.pop("model"),
            values.pop("stats"),
            SamplingOptions(**read_forms(sampling)),  # type: ignore[typeddict-item]
            _loading(values),
        )
        command(run=run, **values)

    for option in reversed((*_ANSWERING[:1], _IMAGE, *_ANSWERING[1:])):
        wrapped = option(wrapped)
    return wrapped


def loading(command: Command) -> Command:
    """Adds the options of loading a model; passes them as `loading`, keywords of edgevlm.load."""

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        command(loading=_loading(values), **values)

    for option in reversed(_LOADING_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _loading(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of loading out of a command's values, as keywords of edgevlm.load."""
    return {name: values.pop(name) for name in _LOADING} | {"cache": not values.pop("no_cache")}


class OutFolder(click.Path):
    """The folder that a bundle is written into. An empty word is none: Path("") is the current
    one.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.Path."""
        if not value:
            self.fail("it is empty; name a folder", param, ctx)
        return super().convert(value, param, ctx)


def talking(command: Command) -> Command:
    """Adds --system and --plain; passes them as `system` and `plain`."""
    return _SYSTEM(_PLAIN(command))


def filming(command: Command) -> Command:
    """Adds --video and --fps; passes them as `video` and `fps`."""
    return _VIDEO(_FPS(command))


def json_option(command: Command) -> Command:
    """Adds --json, and --logprobs, which goes with it."""
    return _JSON(_LOGPROBS(command))


@dataclasses.dataclass(frozen=True)
class Run:
    """Values of the common options."""

    model: str | None
    stats: bool
    sampling: SamplingOptions
    loading: dict[str, Any]

    def load(self, images: Sequence[ImageSource], goal: Goal = "caption") -> VLM:
        """Loads the model and begins with the pictures of the first question; says so once when it
        is the built-in one that nobody asked for.
        """
        model = self.model if self.model is not None else store.default()
        if model is None:
            click.echo(
                "Using pico, the small built-in model: it knows drawn scenes only. For photographs "
                "`edgevlm pull smolvlm-256m`.",
                err=True,
            )
        return edgevlm.load(model, goal=goal, image=images, progress=tile_progress, **self.loading)


def read_sources(images: tuple[str, ...]) -> list[str | bytes]:
    """Replaces `-` by the bytes on stdin."""
    if images.count("-") > 1:
        raise click.UsageError("stdin (-) can be one picture only")
    return [_stdin() if image == "-" else image for image in images]


def read_pictures(images: tuple[str, ...]) -> list[str | bytes]:
    """The same for a command that needs a picture; raises UsageError where there is none."""
    if not images:
        raise click.UsageError("name a picture with -i")
    return read_sources(images)


def _stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("stdin", "is closed; pipe a picture into the command")
    try:
        data = sys.stdin.buffer.read()
    except OSError as e:
        raise ImageError("stdin", f"cannot be read ({e.strerror})") from None
    if not data:
        raise ImageError("stdin", "is empty; pipe a picture into the command")
    return data


def show(answer: Answer, vlm: VLM, *, as_json: bool, stats: bool, markdown: bool = False) -> None:
    """Streams an answer to stdout, or prints it as JSON; then what there is to say about it. With
    `markdown` it is laid out where stdout is a terminal, unless it was held to a form.

    Raises PromptError at the end where it was held to a form and is not whole.
    """
    laid_out = markdown and not as_json and not answer.reply.constraint and _can_lay_out()
    try:
        (_lay_out if laid_out else _stream)(answer, as_json)
    finally:
        tile_progress.erase()
    reply = answer.reply
    if as_json:
        click.echo(json.dumps(as_dict(reply)))
    print_notes(reply, vlm, stats=stats)
    if reply.constraint:
        _ = reply.parsed


def _stream(answer: Answer, silent: bool) -> None:
    for piece in answer:
        if not silent:
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
    if not silent:
        click.echo("")


def _lay_out(answer: Answer, _: bool) -> None:
    from edgevlm.cli.markdown import StreamedMarkdown

    laid_out = StreamedMarkdown()
    try:
        for piece in answer:
            laid_out.feed(piece.text)
    finally:
        laid_out.close()


def _can_lay_out() -> bool:
    """True where answers can be laid out: on a terminal that can go up and knows the signs."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return sys.stdout.isatty() and not dumb and encoding.startswith("utf")


# Said of all that an answer waits for: one terminal has one such line.
tile_progress = StageLine()


def print_notes(reply: Reply, vlm: VLM, *, stats: bool) -> None:
    """Says on stderr where an answer was cut and, with `stats`, what took how long."""
    n, context = reply.tokens, vlm.manifest.decoder.context_length
    if reply.constraint:
        pass  # whoever reads the answer is told by an error
    elif reply.finish_reason == "length" and n.prompt + n.generated >= context:
        click.echo(f"Cut at {n.generated} tokens: the context of {context} is full.", err=True)
    elif reply.finish_reason == "length":
        click.echo(f"Cut at {n.generated} tokens; --max-tokens raises the limit.", err=True)
    if stats:
        print_stats(reply, vlm.devices)


def as_dict(reply: Reply) -> dict[str, Any]:
    """A reply as JSON has it, the bytes of tokens as numbers; boxes, points and log-probabilities
    only where there are some, `parsed` where it fits a schema.
    """
    data = dataclasses.asdict(dataclasses.replace(reply, constraint=None, picture=None))
    del data["constraint"], data["picture"], data["size"]
    if reply.constraint and reply.constraint.kind == "schema":
        with contextlib.suppress(PromptError):
            data["parsed"] = reply.parsed
    data["timings"] = {k: round(v, 3) for k, v in data["timings"].items()}
    for token in data["logprobs"]:
        for one in (token, *token["top"]):
            one["data"] = list(one["data"])
        for one in token["top"]:
            del one["top"]
    for box in data["boxes"]:
        del box["mask"]
    for key in ("boxes", "points", "logprobs"):
        if not data[key]:
            del data[key]
    return data


def print_stats(reply: Reply, devices: Devices) -> None:
    """Prints the stages of an answer, and what ran them, as a table to stderr."""
    from rich.console import Console
    from rich.table import Table

    from edgevlm.runtimes.memory import peak_bytes

    t, n = reply.timings, reply.tokens
    image = f"{n.image} ({n.tiles} tiles)" if n.tiles > 1 else n.image
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, ms, note in (
        ("load", t.load_ms, ""),
        ("image decode", t.image_decode_ms, ""),
        ("preprocess", t.preprocess_ms, ""),
        ("vision", t.vision_ms, ""),
        ("projector", t.projector_ms, ""),
        ("prefill", t.prefill_ms, f"{reply.prefill_tokens_per_s:.0f} tok/s"),
        ("first token", t.first_token_ms, "since the request"),
        ("decode", t.decode_ms, f"{reply.decode_tokens_per_s:.1f} tok/s"),
        ("total", t.total_ms, "since the request"),
    ):
        table.add_row(name, f"{ms:.1f} ms", note)
    table.add_row("tokens in", str(n.prompt), f"image {image}, text {n.text}, cached {n.cached}")
    table.add_row("tokens out", str(n.generated), reply.finish_reason)
    if peak := peak_bytes():
        table.add_row("peak memory", f"{peak / 2**20:.0f} MiB", "of this process")
    console = Console(stderr=True, markup=False, highlight=False)
    console.print(table)
    for part, placement in (("vision", devices.vision), ("decoder", devices.decoder)):
        console.print(f"{part} on {placement}", soft_wrap=True)
        for note in placement.notes:
            console.print(f"  skipped {note}", style="dim", soft_wrap=True)
