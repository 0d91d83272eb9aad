"""SentencePiece's normalisation as steps of a tokenizer.json (the library tokenizers).

SentencePiece replaces the longest sequence that its rules (a charsmap) know, from the left. The library's step
`Precompiled` replaces a grapheme at a time: of one that its rules know in part it loses the rest, or it fails. So here
every character is set apart first, and only single ones get there. What the rules make of several, letters with marks
above all, is left to the step NFC behind it, from which characters that do not compose stay apart.
"""

import unicodedata
from typing import Any

APART, NEAR = "\U0010ffff", "\U0010fffe"
"""What stands between characters meanwhile, NEAR where they may compose: neither is a character, so no text has it."""
LAST = 0x20000
"""Characters from here on compose with nothing that a text has."""
SYLLABLES = range(0xAC00, 0xD7A4)
"""Hangul's, composed by a rule of their own."""
HANGUL = (
    r"(?<=[\x{1100}-\x{1112}])[\x{1161}-\x{1175}]",
    r"(?<=[\x{1100}-\x{1112}][\x{1161}-\x{1175}])[\x{11a8}-\x{11c2}]",
)
MARKS = r"\p{M}\x{1161}-\x{1175}\x{11a8}-\x{11c2}\x{ff9e}\x{ff9f}"
"""What may compose with a character before it."""
SPACE = "\u2581"


def normaliser_steps(charsmap: bytes, prefix: bool, collapse: bool) -> list[Any]:
    """Return the steps: by the rules, then spaces; `prefix`: one in front, `collapse`: runs are one, none at the ends.

    ValueError for rules that the library cannot read.
    """
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if charsmap:
        try:
            rules = normalizers.Precompiled(charsmap)
        except Exception as error:  # the library has no type of its own
            raise ValueError(f"its normalisation rules: {' '.join(str(error).split())[:100]}") from error
        apart = normalizers.Replace(Regex(between_characters()), APART)
        near = normalizers.Replace(Regex(rf"(?<!\A)(?<![{APART}])(?=[{MARKS}])"), NEAR)
        undo = [normalizers.Replace(NEAR, ""), normalizers.NFC(), normalizers.Replace(APART, "")]
        steps += [apart, near, rules, *undo]
    if collapse:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A +"), "")]
    steps.append(normalizers.Replace(" ", SPACE))
    if collapse:
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    return [*steps, normalizers.Prepend(SPACE)] if prefix else steps


def between_characters() -> str:
    """Return a pattern of the places between characters that do not compose and may be of one grapheme."""
    bases, marks = dict[str, list[str]](), dict[str, list[str]]()
    composed: dict[str, list[str]] = {}
    for letter in map(chr, range(0x80, LAST)):
        parts, alike = unicodedata.normalize("NFD", letter), unicodedata.normalize("NFKC", letter)
        if len(alike) == 1 and alike != letter:  # what the rules make a base, or a mark, counts as that
            (marks if unicodedata.combining(alike) else bases).setdefault(alike, []).append(letter)
        if len(parts) > 1 and ord(letter) not in SYLLABLES and unicodedata.normalize("NFC", parts) == letter:
            composed.setdefault(parts[1:], []).append(parts[0])
    compose: list[str] = [*HANGUL]
    for behind, letters in composed.items():
        before = _class([*letters, *(other for letter in letters for other in bases.get(letter, []))])
        classes = [_class([mark, *marks.get(mark, []), *bases.get(mark, [])]) for mark in behind]
        compose.append(f"(?<={before}{''.join(classes[:-1])}){classes[-1]}")
    wide = rf"(?<!\A)(?=[^\x00-\x7f])(?:(?=[^{MARKS}])|(?!{'|'.join(compose)}))"
    return rf"{wide}|(?<=[^\x00-\x7f])(?=[\x00-\x7f])|(?<=\r)(?=\n)"


def _class(letters: list[str]) -> str:
    """Return a class of the library's patterns."""
    return "[" + "".join(rf"\x{{{ord(letter):x}}}" for letter in sorted(set(letters))) + "]"
