from __future__ import annotations

import base64
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizerFast

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen, cli, load_tasks
from sentence_vipyloqwen.tasks import PROMPTS
from sentence_vipyloqwen.train import mining, record_file
from sentence_vipyloqwen.train.hard_negatives import MiningOptions, choose, highest_cosines, nearest
from sentence_vipyloqwen.train.mining import MiningReport, mine_negatives
from sentence_vipyloqwen.train.record_lines import RecordError
from sentence_vipyloqwen.train.vector_cache import VectorCache

Vector = Callable[[str], Sequence[float]]
NO_MARGIN = {"relative_margin": None}


class TinyInputModule(InputModule):
    """Embeds an input by a function of its prompt, text and images' names, and counts what it embeds."""

    def __init__(self, vector: Vector, dim: int, modalities: list[Any]) -> None:
        super().__init__()
        self.vector, self.dim, self.known = vector, dim, modalities
        self.seen: list[str] = []
        self.fail_after = math.inf

    @property
    def modalities(self) -> list[Any]:
        return self.known

    def get_embedding_dimension(self) -> int:
        return self.dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        sides = [item if isinstance(item, dict) else {"text": item} for item in inputs]
        names = [[Path(source).name for source in side.get("image", [])] for side in sides]
        keys = [
            "+".join([*name, (prompt or "") + side.get("text", "")]) for name, side in zip(names, sides, strict=True)
        ]
        if len(self.seen) + len(keys) > self.fail_after:
            raise OSError("the power went out")
        self.seen += keys
        return {"vectors": torch.tensor(np.array([self.vector(key) for key in keys], dtype=np.float32))}

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "sentence_embedding": features["vectors"]}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        pass


def tiny(vector: Vector, dim: int = 2, prompts: Mapping[str, str] = PROMPTS, text_only: bool = False) -> Any:
    known = ["text"] if text_only else ["text", "image", ("image", "text"), "message"]
    return SentenceTransformer(modules=[TinyInputModule(vector, dim, known)], prompts=dict(prompts), device="cpu")


def angle(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def by_angle(text: str) -> tuple[float, float]:
    """A text ends in its angle: "p20" lies at 20 degrees."""
    return angle(float("".join(letter for letter in text.split("+")[-1] if letter.isdigit() or letter == ".")))


def hashed(text: str) -> Sequence[float]:
    return np.random.default_rng(list(text.encode())).standard_normal(8)


def ocr(anchor: Any, positive: Any, **fields: Any) -> dict[str, Any]:
    return {"task": "ocr", "anchor": anchor, "positive": positive, **fields}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., tuple[list[Any], MiningReport]]:
    """Mine records with a model: each row's negatives, `None` for none, and the report."""

    def run(model: Any, records: Sequence[dict[str, Any]], **options: Any) -> tuple[list[Any], MiningReport]:
        train, output = write(tmp_path / "train.jsonl", *records), tmp_path / "mined.jsonl"
        report = mine_negatives(model, train, output, MiningOptions(**options), cache_dir=tmp_path / "cache")
        mined = read(output)
        strip = [{key: value for key, value in row.items() if key != "negative"} for row in (*mined, *records)]
        assert strip[: len(mined)] == strip[len(mined) :]
        return [row.get("negative") for row in mined], report

    return run


# Positives at 0, 10, 20, ... 50 degrees, each with its anchor one degree further.
CIRCLE = [ocr(f"q{10 * i + 1}", f"p{10 * i}") for i in range(6)]


# --- Which candidates ---


