from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from sentence_vipyloqwen.index.filters import matching, metadata_table

METADATA = [
    {"lang": "vi", "page": 1, "số tiền": 5, "a": {"b": 1}, "paid": True},
    {"lang": "en", "page": 2, "mixed": 1},
    {"lang": "vi", "mixed": "x", "day": "2024-01-01", "id": "shadowed"},
]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return metadata_table(pa.table({"id": ["a", "b", "c"], "metadata": [json.dumps(row) for row in METADATA]}))


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("lang = 'vi'", "ac"),
        ("lang <> 'vi' OR page = 1", "ab"),
        ("page >= 2", "b"),
        ("page > -1", "ab"),
        ("page IN (1, 3)", "a"),
        ("NOT lang = 'vi'", "b"),
        ("paid", "a"),
        ("page IS NULL", "c"),
        ("page IS NOT NULL", "ab"),
        ('"số tiền" > 4.5', "a"),
        ("a.b = 1", "a"),
        ("lang LIKE 'v%'", "ac"),
        ("lang ILIKE 'V_'", "ac"),
        ("page BETWEEN 1 AND 1", "a"),
        ("id = 'c'", "c"),
        ("mixed = '1'", "b"),
        ("day = '2024-01-01'", "c"),
        ("(lang = 'vi' AND page = 1) OR id IN ('b')", "ab"),
    ],
)
def test_conditions(table, where, found):
    assert [id for id, hit in zip("abc", matching(table, where), strict=True) if hit] == list(found)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nope = 1", "nope.*the keys are .*'lang'"),
        ("lang = 5", "no kernel matching"),
        ("lang =", "Failed to parse"),
        ("lang = 'vi'; DROP TABLE x", "Failed to parse"),
        ("(SELECT 1)", "SELECT 1.* cannot stand in it; allowed are conditions"),
        ("page IN (SELECT 1)", "cannot stand in it"),
        ("page + 1 = 2", r"page \+ 1 cannot stand in it"),
        ("READ_CSV('x') = 1", "READ_CSV.* cannot stand in it"),
        ("__import__('os').system('x')", "cannot stand in it|Failed to parse"),
        ("1", "1 cannot stand in it"),
        ("", "where is ''"),
        (7, "where is a int; allowed are a str and"),
    ],
)
def test_what_is_no_condition_is_refused(table, where, message):
    with pytest.raises(ValueError, match=message):
        matching(table, where)


def test_no_metadata_at_all():
    table = metadata_table(pa.table({"id": ["a", "b"], "metadata": ["{}", "{}"]}))
    assert np.array_equal(matching(table, "id = 'b'"), [False, True])
