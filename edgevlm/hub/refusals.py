"""The hub client's errors, said in one line with the cure."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgevlm.errors import HubError

# A full disk names no file.
FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def told(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the hub client raises within the block into a HubError; the client's own progress
    bars and warnings stay away from stderr.
    """
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    try:
        with _quiet():
            yield
    except errors.GatedRepoError:
        raise HubError(
            f"{where}: access is restricted; accept its licence at {page(repo)} and {_LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{where}: has no such revision; leave out the part after @") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{where}: is neither a folder here nor a model on the hub; check the spelling, or "
            f"{_LOG_IN} if it is private"
        ) from None
    except errors.HFValidationError as e:
        raise HubError(f"{where}: is not a valid name on the hub ({line(e)})") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(
            f"{where}: is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download"
        ) from None
    except transport() as e:
        raise HubError(f"{where}: {_failed(e)}") from None
    except RuntimeError as e:
        # The client makes one of what ends an upload.
        if not isinstance(e.__cause__, transport()):
            raise
        raise HubError(f"{where}: {_failed(e.__cause__)}") from None


def _failed(error: BaseException) -> str:
    if getattr(error, "filename", None) or getattr(error, "errno", None) in FULL:
        return f"cannot be kept on this disk ({line(error)}); HF_HOME names another folder"
    if status(error) == 401:
        return f"access is denied ({line(error)}); {_LOG_IN}"
    if status(error) == 403:
        return f"the hub refuses this ({line(error)}); your token has no right to it"
    return f"the hub cannot be reached ({line(error)}); check the network, the same command goes on"


def transport() -> tuple[type[BaseException], ...]:
    """Errors of the network, the hub and the disk: requests' are OSErrors, httpx's are not, and
    releases of the client differ in which they use.
    """
    from huggingface_hub import errors

    found: list[type[BaseException]] = [
        OSError,
        errors.LocalEntryNotFoundError,
        errors.HfHubHTTPError,
    ]
    for name in ("httpx", "httpx2"):
        if module := sys.modules.get(name):
            found.append(module.HTTPError)
    return tuple(found)


def status(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    response: Any = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def page(repo: str) -> str:
    """The address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub import utils

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # The client re-exports these without saying so to type checkers.
    bars: Any = utils
    silent = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not silent:
            bars.enable_progress_bars()
