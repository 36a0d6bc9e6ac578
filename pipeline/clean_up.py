"""Text that a corpus's authors took apart, put together again.

`lm1b`: the One Billion Word Benchmark comes tokenised, with spaces around punctuation. The rules are those of published
diffusion models (SEDD, MDLM), in their order, so that figures on LM1B compare; where they are odd ("U.S . said" keeps its
space) they stay odd.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LM1B = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"http : / / ", "http://"),
        (r"https : / / ", "https://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "),
        (r" \?$", "?"),
        (r" ! ", "! "),
        (r" !$", "!"),
        (r" , ", ", "),
        (r" : ", ": "),
        (r" ; ", "; "),
        (r" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"([$£]) ", r"\1"),
    )
]


def lm1b(text: str) -> str:
    for pattern, replacement in LM1B:
        text = pattern.sub(replacement, text)
    return text


RULES: dict[str, Callable[[str], str]] = {"none": lambda text: text, "lm1b": lm1b}
