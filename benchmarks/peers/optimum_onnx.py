"""Optimum's ONNX export of whole models: which kinds of model it has, it says itself."""

from __future__ import annotations

from typing import Any

TITLE = "optimum-onnx"
PACKAGE = "optimum-onnx"
INSTALL = "pip install optimum-onnx"
NEEDS = ("config",)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Raises optimum's own error: no release up to 0.1 can export a model that reads pictures and
    words, and what cannot be exported cannot be timed.
    """
    import optimum.exporters.onnx.model_configs  # noqa: F401  (registers the kinds of model)
    from optimum.exporters.tasks import TasksManager

    kind = task["config"]["model_type"]
    try:
        found = TasksManager.get_supported_tasks_for_model_type(
            kind, exporter="onnx", library_name="transformers"
        )
    except KeyError:
        raise NotImplementedError(f"has no export of {kind}") from None
    raise NotImplementedError(
        f"exports {kind} for {', '.join(sorted(found))}; this peer knows no way to ask it"
    )
