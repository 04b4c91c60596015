"""Names of models as arguments and options, completed by the shell."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from edgevlm import catalogue
from edgevlm.models import installed


class InstalledName(click.types.StringParamType):
    """A model on this machine: a name, or with `folders` also a bundle folder."""

    def __init__(self, *, folders: bool = True) -> None:
        self._folders = folders

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin like this, then folders."""
        items = [CompletionItem(name) for name in installed() if name.startswith(incomplete)]
        return [*items, CompletionItem(incomplete, type="dir")] if self._folders else items


class CatalogueName(click.types.StringParamType):
    """A model that can be had: a name of the catalogue; the hub's are not completed."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin like this, each with its repository."""
        known = catalogue.entries().items()
        return [
            CompletionItem(name, help=entry.repo)
            for name, entry in known
            if name.startswith(incomplete)
        ]
