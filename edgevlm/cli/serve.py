"""edgevlm serve"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgevlm
from edgevlm import machine, store
from edgevlm.cli.common import loading
from edgevlm.cli.dual import PULL, DualRun
from edgevlm.cli.names import InstalledName
from edgevlm.cli.signals import beside
from edgevlm.errors import EdgeVLMError, EngineMissing, PromptError
from edgevlm.models import BUILT_IN, installed, is_dual, resolve

if TYPE_CHECKING:
    from edgevlm.server.access import Access
    from edgevlm.server.limits import Limits
    from edgevlm.server.photos import Photos
    from edgevlm.server.pool import AnyModel, Pool

# Of the memory that is free at the start; the rest is for pictures and other programs.
_SHARE = 0.8


@click.command()
@click.argument("models", nargs=-1, type=InstalledName(), metavar="[MODEL]...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    help="Address to listen on; beyond this machine it needs a key.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Port to listen on; 0 for any that is free.",
)
@click.option(
    "--api-key",
    envvar="EDGEVLM_API_KEY",
    metavar="KEY",
    help="Key that clients must send  [env: EDGEVLM_API_KEY]",
)
@click.option("--no-api-key", is_flag=True, help="Serve other machines without a key.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Name by which clients call this machine; repeatable.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of web pages that may ask, https://app.example; repeatable.",
)
@click.option(
    "--allow-image-urls",
    "image_urls",
    is_flag=True,
    help="Fetch pictures and videos from http and https URLs on the internet.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Memory for models  [default: 80% of what is free]",
)
@click.option(
    "--idle-minutes",
    default=15.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="N",
    help="Unload a model after so long without a request; 0 for never.",
)
@click.option(
    "--max-requests",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Most requests at once, running and waiting.",
)
@click.option(
    "--max-request-mb",
    default=50.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    help="Largest request, pictures and videos included.",
)
@click.option(
    "--max-pictures",
    default=16,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Most pictures and videos in one request.",
)
@click.option(
    "--max-megapixels",
    default=50.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="MP",
    help="Largest picture, or frame of a video.",
)
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest time of a request, waiting included.",
)
@click.option(
    "--photos",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder whose pictures are indexed and searched by a CLIP or SigLIP, at /photos.",
)
@click.option(
    "--index",
    "index_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of the index  [default: one in the cache folder]",
)
@loading
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    memory: float | None,
    idle_minutes: float,
    folder: Path | None,
    index_path: Path | None,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Serve models over HTTP, in the shape of OpenAI's API, and pages to ask them and to search.

    MODEL is a bundle folder or an installed name; without any all installed models are offered.
    The first one, or the default model, is loaded at once, others when they are asked.
    """  # fmt: skip
    if index_path and not folder:
        raise click.UsageError("--index goes with --photos")
    _check_packages()
    from edgevlm.server.app import make_server
    from edgevlm.server.listening import Runner, listen, url

    access, limits = _access(host, options), _limits(options)
    budget = memory * 1e9 if memory else _SHARE * machine.memory().free_bytes
    pool, first = _pool(models, int(budget), idle_minutes, loading)
    searching = _searching(pool, named=bool(models)) if folder else None
    made, photos = listen(host, port), None
    try:
        loaded = {
            name: beside(partial(_load, pool.offered()[name], loading))
            for name in dict.fromkeys(filter(None, (first, searching)))
        }
        for name, model in loaded.items():
            pool.add(name, model)
        if folder and searching:
            photos = _photos(folder, index_path, searching, loaded[searching], limits)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        click.echo(f"Serving {', '.join(pool.offered())} at {url(made)}; Ctrl-C ends.", err=True)
        if folder:
            click.echo(f"Pictures of {folder} are searched at {url(made)}/photos.", err=True)
        Runner(make_server(pool, access, limits, photos)).run([made])
    finally:
        made.close()
        if photos:
            photos.close()


