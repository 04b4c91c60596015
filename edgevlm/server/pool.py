"""Models that the server offers: loaded when they are asked, within a budget of memory.

A model in use never goes. Where a new one has no room, idle ones go, the least recently used first;
where none is idle the request waits for one, and those that come after it wait behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from edgevlm.errors import EdgeVLMError
from edgevlm.image.urls import one_line
from edgevlm.manifest import Manifest, read_manifest
from edgevlm.runtimes.dual import DualEncoder
from edgevlm.runtimes.session import VLM
from edgevlm.server.problems import Problem, invalid, quoted

AnyModel = VLM | DualEncoder

log = logging.getLogger("edgevlm.server")

# Python, both engines and their buffers, whatever the model.
BASE_BYTES = 300 << 20
# Positions that most answers stay below; float16 keys and values of full width.
_KV_POSITIONS, _KV_BYTES = 2048, 4


def needed_bytes(manifest: Manifest) -> int:
    """Memory that a loaded model takes, estimated from the sizes of its files and of its KV cache.

    A little more than it is: decoders with grouped heads keep less.
    """
    files = sum(r.bytes for c in manifest.components.values() for r in c.files)
    decoder = manifest.decoder
    positions = min(decoder.context_length, _KV_POSITIONS)
    return int(1.05 * files) + decoder.n_layer * decoder.n_embd * positions * _KV_BYTES


def _copied_bytes(model: AnyModel) -> int:
    """Memory of a re-ordered copy of the decoder's weights beside those of its file, in bytes."""
    decoder = model.manifest.components.get("decoder")
    if decoder is None or isinstance(model, DualEncoder) or model.settings.repacking != "decode":
        return 0
    return sum(r.bytes for r in decoder.files)


class LoadedModel:
    """A model in memory or on its way there: `model` is there once `loading` has ended. Its
    requests are answered one after the other, by whoever holds `turn`.
    """

    def __init__(self, name: str, bytes: int) -> None:
        self.name, self.bytes = name, bytes
        self.users = 0
        self.last_used = 0.0
        self.turn = asyncio.Lock()
        self.loading: asyncio.Task[AnyModel] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.model: AnyModel | None = None

    @property
    def vlm(self) -> VLM:
        """The model, which was loaded. Raises Problem where it answers no questions."""
        if isinstance(self.model, DualEncoder):
            raise _other_kind(self.name, "embeds and answers nothing; POST /v1/embeddings asks it")
        assert self.model is not None
        return self.model

    @property
    def dual(self) -> DualEncoder:
        """The model, which was loaded. Raises Problem where it embeds no texts."""
        if not isinstance(self.model, DualEncoder):
            raise _other_kind(
                self.name, "answers questions and embeds no texts; a CLIP or SigLIP does"
            )
        return self.model

    @property
    def idle(self) -> bool:
        """True where nobody uses it and nobody waits for it."""
        return self.model is not None and self.users == 0


