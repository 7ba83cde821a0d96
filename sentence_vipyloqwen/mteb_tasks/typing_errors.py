"""Vietnamese as it is mistyped: its letters, the keys that type them, and the errors of those who type with them."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping

# --- Vietnamese letters and the keys that type them ---

GRAVE, ACUTE, HOOK, TILDE, DOT = "\u0300", "\u0301", "\u0309", "\u0303", "\u0323"
"""The tones huyền, sắc, hỏi, ngã, nặng, as Unicode's combining characters."""
CIRCUMFLEX, HORN, BREVE, STROKE = "\u0302", "\u031b", "\u0306", "\u0335"
"""The marks that make â ê ô, ơ ư, ă, đ; Unicode itself takes đ for one letter, we take it apart like the others."""
_TONES = (ACUTE, GRAVE, HOOK, TILDE, DOT)
_SIGNS = (CIRCUMFLEX, HORN, BREVE, STROKE, *_TONES)

InputMethod = Mapping[str, str]
"""Mark or tone -> the key that puts it on a letter; an empty key is the letter's own, pressed again."""

TELEX: InputMethod = dict(zip(_SIGNS, ("", "w", "w", "", *"sfrxj"), strict=True))
VNI: InputMethod = dict(zip(_SIGNS, "678912345", strict=True))
"""Both as in https://vietunicode.sourceforge.net/inputmethod.html; a mark is typed after its letter, the tone after the
word, as in https://help.keyman.com/keyboard/vietnamese_telex."""


def type_keys(word: str, method: InputMethod, *, marks: bool = True) -> str:
    """The keys that type a word, which stay as they are if the input method is off or does not take them.

    Args:
        word: The word.
        method: `TELEX` or `VNI`.
        marks: Whether the marks are left as keys, too; otherwise the tone alone is.

    >>> type_keys("Đường", TELEX), type_keys("Đường", VNI), type_keys("Đường", TELEX, marks=False)
    ('Dduwowngf', 'D9u7o7ng2', 'Đươngf')
    """
    keys, tones, letter = "", "", ""
    for part in _take_apart(word):
        if part in _TONES:
            tones += method[part]
        elif part in method:
            keys += (method[part] or letter.lower()) if marks else part
        else:
            keys, letter = keys + part, part
    return _put_together(keys + tones)


def strip_diacritics(text: str) -> str:
    """Vietnamese as it is typed without a Vietnamese keyboard.

    >>> strip_diacritics("Đơn đăng ký của Nguyễn Thúy, 1.250.000 đ")
    'Don dang ky cua Nguyen Thuy, 1.250.000 d'
    """
    return "".join(part for part in _take_apart(text) if not unicodedata.combining(part))


def _take_apart(text: str) -> str:
    """Each letter, then its marks and its tone."""
    return unicodedata.normalize("NFD", text).replace("đ", "d" + STROKE).replace("Đ", "D" + STROKE)


def _put_together(parts: str) -> str:
    return unicodedata.normalize("NFC", parts.replace("d" + STROKE, "đ").replace("D" + STROKE, "Đ"))


# --- typing errors ---

_SHARE_OF_ERRORS = 0.3
_WORD = re.compile(r"\b[^\W\d_]{3,}\b")
"""Three letters or more, with no digit next to them."""
_OTHER_MARKS = {"a" + CIRCUMFLEX: BREVE, "a" + BREVE: CIRCUMFLEX, "o" + CIRCUMFLEX: HORN, "o" + HORN: CIRCUMFLEX}
"""Letter and mark -> the other mark that the letter has."""
_INITIAL = re.compile("(tr|ch|gi|[sxdrln])(?=[aeiouy])", re.IGNORECASE)
"""What may be confused at the head of a word taken apart: neither đ, which has its stroke there, nor ng and nh."""
_ALIKE = (("s", "x"), ("ch", "tr"), ("l", "n"), ("d", "gi", "r"))
"""Initials that some dialect says alike."""
_SOUNDS_LIKE = {one: [other for other in group if other != one] for group in _ALIKE for one in group}
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEYS_BESIDE = {key: row[max(0, at - 1) : at] + row[at + 1 : at + 2] for row in _KEY_ROWS for at, key in enumerate(row)}