def _load(folder: Path, loading: Mapping[str, Any]) -> AnyModel:
    """A model of either kind; of one that embeds the options of decoders are nothing's."""
    if not is_dual(folder):
        return edgevlm.load(folder, **loading)
    device = loading.get("vision_device") or loading.get("device") or "auto"
    return edgevlm.load_dual(folder, device=device, threads=loading.get("threads"))


def _searching(pool: Pool, named: bool) -> str:
    """The name of the model that pictures are searched with: the first that embeds of those that
    were named, else the one that `edgevlm search` takes.
    """
    duals = {name: folder for name, folder in pool.offered().items() if is_dual(folder)}
    if named and not duals:
        raise PromptError(
            f"--photos is searched by a CLIP or SigLIP; name one with the models: {PULL}"
        )
    if not named:
        folder = DualRun(None, None, "auto").folder
        duals = {name: found for name, found in duals.items() if found == folder}
    name = next(iter(duals))
    if excess := pool.excess(name):
        raise EdgeVLMError(excess)
    return name


def _photos(folder: Path, path: Path | None, name: str, model: AnyModel, limits: Limits) -> Photos:
    from edgevlm.photos import PhotoIndex
    from edgevlm.runtimes.dual import DualEncoder
    from edgevlm.server.photos import Photos

    assert isinstance(model, DualEncoder)
    return Photos(PhotoIndex(folder, model, path=path), name, limits)


def _check_packages() -> None:
    for name in ("starlette", "uvicorn", "prometheus_client"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise EngineMissing(
                f"{name} is missing, which the server needs", 'pip install "edgevlm[server]"'
            ) from None


def _access(host: str, options: Mapping[str, Any]) -> Access:
    from edgevlm.server.access import Access

    key = options["api_key"] or None
    if key and not re.fullmatch("[!-~]+", key):
        raise click.UsageError("the key must be of letters, digits and signs of ASCII")
    if key and options["no_api_key"]:
        raise click.UsageError("--no-api-key goes without --api-key and EDGEVLM_API_KEY")
    if key is None and not options["no_api_key"] and not _is_loopback(host):
        raise click.UsageError(
            f"--host {host} lets other machines ask; set a key with EDGEVLM_API_KEY or --api-key, "
            "or give --no-api-key"
        )
    origins = tuple(origin.rstrip("/") for origin in options["origins"])
    for origin in origins:
        if "://" not in origin or origin.count("/") > 2:
            raise click.BadParameter(f"{origin} is not an origin; write it as https://app.example")
    return Access(key, (host, *options["hosts"]), origins)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _limits(options: Mapping[str, Any]) -> Limits:
    from edgevlm.server.limits import Limits

    return Limits(
        body_bytes=int(options["max_request_mb"] * 2**20),
        pictures=options["max_pictures"],
        pixels=int(options["max_megapixels"] * 1e6),
        requests=options["max_requests"],
        seconds=options["timeout"],
        image_urls=options["image_urls"],
    )


def _pool(
    models: tuple[str, ...], budget: int, idle_minutes: float, loading: dict[str, Any]
) -> tuple[Pool, str]:
    """The pool, and the name of the model that is loaded first."""
    from edgevlm.server.pool import BASE_BYTES, Pool

    named = _named(models)
    pool = Pool(
        lambda: named or installed(),
        partial(_load, loading=loading),
        budget=budget - BASE_BYTES,
        idle_s=idle_minutes * 60 or None,
    )
    default = store.default()
    if default is None or is_dual(installed().get(default, Path())):
        default = BUILT_IN
    first = next(iter(named)) if named else default
    resolve(first if not named else named[first])
    for name in named or [first]:
        if excess := pool.excess(name):
            raise EdgeVLMError(excess)
    return pool, first


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def _named(models: tuple[str, ...]) -> dict[str, Path]:
    """Folders by the names that clients say: a folder goes by its own name."""
    named: dict[str, Path] = {}
    for model in models:
        folder = resolve(model)
        name = model if model in installed() and not Path(model).exists() else _name(folder)
        if named.setdefault(name, folder) != folder:
            raise click.UsageError(f"two models go by the name {name}; rename one of the folders")
    return named
