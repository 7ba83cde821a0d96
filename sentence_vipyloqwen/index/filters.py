"""``where``: a condition on metadata, written as in SQL and carried out by pyarrow.

sqlglot reads the text, and what it read becomes a ``pyarrow.compute.Expression``: no code is run, no file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlglot
from pyarrow import dataset
from sqlglot import exp

Where: TypeAlias = str | pc.Expression

ID = "id"
"""The item's own id may stand in a condition beside its metadata."""

ALLOWED = (
    "conditions as in SQL on metadata and id, such as: lang = 'vi' AND year >= 2024, page IN (1, 2), "
    "name LIKE 'HĐ%', NOT paid, total IS NULL, amount BETWEEN 5 AND 9, \"số tiền\" > 100, address.city = 'Huế'"
)

_COMPARE: Mapping[type[exp.Expression], Callable[[Any, Any], pc.Expression]] = {
    exp.EQ: lambda a, b: a == b,
    exp.NEQ: lambda a, b: a != b,
    exp.GT: lambda a, b: a > b,
    exp.GTE: lambda a, b: a >= b,
    exp.LT: lambda a, b: a < b,
    exp.LTE: lambda a, b: a <= b,
    exp.And: lambda a, b: a & b,
    exp.Or: lambda a, b: a | b,
}


def parse(where: str) -> pc.Expression:
    """Read a condition.

    >>> parse("lang = 'vi' AND page >= 2")
    <pyarrow.compute.Expression ((lang == "vi") and (page >= 2))>

    Raises:
        ValueError: If it is none that is allowed; the message says where it fails.
    """
    try:
        return _condition(sqlglot.parse_one(where, into=exp.Condition))
    except (sqlglot.errors.SqlglotError, RecursionError, OverflowError) as error:
        raise ValueError(f"where is {where!r}: {str(error).splitlines()[0]}; allowed are {ALLOWED}.") from error
    except _NotAllowed as error:
        raise ValueError(f"where is {where!r}: {error} cannot stand in it; allowed are {ALLOWED}.") from error


class _NotAllowed(Exception):
    """A piece of SQL that is no condition on metadata."""


def _translate(node: exp.Expression) -> Any:
    """A node of the tree in pyarrow's terms: an expression, or a plain value."""
    kind = type(node)
    if kind in _COMPARE:
        return _COMPARE[kind](_translate(node.this), _translate(node.expression))
    if kind is exp.Paren:
        return _translate(node.this)
    if kind is exp.Not:
        return ~_condition(node.this)
    if kind is exp.Column:
        return pc.field(*[part.name for part in node.parts])
    if kind in (exp.Literal, exp.Boolean, exp.Neg):
        return _value(node)
    if kind is exp.In and node.expressions:
        return _translate(node.this).isin([_value(value) for value in node.expressions])
    if kind is exp.Between:
        field = _translate(node.this)
        return (field >= _translate(node.args["low"])) & (field <= _translate(node.args["high"]))
    if kind is exp.Is and isinstance(node.expression, exp.Null):
        return _translate(node.this).is_null()
    if kind in (exp.Like, exp.ILike):
        options = pc.MatchSubstringOptions(_value(node.expression), ignore_case=kind is exp.ILike)
        return pc.Expression._call("match_like", [_translate(node.this)], options)
    raise _NotAllowed(node.sql())


def _condition(node: exp.Expression) -> pc.Expression:
    translated = _translate(node)
    if not isinstance(translated, pc.Expression):
        raise _NotAllowed(node.sql())
    return translated


def _value(node: exp.Expression) -> Any:
    if isinstance(node, exp.Neg):
        return -_value(node.this)
    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Literal):
        return node.this if node.is_string else json.loads(node.this)
    raise _NotAllowed(node.sql())


def metadata_table(items: pa.Table) -> pa.Table:
    """The items' metadata as columns, ``id`` beside them.

    A key whose values are of several kinds is compared as text (JSON where a value is none).

    Args:
        items: With the columns ``id`` and ``metadata`` (JSON).
    """
    rows = [json.loads(text) for text in items["metadata"].to_pylist()]
    keys = sorted({key for row in rows for key in row} - {ID})
    columns = {key: _column([row.get(key) for row in rows]) for key in keys}
    return pa.table({ID: items[ID], **columns})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        as_text = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)
        return pa.array([text if value is not None else None for text, value in zip(as_text, values, strict=True)])


def matching(table: pa.Table, where: Where) -> np.ndarray:
    """Rows that satisfy a condition; null is not true.

    Args:
        table: Of :func:`metadata_table`.
        where: The condition.

    Returns:
        (rows,) bool.

    Raises:
        ValueError: If it names a key that no item has, or compares what cannot be compared.
    """
    condition = parse(where) if isinstance(where, str) else where
    if not isinstance(condition, pc.Expression):
        raise ValueError(f"where is a {type(where).__name__}; allowed are a str and a pyarrow.compute.Expression.")
    numbered = table.append_column("", pa.array(np.arange(table.num_rows)))
    try:
        found = dataset.dataset(numbered).to_table(filter=condition, columns=[""])
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"where is {str(where)!r}: {reason}; the keys are {table.column_names}.") from error
    mask = np.zeros(table.num_rows, dtype=bool)
    mask[found[""].to_numpy()] = True
    return mask


def all_of(masks: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """The rows that all masks let through; ``None``, for a mask as for the result, lets all of them."""
    given = [mask for mask in masks if mask is not None]
    return reduce(np.logical_and, given) if given else None
