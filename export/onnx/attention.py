"""Attention as one operator of onnxruntime's, in graphs that only processors run.

A tower's float32 graph states attention in parts, which all providers read; OpenVINO, QNN and Core
ML know no operator for the whole. The processor's goes block by block and keeps no scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import helper, numpy_helper

from edgevlm.export.onnx.graph import MICROSOFT


def join(model: Any) -> None:
    """Replaces the parts of each attention without a mask, as layers.attention writes them, by one
    operator, in place; not where queries are the same for all of a batch, which it would not
    repeat. What nothing reads any more stays among the initializers.
    """
    graph = model.graph
    found = _Graph(graph)
    wholes = {a.last.name: a for node in graph.node if (a := found.attention(node))}
    gone = {part.name for a in wholes.values() for part in a.parts}
    nodes = [
        wholes[node.name].operator() if node.name in wholes else node
        for node in graph.node
        if node.name not in gone
    ]
    made = {name for node in nodes for name in node.output}
    values = [value for value in graph.value_info if value.name in made]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.value_info.extend(values)
    if MICROSOFT not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


@dataclass(frozen=True)
class _Attention:
    """Names of queries, keys and values [n, rows, width], the parts but the last, and that one."""

    given: Sequence[str]
    heads: int
    parts: Sequence[Any]
    last: Any

    def operator(self) -> Any:
        """The one operator in their place; it scales scores by the root of a head's width."""
        return helper.make_node(
            "MultiHeadAttention",
            self.given,
            self.last.output,
            self.last.name,
            domain=MICROSOFT,
            num_heads=self.heads,
        )


class _NotAttentionError(Exception):
    """A node is not made of what attention is."""


class _Graph:
    """A graph's nodes by what they make."""

    def __init__(self, graph: Any) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._sizes = {tensor.name: tensor for tensor in graph.initializer}
        # What comes of the input, and so has as many rows as the batch.
        self._batched = {value.name for value in graph.input}
        for node in graph.node:
            if not self._batched.isdisjoint(node.input):
                self._batched.update(node.output)

    def attention(self, last: Any) -> _Attention | None:
        """The attention that a node is the last of, which puts its heads side by side again; None
        where it does something else.
        """
        try:
            return self._attention(last) if last.op_type == "Reshape" else None
        except _NotAttentionError:
            return None

    def _attention(self, last: Any) -> _Attention:
        back = self._made("Transpose", last.input[0])
        rows = [n for n in [self._makers.get(back.input[0])] if n and n.op_type == "Concat"]
        reads = [self._read(name) for name in (rows or [back])[0].input]
        if len({ends for ends, _ in reads}) > 1:
            raise _NotAttentionError
        parts = [*rows, back, *(part for _, each in reads for part in each)]
        by_head = []
        for end in reads[0][0]:
            transpose = self._made("Transpose", end)
            by_head.append(self._made("Reshape", transpose.input[0]))
            parts += [transpose, by_head[-1]]
        given = [reshape.input[0] for reshape in by_head]
        if not self._batched.issuperset(given):
            raise _NotAttentionError
        heads = int(numpy_helper.to_array(self._sizes[by_head[0].input[1]])[-2])
        return _Attention(given, heads, parts, last)

    def _read(self, name: str) -> tuple[tuple[str, str, str], list[Any]]:
        """The names of queries, keys and values, by heads, of what some of the queries read, and
        the parts that do it.
        """
        read = self._made("MatMul", name)
        weights = self._made("Softmax", read.input[0])
        scores = self._made("Mul", weights.input[0])
        product = self._made("MatMul", scores.input[0])
        queries, some = product.input[0], []
        if queries in self._makers and self._makers[queries].op_type == "Slice":
            some = [self._makers[queries]]
            queries = some[0].input[0]
        parts = [*some, product, scores, weights, read]
        return (queries, product.input[1], read.input[1]), parts

    def _made(self, operator: str, name: str) -> Any:
        """The node that makes it; raises _NotAttentionError where that is another operator."""
        node = self._makers.get(name)
        if node is None or node.op_type != operator:
            raise _NotAttentionError
        return node