class Pool:
    """Models by name. `offered` gives their folders, `load` a model from one; `budget` is the
    memory in bytes for all of them. One that was idle for `idle_s` seconds is unloaded; None for
    never. From `begin` on everything is called in one event loop.
    """

    def __init__(
        self,
        offered: Callable[[], Mapping[str, Path]],
        load: Callable[[Path], AnyModel],
        *,
        budget: int,
        idle_s: float | None,
    ) -> None:
        self._offered, self._load = offered, load
        self._budget, self._idle_s = budget, idle_s
        self._models: dict[str, LoadedModel] = {}
        self._leaving: set[LoadedModel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._door = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory."""
        return [name for name, model in self._models.items() if model.loading is None]

    def offered(self) -> Mapping[str, Path]:
        """Folders of the models that may be asked, by name."""
        return self._offered()

    def needed(self, name: str) -> int:
        """Estimated memory of an offered model, in bytes. Raises BundleError."""
        return needed_bytes(read_manifest(self._offered()[name]))

    def excess(self, name: str) -> str:
        """The reason that a model does not fit the budget; empty where it does."""
        need = self.needed(name)
        if need <= self._budget:
            return ""
        return (
            f"{name} needs about {need / 1e9:.2g} GB of memory and the server has "
            f"{max(0, self._budget) / 1e9:.2g} GB for models; --memory raises that"
        )

    def begin(self) -> None:
        """Begins to count how long models are idle."""
        for model in self._models.values():
            self._rest(model)

    def add(self, name: str, model: AnyModel) -> None:
        """Puts a model in that was loaded elsewhere, before `begin`."""
        self._models[name] = LoadedModel(name, self.needed(name) + _copied_bytes(model))
        self._models[name].model = model

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[LoadedModel]:
        """A model that stays loaded until the end of the block. Raises Problem."""
        model = await self._entered(name)
        try:
            if model.loading:
                # Whoever waits may go; the others get the model all the same.
                model.model = await asyncio.shield(model.loading)
            yield model
        finally:
            self._leave(model)

    async def _entered(self, name: str) -> LoadedModel:
        if name not in self.offered():
            raise Problem(
                404,
                f"the model {quoted(name)} does not exist here; GET /v1/models lists those that do",
                code="model_not_found",
                param="model",
            )
        async with self._door:
            model = self._models.get(name)
            if model is None:
                model = await self._begun(name)
            model.users += 1
            if model.timer:
                model.timer.cancel()
            return model

    async def _begun(self, name: str) -> LoadedModel:
        """A model that is being loaded, in room of its own."""
        try:
            excess, need = self.excess(name), self.needed(name)
        except EdgeVLMError as e:
            raise _not_loaded(name, e) from None
        if excess:
            raise Problem(503, excess, code="model_unavailable", param="model")
        await self._make_room(need)
        model = self._models[name] = LoadedModel(name, need)
        model.loading = asyncio.create_task(self._loaded(model))
        # Those who waited may all have gone when it fails; the log has the reason then.
        model.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return model

    async def _loaded(self, model: LoadedModel) -> AnyModel:
        folder = self._offered().get(model.name)
        loop = asyncio.get_running_loop()
        try:
            if folder is None:
                raise EdgeVLMError(f"{model.name} was removed")
            found = await loop.run_in_executor(None, self._load, folder)
        except (EdgeVLMError, OSError) as e:
            self._drop(model)
            raise _not_loaded(model.name, e) from None
        except BaseException:
            self._drop(model)
            raise
        model.model, model.loading = found, None
        model.bytes += _copied_bytes(found)
        self._rest(model)
        return found

    async def _make_room(self, need: int) -> None:
        while self._used() + need > self._budget:
            idle = [model for model in self._models.values() if model.idle]
            if idle:
                self._unload(min(idle, key=lambda model: model.last_used))
            self._changed.clear()
            await self._changed.wait()

    def _used(self) -> int:
        return sum(model.bytes for model in (*self._models.values(), *self._leaving))

    def _leave(self, model: LoadedModel) -> None:
        model.users -= 1
        self._rest(model)

    def _rest(self, model: LoadedModel) -> None:
        """From now on the model may go, if nobody uses it."""
        loop = asyncio.get_running_loop()
        model.last_used = loop.time()
        if model.idle and self._idle_s is not None:
            model.timer = loop.call_later(self._idle_s, partial(self._unload, model))
        self._changed.set()

    def _unload(self, model: LoadedModel) -> None:
        """Begins to free a model that is idle; its room is free at the end of that."""
        if not model.idle or self._models.get(model.name) is not model:
            return
        del self._models[model.name]
        self._leaving.add(model)
        task = asyncio.create_task(self._freed(model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _freed(self, model: LoadedModel) -> None:
        if model.timer:
            model.timer.cancel()
        try:
            assert model.model is not None
            await asyncio.get_running_loop().run_in_executor(None, model.model.close)
        finally:
            self._drop(model)

    def _drop(self, model: LoadedModel) -> None:
        if self._models.get(model.name) is model:
            del self._models[model.name]
        self._leaving.discard(model)
        self._changed.set()

    async def close(self) -> None:
        """Frees every model, whoever uses it, and waits for that."""
        for model in [*self._models.values()]:
            if model.loading:
                await asyncio.wait([model.loading])
            model.users = 0
            self._unload(model)
        if self._tasks:
            await asyncio.wait(self._tasks)


def _other_kind(name: str, what: str) -> Problem:
    return invalid(f"{name}: {what}", "model", "unsupported_model")


def _not_loaded(name: str, error: Exception) -> Problem:
    log.error("%s cannot be loaded: %s", name, one_line(error))
    return Problem(
        503,
        f"the model {name} cannot be loaded; the server's log says why",
        code="model_unavailable",
        param="model",
    )
