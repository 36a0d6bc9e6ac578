"""Keys and tokens never reach what is kept or shown: addresses that hold any are refused, and whatever is said is cleaned of them.

An address is kept in recipes, plans, identities and logs, so credentials have no place in one: they come from the environment.
What is said (errors, logs) may quote anything, so values that the environment holds under a secret's name are cut out of it too.
"""

from __future__ import annotations

import os
import re

from noise.storage import DatasetError

NAME = re.compile(r"secret|token|signature|passw|credential|access_?key|api_?key|private_?key|\bsig\b|\bauth\b", re.IGNORECASE)
"""Of a setting or variable whose value is nobody's business."""
USERINFO = re.compile(r"(\w+://|endpoint_override=(?:\w+://)?)[^/@?&\s]*@")
OPTION = re.compile(r"(?<=[?&;])([^=&;?\s'\"]+)=([^&;\s'\"]*)")
SHORTEST = 8
"""Characters of a variable's value that is cut out; shorter ones are words that occur anyway."""
HARMLESS = ("TOKENIZERS_PARALLELISM", "GOOGLE_APPLICATION_CREDENTIALS")
"""Named like secrets: a switch, and the place of a file."""
HIDDEN = "***"


def redacted(text: str) -> str:
    """The text without credentials in addresses, and without the values of secret environment variables."""
    text = _without(text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and NAME.search(name) and name not in HARMLESS:
            text = text.replace(value, HIDDEN)
    return text


def _without(text: str) -> str:
    """Without what addresses in it hold."""
    text = USERINFO.sub(rf"\g<1>{HIDDEN}@", text)
    return OPTION.sub(lambda found: f"{found[1]}={HIDDEN}" if NAME.search(found[1]) else found[0], text)


def refuse_secrets(name: str, address: object) -> None:
    """Raises DatasetError where an address holds credentials; `name` is the setting, and the message shows none."""
    text = str(address)
    if "://" in text and (shown := _without(text)) != text:
        raise DatasetError(
            f"{name} is {shown}: an address with credentials is refused, since recipes, plans and logs keep addresses; "
            "put them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN, ...)"
        )