def add_typing_errors(text: str, rng: random.Random) -> str:
    """Damage about a third of the words of three letters or more, at least one, punctuation around them or not.

    Each damaged word has one of `TYPING_ERRORS`; who types it has one input method. Short words stay, and so do digits
    and the letters next to them: a wrong number would ask for another document. Words of other scripts stay, too.
    """
    method = rng.choice((TELEX, VNI))
    words = [found for found in _WORD.finditer(text) if _ways_to_damage(found.group(), method)]
    chosen = rng.sample(words, min(len(words), max(1, round(_SHARE_OF_ERRORS * len(words)))))
    for word in sorted(chosen, key=re.Match.start, reverse=True):  # from the end, so that earlier places stay right
        damaged = rng.choice(rng.choice(_ways_to_damage(word.group(), method)))
        text = text[: word.start()] + damaged + text[word.end() :]
    return text


def _ways_to_damage(word: str, method: InputMethod) -> list[list[str]]:
    """For each kind of error that the word can have, what it may look like then; never like the word."""
    found = ([wrong for wrong in make(word, method) if wrong != word] for make in TYPING_ERRORS.values())
    return [wrong for wrong in found if wrong]


def _left_as_keys(word: str, method: InputMethod) -> list[str]:
    return [type_keys(word, method), type_keys(word, method, marks=False)]


def _other_tone(word: str, method: InputMethod) -> list[str]:
    return [_put_together(_take_apart(word).translate(str.maketrans(HOOK + TILDE, TILDE + HOOK)))]


def _other_mark(word: str, method: InputMethod) -> list[str]:
    """A mark or the tone left out, or one mark in place of the other."""
    parts, letter, wrong = _take_apart(word), "", []
    for at, part in enumerate(parts):
        if part in method:
            others = dict.fromkeys(("", _OTHER_MARKS.get(letter.lower() + part, "")))
            wrong += [_put_together(parts[:at] + other + parts[at + 1 :]) for other in others]
        else:
            letter = part
    return wrong


def _other_initial(word: str, method: InputMethod) -> list[str]:
    """An initial in place of one that sounds alike; ``gi`` and an ``i`` after it are written with one ``i``."""
    parts = _take_apart(word)
    if not (found := _INITIAL.match(parts)):
        return []
    initial, rest = found.group(), parts[found.end() :]
    heads = [other + rest for other in _SOUNDS_LIKE[initial.lower()]]
    heads = [head.replace("gii", "gi", 1) if head.startswith("gii") else head for head in heads]
    return [_put_together(head[0].upper() + head[1:] if initial[0].isupper() else head) for head in heads]


def _key_beside(word: str, method: InputMethod) -> list[str]:
    """A letter after the first one, in place of which the key to the left or the right is hit.

    Words with diacritics are left to the other errors: they are many, and are what is Vietnamese about the typing.
    """
    if not word.isascii():
        return []
    return [
        word[:at] + (beside.upper() if letter.isupper() else beside) + word[at + 1 :]
        for at, letter in enumerate(word)
        if at > 0
        for beside in _KEYS_BESIDE[letter.lower()]
    ]


TYPING_ERRORS: Mapping[str, Callable[[str, InputMethod], list[str]]] = {
    "keys": _left_as_keys,
    "tone": _other_tone,
    "mark": _other_mark,
    "initial": _other_initial,
    "key_beside": _key_beside,
}
"""Kind of error -> what a word may look like with it: Telex or VNI keys left as typed, hỏi and ngã confused, a mark or
a tone missing or a mark wrong, an initial confused with one that sounds alike, a neighbouring key hit."""