def test_the_nearest_candidates_below_the_margin(mine: Any):
    # The positive's cosine is cos 1 degree = 0.99985, so the ceiling is 0.95 of it: at least 18.2 degrees away.
    negatives, report = mine(tiny(by_angle), CIRCLE, negatives=2)
    assert negatives == [["p20", "p30"], ["p30", "p40"], ["p40", "p0"], ["p50", "p10"], ["p20", "p10"], ["p30", "p20"]]
    ocr_rows = report.tasks["ocr"]
    assert (ocr_rows.rows, ocr_rows.mined, ocr_rows.too_few, ocr_rows.kept, ocr_rows.scored) == (6, 6, 0, 0, 0)
    assert ocr_rows.positive_mean == pytest.approx(math.cos(math.radians(1)), abs=1e-3)
    away = [19, 29, 19, 29, 19, 21, 21, 19, 21, 31, 21, 31]
    assert ocr_rows.negative_mean == pytest.approx(np.cos(np.radians(away)).mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        (NO_MARGIN, "p10"),
        ({"relative_margin": 0.2}, "p40"),  # 0.79988: 36.9 degrees away
        ({**NO_MARGIN, "absolute_margin": 0.1}, "p30"),  # 0.89985: 25.9 degrees away
        ({"relative_margin": 0.05, "absolute_margin": 0.1}, "p30"),
        ({**NO_MARGIN, "skip_top": 2}, "p30"),
        ({"skip_top": 1}, "p20"),  # rank 0 is p10, which the margin forbids as well
        ({"skip_top": 2}, "p30"),
    ],
)
def test_margins_and_ranks_decide_each_for_itself(mine: Any, options: dict[str, Any], first: str):
    assert mine(tiny(by_angle), CIRCLE, **options)[0][0] == [first]


def test_a_row_that_finds_too_few_is_written_as_it_was(mine: Any):
    negatives, report = mine(tiny(by_angle), CIRCLE, negatives=4)  # q11 has 18.2 degrees between it and p30, p40, p50
    assert negatives == [["p20", "p30", "p40", "p50"], None, None, None, None, ["p30", "p20", "p10", "p0"]]
    assert (report.mined, report.too_few) == (2, 4)
    assert mine(tiny(by_angle), CIRCLE, top=1)[1].mined == 0  # the nearest one is always too near
    assert mine(tiny(by_angle), CIRCLE[:2], negatives=3)[1].too_few == 2  # fewer candidates than negatives
    assert math.isnan(mine(tiny(by_angle), CIRCLE, top=1)[1].tasks["ocr"].negative_mean)


def test_what_belongs_to_a_row_is_no_negative_of_it(mine: Any):
    rows = [
        {"anchor": "a0", "positive": "p1"},
        {"anchor": "a0", "positive": "p1.5"},  # an equal anchor: p1 and p1.5 are positives of both
        {"anchor": "p1", "positive": "c3"},  # the anchor is the first row's positive: so c3 may answer a0
        {"anchor": "x9", "positive": "a0"},  # the candidate is the first rows' anchor itself
        {"anchor": "y30", "positive": "d30"},
    ]
    negatives, _ = mine(tiny(by_angle), rows, **NO_MARGIN)
    assert negatives == [["d30"], ["c3"], ["p1.5"], ["c3"], ["c3"]]


def test_candidates_are_of_the_same_task_unless_asked(mine: Any):
    rows = [ocr("q1", "p0"), ocr("q31", "p30"), {"task": "instr", "anchor": "i1", "positive": "p15"}]
    rows.append({"task": "text_pair", "anchor": "t1", "positive": "s5", "score": 0.5})
    negatives, report = mine(tiny(by_angle), rows, **NO_MARGIN)
    assert negatives == [["p30"], ["p0"], None, None]
    assert (report.tasks["instr"].too_few, report.tasks["text_pair"].scored) == (1, 1)
    assert list(report.tasks) == ["text_pair", "instr", "ocr"]
    assert mine(tiny(by_angle), rows, **NO_MARGIN, all_tasks=True)[0] == [["p15"], ["p15"], ["p0"], None]


def test_rows_with_negatives_are_kept_unless_replaced_and_lend_their_positives(mine: Any):
    rows = [ocr("q1", "p0", negative="mine"), ocr("q21", "p20"), ocr("q51", "p50", negative=None)]
    negatives, report = mine(tiny(by_angle), rows)
    assert negatives == ["mine", ["p0"], ["p20"]]
    assert report.tasks["ocr"].kept == 1
    assert mine(tiny(by_angle), rows, replace=True)[0] == [["p20"], ["p0"], ["p20"]]
    kept, report = mine(tiny(by_angle), rows, replace=True, top=1, relative_margin=0.2)
    assert (kept, report.too_few) == (["mine", None, None], 3)


