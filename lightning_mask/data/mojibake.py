"""Undoes the damage that the tweets' bytes took before they were packed.

The bytes tell what happened. Text in UTF-8 was read as Windows-1252 and saved as Mac Roman, two to four times in a row,
and each time a character that Mac Roman lacks became ``_``. (Part of the rows had been through UTF-8 once more before
that.) Every step maps bytes one to one or to ``_``, so the damage can be done again to each character that tweets use, and
looked up backwards. What two different characters end up as is left to :data:`PREFERRED`, or given up as a space.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

# Latin-1 signs and small letters, punctuation, the euro and other currencies, arrows, symbols, emoji.
_RANGES = [
    (0xA0, 0xC0),
    (0xDF, 0x100),
    (0x153, 0x154),
    (0x2013, 0x2027),
    (0x2030, 0x203B),
    (0x20A0, 0x20C0),
    (0x2122, 0x2123),
    (0x2190, 0x2200),
    (0x2600, 0x27C0),
    (0x2B00, 0x2B60),
    (0xFE0F, 0xFE10),
    (0x1F1E6, 0x1F200),
    (0x1F300, 0x1F650),
    (0x1F680, 0x1F700),
    (0x1F900, 0x1FA00),
]
# Where one byte of three was lost, context decides: an ellipsis ends nearly every one of them (a shortened tweet),
# a space stands between two words, and before the sign that asks for a coloured picture stands a heart.
PREFERRED = "…\u00a0❤"


def mend(text: str) -> str:
    """Return ``text`` with mangled sequences put right, and with a space for each that cannot be.

    Args:
        text: The bytes, decoded as Latin-1. Pure ASCII comes back as it is.

    Example:
        >>> mend("I can\\xe4\\xf3\\xbbt wait _\\xf4\\xd6\\x8d")
        'I can’t wait 😍'
    """
    if text.isascii():
        return text
    pattern, table = _backwards()
    text = _BEYOND.sub(" ", text)
    text = pattern.sub(lambda found: _park(table[found[0]]), text)
    return _DAMAGED.sub(" ", text).translate(_UNPARK)


_DAMAGED = re.compile(r"_*[\x80-\xff](?:_*[\x80-\xff])*_*")
# Emoji that took more rounds still: what looks like apostrophes with one lost byte between them.
_BEYOND = re.compile(r"_*\xe4\xf3\xbb(?:_\xe4\xf3\xbb|\xe4\xf3_)[_\x80-\xff]*")

# Mended characters below U+0100 must not be taken for damage: they are parked in a private area meanwhile.
_PRIVATE = 0xE000
_UNPARK = {_PRIVATE + code: " " if code == 0xA0 else chr(code) for code in range(0x80, 0x100)}


def _park(character: str) -> str:
    code = ord(character)
    return chr(_PRIVATE + code) if code < 0x100 else character


def _windows(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:  # five bytes mean nothing in Windows-1252 and passed through
        return chr(byte)


def _once(byte: int) -> int:
    try:
        return _windows(byte).encode("mac_roman")[0]
    except UnicodeEncodeError:
        return byte if chr(byte) == _windows(byte) and byte < 0xA0 else ord("_")


_STEP = bytes(_once(byte) for byte in range(256))


def _damaged(character: str) -> Iterator[str]:
    plain = character.encode()
    twice = "".join(map(_windows, plain)).encode()
    for encoded, rounds in ((plain, 2), (plain, 3), (twice, 4)):
        for _ in range(rounds):
            encoded = encoded.translate(_STEP)
        yield encoded.decode("latin-1")


@lru_cache(maxsize=1)
def _backwards() -> tuple[re.Pattern[str], dict[str, str]]:
    candidates: dict[str, set[str]] = {}
    for first, last in _RANGES:
        for code in range(first, last):
            for damaged in _damaged(chr(code)):
                if damaged.strip("_"):
                    candidates.setdefault(damaged, set()).add(chr(code))
    table = {}
    for damaged, characters in candidates.items():
        preferred = [character for character in PREFERRED if character in characters]
        if len(characters) == 1:
            table[damaged] = next(iter(characters))
        elif preferred:
            table[damaged] = preferred[0]
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))), table
