"""The keys of Vietnamese input methods, and the errors of those who type with them."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from sentence_vipyloqwen.demo.data import DemoSizes, generator
from sentence_vipyloqwen.demo.sources.documents import PAGE_SIZES, draw_pages
from sentence_vipyloqwen.demo.sources.vietnamese import BUSINESS_WORDS, GIVEN_NAMES
from sentence_vipyloqwen.mteb_tasks.queries import TYPOS, VIETNAMESE, clear_askings, write_query
from sentence_vipyloqwen.mteb_tasks.typing_errors import (
    TELEX,
    TYPING_ERRORS,
    VNI,
    InputMethod,
    add_typing_errors,
    strip_diacritics,
    type_keys,
)

TEXT = "hợp đồng thuê nhà giữa Công ty TNHH Đại Lộc và Đỗ Thị Hạnh, trị giá 12.340.000 đ"

VOWELS = (
    "aáàảãạ", "ăắằẳẵặ", "âấầẩẫậ", "eéèẻẽẹ", "êếềểễệ", "iíìỉĩị",
    "oóòỏõọ", "ôốồổỗộ", "ơớờởỡợ", "uúùủũụ", "ưứừửữự", "yýỳỷỹỵ",
)  # fmt: skip
TELEX_MARKS = {"aw": "ă", "aa": "â", "ee": "ê", "oo": "ô", "ow": "ơ", "uw": "ư", "dd": "đ"}
VNI_MARKS = {"a8": "ă", "a6": "â", "e6": "ê", "o6": "ô", "o7": "ơ", "u7": "ư", "d9": "đ"}
METHODS = [(TELEX, TELEX_MARKS, "sfrxj"), (VNI, VNI_MARKS, "12345")]
LETTERS = [*"".join(VOWELS), "đ", *"bcdghklmnpqrstvx"]


def compose(keys: str, marks: dict[str, str], tones: str) -> str:
    """What an input method makes of the keys of one letter, by the tables above."""
    letter, rest = (marks[keys[:2]], keys[2:]) if keys[:2] in marks else (keys[0], keys[1:])
    if not rest:
        return letter
    (row,) = (vowels for vowels in VOWELS if vowels[0] == letter)
    return row[tones.index(rest) + 1]


@pytest.mark.parametrize(("method", "marks", "tones"), METHODS)
def test_every_letter_is_composed_of_its_keys_again(method: InputMethod, marks: dict[str, str], tones: str) -> None:
    assert len(LETTERS) == 12 * 6 + 1 + 16
    for letter in LETTERS:
        keys = type_keys(letter, method)
        assert keys.isascii()
        assert compose(keys, marks, tones) == letter
        upper = type_keys(letter.upper(), method)
        assert upper == keys[0].upper() + keys[1:]  # the shift key is held for the letter alone
    assert len({type_keys(letter, method) for letter in LETTERS}) == len(LETTERS)


@pytest.mark.parametrize(
    ("word", "telex", "vni", "tone_alone"),
    [
        ("hợp", "howpj", "ho7p5", "hơpj"),
        ("đồng", "ddoongf", "d9o6ng2", "đôngf"),
        ("thuê", "thuee", "thue6", "thuê"),
        ("nước", "nuwowcs", "nu7o7c1", "nươcs"),
        ("Đặng", "Ddawngj", "D9a8ng5", "Đăngj"),
        ("Nguyễn", "Nguyeenx", "Nguye6n4", "Nguyênx"),
        ("phải", "phair", "phai3", "phair"),
        ("Minh", "Minh", "Minh", "Minh"),
    ],
)
def test_keys_of_words(word: str, telex: str, vni: str, tone_alone: str) -> None:
    assert type_keys(word, TELEX) == telex
    assert type_keys(word, VNI) == vni
    assert type_keys(word, TELEX, marks=False) == tone_alone


@pytest.mark.parametrize(
    ("kind", "word", "wrong"),
    [
        ("keys", "hợp", {"howpj", "hơpj"}),
        ("tone", "phải", {"phãi"}),
        ("tone", "Nguyễn", {"Nguyển"}),
        ("tone", "đồng", set()),
        ("mark", "hợp", {"hơp", "họp", "hộp"}),
        ("mark", "đăng", {"dăng", "đang", "đâng"}),
        ("mark", "được", {"dược", "đuợc", "đưọc", "đưộc", "đươc"}),
        ("mark", "Lộc", {"Lôc", "Lọc", "Lợc"}),
        ("mark", "quặn", {"quăn", "quạn", "quận"}),
        ("mark", "hệ", {"hê", "hẹ"}),
        ("mark", "nhà", {"nha"}),
        ("initial", "sinh", {"xinh"}),
        ("initial", "Xuân", {"Suân"}),
        ("initial", "trả", {"chả"}),
        ("initial", "cho", {"tro"}),
        ("initial", "Lộc", {"Nộc"}),
        ("initial", "năm", {"lăm"}),
        ("initial", "giữa", {"dữa", "rữa"}),
        ("initial", "Dũng", {"Giũng", "Rũng"}),
        ("initial", "dịch", {"gịch", "rịch"}),
        ("initial", "rồi", {"dồi", "giồi"}),
        ("initial", "đơn", set()),
        ("initial", "nhà", set()),
        ("initial", "Nga", set()),
        ("initial", "TNHH", set()),
        ("key_beside", "Mai", {"Msi", "Mau", "Mao"}),
        ("key_beside", "TNHH", {"TBHH", "TMHH", "TNGH", "TNJH", "TNHG", "TNHJ"}),
        ("key_beside", "nhà", set()),
    ],
)
def test_what_a_word_looks_like_with_each_error(kind: str, word: str, wrong: set[str]) -> None:
    assert set(TYPING_ERRORS[kind](word, TELEX)) - {word} == wrong


@pytest.mark.parametrize("kind", ["tone", "mark"])
def test_a_wrong_tone_or_mark_leaves_the_letters_without_diacritics(kind: str) -> None:
    words = {word for phrase in (*BUSINESS_WORDS, *GIVEN_NAMES) for word in phrase.split()}
    wrong = [(word, other) for word in words for other in TYPING_ERRORS[kind](word, TELEX)]
    assert len(wrong) > 100
    assert all(strip_diacritics(word) == strip_diacritics(other) for word, other in wrong)


def changed_words(text: str, damaged: str) -> dict[int, tuple[str, str]]:
    pairs = enumerate(zip(text.split(), damaged.split(), strict=True))
    return {place: (before, after) for place, (before, after) in pairs if before != after}


def kinds_of(before: str, after: str) -> list[str]:
    """The kinds of error that make the one word of the other."""
    return [kind for kind, make in TYPING_ERRORS.items() if after in [*make(before, TELEX), *make(before, VNI)]]


def test_every_kind_of_error_occurs_and_no_other() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        changed = changed_words(TEXT.replace(",", ""), add_typing_errors(TEXT.replace(",", ""), random.Random(seed)))
        assert all(kinds_of(*pair) for pair in changed.values())
        seen.update(kind for pair in changed.values() for kind in kinds_of(*pair))
    assert set(seen) == set(TYPING_ERRORS)
    assert min(seen.values()) > 15


def test_a_query_is_typed_with_one_input_method() -> None:
    text, by = "đồng đồng đồng đồng đồng đồng đồng", set()
    for seed in range(50):
        words = add_typing_errors(text, random.Random(seed)).split()
        used = {"telex" for word in words if word.endswith("f")} | {"vni" for word in words if word.endswith("2")}
        assert len(used) < 2
        by |= used
    assert by == {"telex", "vni"}


def test_typing_errors_are_few_and_leave_numbers_alone() -> None:
    damaged = add_typing_errors(TEXT, random.Random(0))
    changed = changed_words(TEXT, damaged)
    long = [word for word in TEXT.split() if len(word.rstrip(",")) >= 3 and "0" not in word]
    assert len(long) == 13
    assert len(changed) == round(0.3 * 13) == 4
    assert all(before in long for before, _ in changed.values())
    assert add_typing_errors(TEXT, random.Random(0)) == damaged
    assert add_typing_errors(TEXT, random.Random(1)) != damaged
    assert add_typing_errors("12.340 đ", random.Random(0)) == "12.340 đ"


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_every_query_has_its_errors_and_keeps_its_numbers(domain: str) -> None:
    pages = draw_pages(domain, DemoSizes().eval.pages, generator(0, "eval", domain))
    for seed, (page, askings) in enumerate(zip(pages, clear_askings(pages), strict=True)):
        for asking in askings:
            plain, typed = (write_query(page, asking, kind, random.Random(seed)) for kind in (VIETNAMESE, TYPOS))
            changed = changed_words(plain, typed)
            long = re.findall(r"\b[^\W\d_]{3,}\b", plain)
            assert len(changed) == max(1, round(0.3 * len(long)))
            assert not any(re.search(r"\d", before) for before, _ in changed.values())


def test_typing_errors_fall_on_words_with_punctuation_too() -> None:
    around = re.compile(r"\W+")
    for text in ("Hạnh,", "(«Hạnh»)", "“Công-ty”…", "1.200,50 (đồng)"):
        for seed in range(20):
            damaged = add_typing_errors(text, random.Random(seed))
            assert damaged != text
            assert around.findall(damaged) == around.findall(text)
            assert re.findall(r"\b[\d.,]+\b", damaged) == re.findall(r"\b[\d.,]+\b", text)


def test_every_long_word_of_a_query_has_its_share_of_errors() -> None:
    text = "đồng, (đơn) hàng; 2.500 kg."
    damaged = {
        place for seed in range(60) for place in changed_words(text, add_typing_errors(text, random.Random(seed)))
    }
    assert damaged == {0, 1, 2}


@pytest.mark.parametrize("text", ["29A-123.45", "số 2025abc", "ABC123, đ", "", "  ,", "商店的收据", "книга"])
def test_typing_errors_leave_digits_and_what_stands_next_to_them_and_other_scripts(text: str) -> None:
    assert {add_typing_errors(text, random.Random(seed)) for seed in range(20)} == {text}
