"""Command lines as people keep them in .sh, .bat and .txt files: continued lines, quotes, Windows paths, comments."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdxl_core.errors import ConfigError

SCRIPT = "sdxl_train.py"
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n")  # POSIX shells, cmd, PowerShell
_COMMENT = re.compile(r"^\s*(#|::|@?rem\b)", re.IGNORECASE)
_WINDOWS = re.compile(r"(?m)[A-Za-z]:\\|\^[ \t]*\r?$|^\s*@?(rem|set|call)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`launcher`: the words of `accelerate launch` up to the script.   `words`: those behind it."""

    launcher: tuple[str, ...]
    words: tuple[str, ...]


def find_command(text: str, *, where: str) -> CommandLine:
    """The one command line of sdxl_train.py in a file. `where`: what to call the file in an error.

    Raises: ConfigError: there is none, or there are several; a quote is not closed.
    """
    is_windows = bool(_WINDOWS.search(text))
    lines = [line for line in text.splitlines() if not _COMMENT.match(line)]
    logical = _CONTINUED.sub(" ", "\n".join(lines) + "\n").splitlines()
    found = [line for line in logical if re.search(r"sdxl_train(\.py)?\b", line)]
    if not found:
        other = re.search(r"\w+_train\w*\.py|train_\w+\.py|\w+_train_\w+\.py", text)
        named = f"it runs {other.group(0)}, which trains something else" if other else "no line of it names that script"
        raise ConfigError(
            f"{where}: holds no command line of {SCRIPT}; {named}. Put the one line that starts with "
            f"`accelerate launch … {SCRIPT}` into a file of its own."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{where}: holds {len(found)} command lines of {SCRIPT}. Put each into a file of its own and import them "
            f"one by one."
        )
    words = split_words(found[0], is_windows=is_windows, where=where)
    at = next(i for i, word in enumerate(words) if re.search(r"sdxl_train(\.py)?$", word))
    return CommandLine(launcher=tuple(words[:at]), words=tuple(words[at + 1 :]))


def split_words(line: str, *, is_windows: bool, where: str) -> list[str]:
    """Words of a command line. A backslash is a plain character on Windows and between single quotes; elsewhere it

    takes the next character as it is.
    """
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    position = 0
    while position < len(line):
        char = line[position]
        following = line[position + 1] if position + 1 < len(line) else ""
        escapes = char == "\\" and following and quote != "'" and (following in '"' if is_windows else True)
        if escapes and not (quote == '"' and following not in '"\\$`'):
            word = [*(word or []), following]
            position += 2
            continue
        if quote:
            if char == quote:
                quote = ""
            else:
                word = [*(word or []), char]
        elif char in "\"'":
            quote, word = char, word or []
        elif char.isspace():
            if word is not None:
                words.append("".join(word))
            word = None
        else:
            word = [*(word or []), char]
        position += 1
    if quote:
        raise ConfigError(f"{where}: a {quote} is opened and never closed: …{line[-60:].strip()}")
    return [*words, "".join(word)] if word is not None else words
