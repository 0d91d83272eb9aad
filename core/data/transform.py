"""Reversible case transforms: a text in lower case, with a marker wherever there was a capital.

A word is a maximal run of ASCII letters. One of two or more capitals gets ALL in front, one that begins with a capital
TITLE, and every other capital of a word NEXT; then it is written in lower case. A marker that the text itself holds
gets ESCAPE in front. `case` puts TITLE and ALL before the space in front of the word, if there is one, so that the
tokenizer keeps its pieces " word"; `caseops`, the order of published shards, puts them between space and word.
"""

import functools
import os
import re
from typing import Literal

Transform = Literal["none", "case", "caseops"]
TITLE, ALL, NEXT, ESCAPE = MARKERS = "\ue001", "\ue002", "\ue003", "\ue004"
CAPITAL = re.compile("[A-Z]")
CHANGED = re.compile(f"[A-Z][A-Za-z]*|[{TITLE}-{ESCAPE}]")
"""A word from its first capital on, or a marker."""
RESTORED = {
    name: re.compile(f"{ESCAPE}(.?)|(?:{TITLE}{space}[A-Za-z]?|{ALL}{space}[A-Za-z]*|{NEXT}[A-Za-z]?)", re.DOTALL)
    for name, space in (("case", " ?"), ("caseops", ""))
}
"""A marker and the letters that it is about."""
LONG = 40
"""Letters of a word that is not remembered."""


class TransformError(ValueError):
    """A text that `apply_transform` never writes, so nothing says what it stands for."""


def apply_transform(text: str, transform: Transform) -> str:
    """Return a text in lower case with markers; `none`: as it is."""
    if transform == "none":
        return text
    marked = CHANGED.sub(_mark, text)
    if transform == "case":  # a marker that the text holds never follows a space: its escape is in between
        marked = marked.replace(f" {TITLE}", f"{TITLE} ").replace(f" {ALL}", f"{ALL} ")
    return marked


def invert_transform(text: str, transform: Transform) -> str:
    """Return the text that `apply_transform` was given; TransformError if it writes no such text."""
    plain = restore_text(text, transform)
    again = apply_transform(plain, transform)
    if again != text:
        at = len(os.path.commonprefix([text, again]))
        raise TransformError(
            f"character {at}, {ascii(text[at : at + 8])}: a marker without its letters, or a capital without its "
            f"marker; expected what the transform {transform} writes"
        )
    return plain


def restore_text(text: str, transform: Transform) -> str:
    """Undo the transform in any text, as a model may write it: a marker without its letters is dropped."""
    return text if transform == "none" else RESTORED[transform].sub(_restore, text)


def _mark(match: re.Match[str]) -> str:
    word, start = match[0], match.start()
    if word in MARKERS:
        return ESCAPE + word
    if start and "a" <= match.string[start - 1] <= "z":  # the rest of a word such as iPhone
        return _mark_capitals(word)
    return _mark_word(word) if len(word) < LONG else _mark_word.__wrapped__(word)


@functools.lru_cache(1 << 16)  # texts repeat their words: twice as fast
def _mark_word(word: str) -> str:
    """Return a word that begins with a capital, marked."""
    if len(word) > 1 and word.isupper():
        return ALL + word.lower()
    return TITLE + word[0].lower() + _mark_capitals(word[1:])


def _mark_capitals(letters: str) -> str:
    return CAPITAL.sub(lambda match: NEXT + match[0].lower(), letters)


def _restore(match: re.Match[str]) -> str:
    whole = match[0]
    return match[1] if whole[0] == ESCAPE else whole[1:].upper()
