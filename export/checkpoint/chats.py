"""Files of a checkpoint that say how a conversation is written, as far as that can be read.

None of them is run: a chat template of transformers stays a text, of a `conversation.py` as
InternVL publishes it, and of Moondream2's `moondream.py`, only what stands there literally is read.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import read_present
from edgevlm.family import Config

_JINJA, _JSON, _PYTHON = "chat_template.jinja", "chat_template.json", "conversation.py"
_MOONDREAM = "moondream.py"


def read_chats(folder: Path) -> dict[str, Config]:
    """The files of a folder by name, `chat_template` the key of a template's text, of
    conversation.py what each template is made of, by its name, and of moondream.py the `tokenizer`
    that it reads; raises SourceError.
    """
    found: dict[str, Config] = dict(read_present(folder, (_JSON,)))
    if (folder / _JINJA).is_file():
        found[_JINJA] = {"chat_template": _text(folder / _JINJA)}
    if (folder / _PYTHON).is_file():
        found[_PYTHON] = _conversations(folder / _PYTHON)
    if (folder / _MOONDREAM).is_file():
        found[_MOONDREAM] = _moondream(folder / _MOONDREAM)
    return found


def _conversations(path: Path) -> dict[str, dict[str, Any]]:
    """The templates of a conversation.py: each is made by a call of `Conversation` with keywords,
    literals or names of a constant.
    """
    found = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Conversation":
            values = {k.arg: _literal(k.value) for k in node.keywords if k.arg}
            if isinstance(name := values.get("name"), str):
                found[name] = values
    return found


def _moondream(path: Path) -> dict[str, Any]:
    """The name of the tokenizer that a moondream.py reads; nothing where it reads none."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Tokenizer.from_pretrained":
            return {"tokenizer": _literal(node.args[0])} if node.args else {}
    return {}


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(_text(path))
    except (SyntaxError, ValueError) as e:
        raise SourceError(f"{path}: cannot be read as Python ({e}); download it again") from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        return node.attr
    try:
        return ast.literal_eval(node)
    except ValueError:
        return f"code ({ast.unparse(node)})"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: cannot be read ({e}); download it again") from None
