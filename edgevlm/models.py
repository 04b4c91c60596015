"""Names of models on this machine: the built-in one and the folders in the models directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from edgevlm import catalogue
from edgevlm.errors import BundleError, BundleNotFound, PromptError
from edgevlm.manifest import MANIFEST, Manifest, read_manifest

BUILT_IN = "pico"
# A folder that cannot be made, for a user without a home.
_NOWHERE = Path(os.devnull, "edgevlm")


def _home() -> Path | None:
    """$EDGEVLM_HOME, whose ~ no shell has expanded where a file of settings names it."""
    home = os.environ.get("EDGEVLM_HOME")
    if not home:
        return None
    expanded = os.path.expanduser(home)
    return _NOWHERE if expanded.split("/")[0] == "~" else Path(expanded)


def directory() -> Path:
    """The folder of named models: $EDGEVLM_HOME/models or the user's data folder."""
    if home := _home():
        return home / "models"
    import platformdirs

    return _placed(platformdirs.user_data_dir) / "models"


def default_file() -> Path:
    """The file that names the default model."""
    return directory().parent / "default"


def cache_directory() -> Path:
    """The folder of what can be made again: $EDGEVLM_HOME/cache or the user's cache folder."""
    if home := _home():
        return home / "cache"
    import platformdirs

    return _placed(platformdirs.user_cache_dir)


def _placed(find: Callable[..., str]) -> Path:
    """A folder of the user's; one that cannot be made for a system's user, who has no home."""
    try:
        folder = find("edgevlm", appauthor=False)
    except RuntimeError:
        folder = ""
    # Older releases of platformdirs answer with a folder named ~ in the current one.
    return Path(folder) if os.path.isabs(folder) else _NOWHERE


def built_in() -> Path:
    """The folder of the built-in model."""
    return Path(__file__).parent / "assets" / BUILT_IN


def installed() -> dict[str, Path]:
    """All models that go by a name here, the built-in one first."""
    found = {BUILT_IN: built_in()}
    try:
        folders = sorted(directory().iterdir())
    except OSError:  # None was ever installed, or the home is somebody else's.
        folders = []
    for folder in folders:
        # One that begins with a dot is being written.
        if os.path.isfile(folder / MANIFEST) and not folder.name.startswith("."):
            found.setdefault(folder.name, folder)
    return found


def is_dual(folder: Path) -> bool:
    """True for the folder of a dual encoder's bundle, which embeds and answers nothing; one that
    cannot be read is none.
    """
    try:
        return read_manifest(folder).text is not None
    except BundleError:
        return False


def check_answers(manifest: Manifest) -> None:
    """Raises PromptError for the manifest of a model that embeds and answers nothing."""
    if manifest.text:
        raise PromptError(
            f"{manifest.name}: embeds pictures and texts and answers nothing; `edgevlm classify`, "
            "`embed` and `search` use it, in Python edgevlm.load_dual; `edgevlm use` chooses "
            "another for answers"
        )


def resolve(model: str | os.PathLike[str] | None) -> Path:
    """The bundle folder of a path, a name, or None for the built-in model.

    An existing path wins over a name. Raises BundleNotFound.
    """
    if model is None:
        return built_in()
    if not os.fspath(model):
        raise BundleNotFound(
            "the model's name is empty; name a bundle folder or an installed model"
        )
    path = Path(model)
    if os.path.exists(path):
        return path
    if isinstance(model, str) and model in installed():
        return installed()[model]
    raise unknown(os.fspath(model))


def unknown(name: str) -> BundleNotFound:
    """The error for a name that no model here has: how to get it, or names that are near it."""
    if known := catalogue.entry(name):
        return BundleNotFound(
            f"{name}: is not installed; `edgevlm pull {known.name}` gets it "
            f"({known.download / 1e9:.1f} GB to download)"
        )
    names = installed()
    if close := catalogue.near(name, [*names, *catalogue.entries()]):
        return BundleNotFound(
            f"{name}: no such bundle folder or model; did you mean {' or '.join(close)}?"
        )
    return BundleNotFound(
        f"{name}: no such bundle folder, and no installed model has this name "
        f"(there are: {', '.join(names)}); `edgevlm models --all` lists what can be had"
    )
