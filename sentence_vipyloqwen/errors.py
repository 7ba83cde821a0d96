"""What errors of others say, in short."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, at most so many letters; the kind of error where it has none.

    >>> first_line(ValueError("no such file" + chr(10) + "more")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:most]
