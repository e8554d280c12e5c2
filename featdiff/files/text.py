"""Text from outside (names of files, reasons, words of a model), made safe for a terminal or a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

# Control characters (ESC, TAB and line breaks among them), U+2028 and U+2029, marks that turn the direction of text,
# and lone surrogates. All are below U+10000.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A spreadsheet takes such a cell for a formula; the wide signs count in Japanese versions.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
_MARK = "'"
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|\\)")


def for_terminal(text: str) -> str:
    """One line that cannot steer a terminal: unsafe characters as ``\\x1b`` or ``\\u202e``, all others as they are.

    Parameters
    ----------
    text : str
        Control characters, line breaks, marks that turn the direction of text and lone surrogates are replaced.

    Examples
    --------
    >>> for_terminal("red \\x1b[31m.png")
    'red \\\\x1b[31m.png'
    """
    return _UNSAFE.sub(_escape, text)


def columns_on_screen(text: str) -> int:
    """How many columns of a terminal a line takes: letters of East Asia take two, combining marks none.

    Parameters
    ----------
    text : str
        As :func:`for_terminal` gives it.

    Examples
    --------
    >>> columns_on_screen("cat.png"), columns_on_screen("\u732b.png")
    (7, 6)
    """
    columns = 0
    for letter in text:
        if not unicodedata.combining(letter):
            columns += 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1
    return columns


def for_json(text: str) -> str:
    """The same for JSON that is already encoded; what a reader of it finds does not change.

    Parameters
    ----------
    text : str
        JSON on one line.
    """
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def for_spreadsheet(text: str) -> str:
    """A cell of a CSV file that a spreadsheet shows as text, never takes for a formula.

    Most text stays as it is. Text that begins with ``=``, ``+``, ``-``, ``@`` or an apostrophe, or that holds a
    character that :func:`for_terminal` replaces, gets an apostrophe in front, and behind it unsafe characters become
    ``\\x1b`` or ``\\u202e`` and a backslash becomes two.

    Parameters
    ----------
    text : str

    Returns
    -------
    str
        :func:`from_spreadsheet` gives the text again.

    Examples
    --------
    >>> for_spreadsheet("cat.png"), for_spreadsheet("=1+1.png"), for_spreadsheet("a\\tb.png")
    ('cat.png', "'=1+1.png", "'a\\\\x09b.png")
    """
    if not text.startswith((*_FORMULA, _MARK)) and not _UNSAFE.search(text):
        return text
    return _MARK + _UNSAFE.sub(_escape, text.replace("\\", "\\\\"))


def from_spreadsheet(cell: str) -> str:
    """The text behind a cell of :func:`for_spreadsheet`.

    Parameters
    ----------
    cell : str
        A cell as a CSV reader gives it.

    Examples
    --------
    >>> from_spreadsheet("'=1+1.png"), from_spreadsheet("cat.png")
    ('=1+1.png', 'cat.png')
    """
    if not cell.startswith(_MARK):
        return cell
    return _ESCAPED.sub(_restore, cell.removeprefix(_MARK))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _restore(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    return chr(int(digits, 16)) if digits else "\\"
