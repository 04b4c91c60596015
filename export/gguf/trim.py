"""A decoder cut in two: what writes an answer, with the rows of some tokens alone, and what reads
a question, with the token embeddings and the tokenizer of all.

llama.cpp wants as many rows of both tables as there are tokens, so the first file has a vocabulary
of its own, in which the tokens that are kept follow each other, and their ids in the metadata.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.bundle import INPUT
from edgevlm.errors import ExportError
from edgevlm.export.gguf.decoder import FILE, TOKEN_EMBEDDING
from edgevlm.export.gguf.rewrite import Metadata, Taken, rewrite
from edgevlm.gguf_file import KEPT, GGUFFile, opened
from edgevlm.progress import Report, Stage

Ids = npt.NDArray[np.int64]

OUTPUT = "output.weight"
_TABLES = (TOKEN_EMBEDDING, OUTPUT)
# A matrix whose number of rows is no multiple of this goes through other kernels of ggml, which
# round otherwise: the remaining rows are as many of these and the same rest as all rows.
_ROWS = 64
_TOKENS = "tokenizer.ggml."


def trim(folder: Path, kept: Ids, report: Report | None) -> int:
    """Splits the decoder in `folder`; returns the number of rows that are left.

    `kept` are ids in ascending order; some more are kept where ggml's kernels want them. Raises
    ExportError where that would be all of them.
    """
    whole, made = folder / FILE, folder / "trimmed.gguf"
    with opened(whole) as file:
        tensors = file.tensors()
        rows = padded(kept, tensors[TOKEN_EMBEDDING].rows)
        stage = Stage(report, "trim", sum(tensor.n_bytes for tensor in tensors.values()), "B")
        trimmed = {
            name: Taken(whole, tensor, rows if name in _TABLES else None)
            for name, tensor in tensors.items()
        }
        rewrite(made, file, vocabulary(file, rows), trimmed, stage)
        table = {TOKEN_EMBEDDING: Taken(whole, tensors[TOKEN_EMBEDDING])}
        rewrite(folder / INPUT, file, {}, table, stage)
        stage.finish()
    made.replace(whole)
    return len(rows)


def join(decoder: Path, input: Path, target: Path, report: Report | None) -> Ids:
    """Writes a decoder with the rows of all tokens from the two files of a trimmed one, so that it
    can be quantized as one; returns the ids that had been kept.

    Rows of an output matrix of its own that were left out are zeros.
    """
    with opened(decoder) as cut, opened(input) as file:
        kept, tensors = cut.integers(KEPT), cut.tensors()
        assert kept is not None
        table = file.tensors()[TOKEN_EMBEDDING]
        spread = np.full(table.rows, -1, np.int64)
        spread[kept] = np.arange(len(kept))
        taken = {name: Taken(decoder, tensor) for name, tensor in tensors.items()}
        taken[TOKEN_EMBEDDING] = Taken(input, table)
        if OUTPUT in tensors:
            taken[OUTPUT] = Taken(decoder, tensors[OUTPUT], spread)
        stage = Stage(report, "join", sum(t.n_bytes for t in tensors.values()), "B")
        rewrite(target, file, {}, taken, stage)
        stage.finish()
    return kept.astype(np.int64)


def padded(kept: Ids, n: int) -> Ids:
    """The ids with the first of the others, so many that ggml computes each row as among all n.

    Raises ExportError where none of the n would be left out.
    """
    missing = (n - len(kept)) % _ROWS
    others = np.setdiff1d(np.arange(n), kept)
    if missing >= len(others):
        raise ExportError(
            f"these languages need {len(kept)} of the model's {n} tokens, so that nothing would be "
            "saved; leave out --languages"
        )
    return np.union1d(kept, others[:missing])


def vocabulary(file: GGUFFile, rows: Ids) -> Metadata:
    """The metadata of a vocabulary of these tokens."""
    names = file.texts(f"{_TOKENS}tokens")
    texts = [names[i] for i in rows]
    changed: dict[str, int | list[str] | npt.NDArray[np.generic]] = {
        KEPT: rows.astype(np.int32),
        f"{_TOKENS}tokens": texts,
    }
    types, scores = file.integers(f"{_TOKENS}token_type"), file.floats(f"{_TOKENS}scores")
    if types is not None:
        changed[f"{_TOKENS}token_type"] = types[rows]
    if scores is not None:
        changed[f"{_TOKENS}scores"] = scores[rows]
    if f"{_TOKENS}merges" in file.keys():
        known = {*texts}
        pairs = [(merge, merge.split(" ")) for merge in file.texts(f"{_TOKENS}merges")]
        changed[f"{_TOKENS}merges"] = [
            merge for merge, pair in pairs if known.issuperset((*pair, "".join(pair)))
        ]
    at = {int(token): row for row, token in enumerate(rows)}
    for key in file.keys():
        if key.startswith(_TOKENS) and key.endswith("_token_id"):
            changed[key] = at[file.number(key, 0)]
    return changed