def test_a_random_choice_depends_on_the_seed_alone(mine: Any, monkeypatch: pytest.MonkeyPatch):
    rows = [ocr(f"q{i}", f"p{i}") for i in range(40)]

    def sample(seed: int) -> list[Any]:
        return mine(tiny(hashed, 8), rows, **NO_MARGIN, sample=True, skip_top=3, top=10, negatives=2, seed=seed)[0]

    first = sample(0)
    monkeypatch.setattr(mining, "ENTRIES_PER_CHUNK", 1)
    assert sample(0) == first != sample(1)
    ranked = mine(tiny(hashed, 8), rows, **NO_MARGIN, top=10, negatives=10)[0]
    places = [[ranking.index(negative) for negative in drawn] for ranking, drawn in zip(ranked, first, strict=True)]
    assert all(3 <= one < other < 10 for one, other in places)
    assert {place for pair in places for place in pair} == set(range(3, 10))


def by_hand(rows: Sequence[tuple[str, str]], top: int, margin: float) -> list[list[str] | None]:
    """The rule, row by row."""
    unit = {text: np.array(hashed(text), np.float32) for row in rows for text in row}
    unit = {text: (vector / np.linalg.norm(vector)).astype(np.float16).astype(float) for text, vector in unit.items()}
    found: list[list[str] | None] = []
    for anchor, positive in rows:
        own = {anchor} | {p for a, p in rows if a in (anchor, positive)}
        others = {p for _, p in rows} - own
        ranking = sorted(others, key=lambda other: -(unit[anchor] @ unit[other]))[:top]
        limit = unit[anchor] @ unit[positive]
        fits = [other for other in ranking if unit[anchor] @ unit[other] <= limit - margin * abs(limit)]
        found.append(fits[:2] if len(fits) >= 2 else None)
    return found


@pytest.mark.parametrize(("entries", "block_bytes"), [(1 << 21, 1 << 28), (200, 7 * 4 * 8), (1, 1)])
def test_the_search_is_exact_in_chunks_and_blocks(
    mine: Any, monkeypatch: pytest.MonkeyPatch, entries: int, block_bytes: int
):
    random = np.random.default_rng(0)
    texts = [(f"t{a}", f"t{p}") for a, p in random.integers(0, 40, (120, 2))]  # several positives, chains, equal sides
    monkeypatch.setattr(mining, "ENTRIES_PER_CHUNK", entries)
    monkeypatch.setattr(mining, "BLOCK_BYTES", block_bytes)
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in texts]
    negatives, report = mine(tiny(hashed, 8), rows, negatives=2, top=6)
    expected = by_hand(texts, top=6, margin=0.05)
    assert negatives == expected
    assert report.mined == sum(row is not None for row in expected) > 10


def test_equal_scores_come_in_the_order_of_the_candidates():
    blocks = [np.array([[0, 1], [1, 0]], "f4"), np.array([[1, 0], [1, 0]], "f4")]
    scores, places = nearest(np.array([[1, 0]], "f4"), blocks, 3)
    assert (scores.tolist(), places.tolist()) == ([[1, 1, 1]], [[1, 2, 3]])


def test_margins_of_a_negative_cosine_lie_below_it():
    assert highest_cosines(np.array([-0.5]), MiningOptions(relative_margin=0.1)) == pytest.approx([-0.55])
    assert highest_cosines(np.array([0.5]), MiningOptions(**NO_MARGIN)).tolist() == [math.inf]


def test_a_candidate_at_the_ceiling_is_taken():
    options = MiningOptions(negatives=1)
    places, enough = choose(np.array([[0.5, 0.25]]), np.zeros((1, 2), bool), np.array([0.5]), np.array([0]), options)
    assert (places.tolist(), enough.tolist()) == ([[0]], [True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "negatives is 0; allowed is a whole number from 1"),
        ({"skip_top": -1}, "skip_top is -1; allowed is a whole number from 0"),
        ({"skip_top": 48, "negatives": 3}, "top is 50: with skip_top=48 and negatives=3, allowed is .* from 51"),
        ({"relative_margin": -0.1}, "relative_margin is -0.1; allowed is a number from 0"),
        ({"absolute_margin": math.nan}, "absolute_margin is nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MiningOptions(**options)


# --- Images ---


def save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def test_an_image_is_known_by_its_content(tmp_path: Path, picture: Callable[..., Image.Image]):
    one = save(picture(seed=1), tmp_path / "p0.png")
    shutil.copy(tmp_path / one, tmp_path / "p0-again.png")
    save(picture(seed=2), tmp_path / "p20.png")
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "p20.png").read_bytes()).decode()
    rows = [
        ocr("q1", {"image": "p0.png", "text": "0"}),
        ocr("q0.5", {"image": ["p0-again.png"], "text": "0"}),
        ocr("q21", {"image": "p20.png", "text": "20"}),
        ocr("q22", {"image": data, "text": "20"}),
    ]
    train, model = write(tmp_path / "train.jsonl", *rows), tiny(by_angle)
    mine_negatives(model, train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    # Two candidates, not four: a row does not get its own picture under another name.
    assert sorted(model[0].seen) == ["<ocr> q0.5", "<ocr> q1", "<ocr> q21", "<ocr> q22", "p0.png+0", "p20.png+20"]
    negatives = [row["negative"] for row in read(tmp_path / "out.jsonl")]
    assert negatives == [[rows[2]["positive"]]] * 2 + [[rows[0]["positive"]]] * 2


def test_a_changed_picture_of_the_same_name_is_embedded_anew(tmp_path: Path, picture: Callable[..., Image.Image]):
    save(picture(seed=1), tmp_path / "p0.png")
    rows = [ocr("q1", {"image": "p0.png", "text": "0"}), ocr("q21", "p20")]
    train, model = write(tmp_path / "train.jsonl", *rows), tiny(by_angle)
    for seed, embedded in ((1, 4), (1, 0), (2, 1)):
        save(picture(seed=seed), tmp_path / "p0.png")
        assert mine_negatives(model, train, tmp_path / "o.jsonl", cache_dir=tmp_path / "cache").embedded == embedded


def test_paths_stay_right_in_another_folder(tmp_path: Path, picture: Callable[..., Image.Image]):
    elsewhere = tmp_path / "elsewhere" / "p80.png"
    for path in (tmp_path / "data" / "images" / "p0.png", tmp_path / "p20.png", elsewhere):
        save(picture(seed=len(path.name) + len(str(path))), path)
    rows = [
        ocr({"image": ["images/p0.png"], "text": ["q", "1"]}, {"image": "images/p0.png", "text": "0"}, id=7, lang="vi"),
        ocr("q21", {"image": "../p20.png", "text": "20"}, domain="invoice"),
        ocr("q81", {"image": str(elsewhere), "text": "80"}, negative=["no", {"image": "images/p0.png"}]),
        {"anchor": "<text_pair> một", "positive": {"image": ["images/p0.png"], "text": None}, "score": 0.30},
    ]
    train, output = write(tmp_path / "data" / "train.jsonl", *rows), tmp_path / "new" / "sub" / "out.jsonl"
    mine_negatives(tiny(by_angle), train, output, cache_dir=tmp_path / "cache")
    p0, p20 = {"image": "../../data/images/p0.png", "text": "0"}, {"image": "../../p20.png", "text": "20"}
    assert read(output) == [
        ocr({"image": ["../../data/images/p0.png"], "text": ["q", "1"]}, p0, id=7, lang="vi", negative=[p20]),
        ocr("q21", p20, domain="invoice", negative=[p0]),
        ocr("q81", rows[2]["positive"], negative=["no", {"image": "../../data/images/p0.png"}]),
        {**rows[3], "positive": {"image": ["../../data/images/p0.png"], "text": None}},
    ]
    assert len(load_tasks(output, cache_dir=tmp_path / "arrow")["ocr.negatives_1"]) == 2
    sides = load_tasks(output, cache_dir=tmp_path / "arrow")["ocr.negatives_2"][0]
    assert sides["negative_2"]["image"] == [str(tmp_path / "data" / "images" / "p0.png")]


# --- The file ---


def test_lines_to_which_nothing_is_done_stay_byte_for_byte(tmp_path: Path):
    pair = '{"task":"text_pair", "anchor":"m\\u1ed9t",  "positive":"one", "score":0.30, "id":12}'
    first, second = (json.dumps(row) for row in CIRCLE[:2])
    lines = [first, "", pair, second, '{"anchor": "lone0" ,"positive":"p0", "negative": []}']
    train, output = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    train.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # no newline at the end
    mine_negatives(tiny(by_angle), train, output, MiningOptions(**NO_MARGIN), cache_dir=tmp_path / "cache")
    got = output.read_text(encoding="utf-8").splitlines()
    assert [got[1], got[3]] == [pair, lines[4]]
    assert [json.loads(line)["negative"] for line in (got[0], got[2])] == [["p10"], ["p0"]]
    assert output.read_bytes().endswith(b"\n")


def test_a_bad_line_is_named_before_anything_is_embedded(tmp_path: Path):
    model = tiny(by_angle)
    for bad, message in (
        ({"anchor": "a"}, "positive: got nothing"),
        (ocr("a", {"image": "no.png"}), "cannot read the image .*no.png': No such file"),
        (ocr("a", {"image": "data:image/png;base64,%%%"}), "cannot read the image 'data:image"),
    ):
        train = write(tmp_path / "train.jsonl", *CIRCLE, bad)
        with pytest.raises(RecordError, match=f"train.jsonl:7: {message}"):
            mine_negatives(model, train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    assert (model[0].seen, (tmp_path / "out.jsonl").exists()) == ([], False)


def test_no_record_no_row_to_mine_and_a_wrong_output(tmp_path: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no record; allowed: at least one"):
        mine_negatives(tiny(by_angle), empty, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="the file that is read; allowed is another one"):
        mine_negatives(tiny(by_angle), empty, tmp_path / "." / "empty.jsonl", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="output: got the folder"):
        mine_negatives(tiny(by_angle), empty, tmp_path, cache_dir=tmp_path / "cache")
    scored = write(tmp_path / "s.jsonl", {"task": "text_pair", "anchor": "a", "positive": "b", "score": 1})
    report = mine_negatives(tiny(by_angle), scored, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    assert (report.mined, report.embedded, (tmp_path / "out.jsonl").read_bytes()) == (0, 0, scored.read_bytes())


@pytest.mark.parametrize("vector", [lambda text: (0.0, 0.0), lambda text: (math.nan, 1.0)])
def test_an_embedding_that_is_none_is_refused(mine: Any, vector: Vector):
    with pytest.raises(ValueError, match=r"embedding of \{'text': '<ocr> q1'\} is not finite or all zeros"):
        mine(tiny(vector), CIRCLE)


def test_vectors_of_another_dimension_than_the_model_tells_are_refused(mine: Any):
    with pytest.raises(ValueError, match=r"vectors have the shape \(12, 8\); allowed is \(12, 2\)"):
        mine(tiny(hashed, dim=2), CIRCLE)


# --- Faults ---


def test_after_a_kill_only_what_is_missing_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mining, "CONTENTS_PER_CALL", 4)
    train, model = write(tmp_path / "train.jsonl", *CIRCLE), tiny(by_angle)
    whole = mine_negatives(model, train, tmp_path / "whole.jsonl", cache_dir=tmp_path / "other")
    assert (whole.embedded, len(model[0].seen)) == (12, 12)
    model[0].seen.clear()
    model[0].fail_after = 9  # two chunks of four are on disk when the third fails
    with pytest.raises(OSError, match="the power went out"):
        mine_negatives(model, train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other", "train.jsonl", "whole.jsonl"]
    model[0].fail_after = math.inf
    report = mine_negatives(model, train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    assert (report.embedded, report.reused, len(model[0].seen), len(set(model[0].seen))) == (4, 8, 12, 12)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert mine_negatives(model, train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache").embedded == 0


@pytest.mark.parametrize(
    ("keys", "vectors", "whole"), [(3, 0, 5), (0, 7, 5), (8, 0, 5), (8, 8, 6), (-3, 0, 4), (0, -1, 4)]
)
def test_a_torn_cache_keeps_what_is_whole(tmp_path: Path, keys: int, vectors: int, whole: int):
    cache = VectorCache(tmp_path, dim=4)
    with cache.writing():
        cache.append(np.arange(5, dtype=np.uint64), np.eye(5, 4) + 1)
    for name, change in (("keys.u64", keys), ("vectors.f16", vectors)):
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(content + b"\1" * change if change >= 0 else content[:change])
    reopened = VectorCache(tmp_path, dim=4)
    with reopened.writing():
        pass
    assert len(reopened) == whole
    assert [path.stat().st_size for path in (tmp_path / "keys.u64", tmp_path / "vectors.f16")] == [8 * whole, 8 * whole]
    found = reopened.find(np.array([3, 9, 0], dtype=np.uint64))
    assert found.tolist() == [3, -1, 0]
    assert reopened.read(found[[0]])[0] == pytest.approx(np.array([1, 1, 1, 2]) / math.sqrt(7), abs=1e-3)


def test_another_model_has_another_cache(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", *CIRCLE)
    options = {"cache_dir": tmp_path / "cache"}
    first = mine_negatives(tiny(by_angle), train, tmp_path / "out.jsonl", **options)
    other = mine_negatives(
        tiny(by_angle, prompts={**PROMPTS, "ocr": "<ocr> "[:-1]}), train, tmp_path / "o.jsonl", **options
    )
    assert (first.cache != other.cache, other.embedded) == (True, 12)


def test_a_fault_while_writing_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train, output = write(tmp_path / "train.jsonl", *CIRCLE), write(tmp_path / "out.jsonl", {"old": True})
    copied = record_file._copied

    def full(line: bytes, *arguments: Any) -> str:
        if b"q31" in line:
            raise OSError("No space left on device")
        return copied(line, *arguments)

    monkeypatch.setattr(record_file, "_copied", full)
    with pytest.raises(OSError, match="No space left"):
        mine_negatives(tiny(by_angle), train, output, cache_dir=tmp_path / "cache")
    assert read(output) == [{"old": True}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.jsonl", "train.jsonl"]


def test_a_file_that_changes_meanwhile_is_refused_and_its_vectors_are_not_kept(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", *CIRCLE)

    def vector(text: str) -> tuple[float, float]:
        write(train, *CIRCLE, ocr("q61", "p60"))
        return by_angle(text)

    with pytest.raises(ValueError, match="changed while being read"):
        mine_negatives(tiny(vector), train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out.jsonl").exists()
    assert mine_negatives(tiny(by_angle), train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache").reused == 0


# --- Other models ---


def test_a_prefix_is_left_out_where_the_model_has_no_such_prompt(mine: Any):
    model = tiny(by_angle, prompts={})
    mine(model, CIRCLE[:2], **NO_MARGIN)
    assert sorted(model[0].seen) == ["p0", "p10", "q1", "q11"]


def test_a_model_for_queries_and_documents_is_told_which_is_which(mine: Any):
    model = tiny(by_angle, prompts={"query": "query: ", "document": "passage: "})
    rows = [
        {"anchor": "a0", "positive": "b20"},
        {"anchor": "b20", "positive": "c60"},
        {"anchor": "d50", "positive": "e90"},
    ]
    negatives, _ = mine(model, rows, **NO_MARGIN)
    anchors, positives = (["query: a0", "query: b20", "query: d50"], ["passage: b20", "passage: c60", "passage: e90"])
    assert sorted(model[0].seen) == positives + anchors
    assert negatives == [["e90"], ["e90"], ["c60"]]


def test_a_model_of_text_alone_refuses_images_by_line(tmp_path: Path, picture: Callable[..., Image.Image]):
    save(picture(), tmp_path / "a.png")
    train = write(tmp_path / "train.jsonl", *CIRCLE, ocr({"image": "a.png"}, "x"))
    with pytest.raises(RecordError, match="train.jsonl:7: the record has an image, and the model takes text alone"):
        mine_negatives(tiny(by_angle, text_only=True), train, tmp_path / "out.jsonl", cache_dir=tmp_path / "cache")


def static(folder: Path) -> Path:
    words = {word: number for number, word in enumerate(("[UNK]", "a", "b", "c", "d"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu").save(str(folder))
    return folder


def bert(folder: Path) -> Path:
    (folder / "bert").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d")))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder / "bert")
    SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.mark.parametrize("make", [static, bert])
def test_the_command_mines_with_a_stock_model(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"task": "instr", "anchor": f"{word} a", "positive": word} for word in "abcd"]
    train = write(tmp_path / "train.jsonl", *rows)
    run_mine(monkeypatch, make(tmp_path / "stock"), train, tmp_path / "out.jsonl", tmp_path, "--no-margin")
    negatives = [row["negative"] for row in read(tmp_path / "out.jsonl")]
    assert all(len(found) == 1 and found != [row["positive"]] for found, row in zip(negatives, rows, strict=True))


# --- The command, and training ---


def test_the_help_teaches_what_a_margin_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", "mine", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "with the positive at cosine 0.80, a negative lies at 0.76 or below" in told
    assert highest_cosines(np.array([0.8]), MiningOptions()) == pytest.approx([0.76])


def run_mine(
    monkeypatch: pytest.MonkeyPatch, model: Path, train: Path, output: Path, tmp_path: Path, *more: str
) -> None:
    arguments = ["mine", model, train, output, "--cache", tmp_path / "cache", "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_the_command_mines_texts_and_images_and_its_output_trains(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    picture: Callable[..., Image.Image],
):
    names = [save(picture(seed=seed), tmp_path / "images" / f"{seed}.png") for seed in range(4)]
    rows = [ocr({"image": f"images/{name}", "text": "Tổng cộng?"}, f"{name[0]}50.000 đ") for name in names]
    rows += [{"anchor": f"hình {name[0]}", "positive": {"image": [f"images/{name}"]}} for name in names]
    rows.append({"task": "text_pair", "anchor": "một", "positive": "one", "score": 0.9})
    train, output = write(tmp_path / "train.jsonl", *rows), tmp_path / "mined" / "out.jsonl"
    run_mine(monkeypatch, folder, train, output, tmp_path, "--no-margin", "--negatives", "2", "--sample")
    told = capsys.readouterr().out
    assert "8 rows mined" in told
    assert "16 contents embedded, 0 found in the cache" in told
    mined = read(output)
    for group in (mined[:4], mined[4:8]):
        positives = [row["positive"] for row in group]
        for row in group:
            assert len(row["negative"]) == 2
            assert all(negative in positives and negative != row["positive"] for negative in row["negative"])
    run_mine(monkeypatch, folder, train, output, tmp_path, "--negatives", "2", "--top", "3", "--absolute-margin", "1.9")
    told = capsys.readouterr().out
    assert "8 rows found too few" in told
    assert "0 contents embedded, 16 found in the cache" in told

    run_mine(monkeypatch, folder, train, output, tmp_path, "--no-margin")
    dataset = load_tasks(output, cache_dir=tmp_path / "arrow")
    assert dataset.num_rows == {"text_pair": 1, "ocr.negatives_1": 4, "general.negatives_1": 4}
    model = ViPyloQwen(folder, device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    before = model[2].linear.weight.detach().clone()
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=PrefixRoutedLoss(model))
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(before, model[2].linear.weight)
