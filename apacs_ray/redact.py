"""Text that may be shown or kept: without secrets, without control characters. And URIs that carry secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|KEY|KEY_ID|CREDENTIALS?)$", re.IGNORECASE)
USER_IN_URL = re.compile(r"(?<=://)(?:[^\s/@]*|[^\s/@]*:[^\s@]*)@")
SIGNED = re.compile(
    r"(?P<name>[?&;](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|x-goog-signature|sig)=)"
    r"[^\s&;'\"<>)]+",
    re.IGNORECASE,
)
SHORTEST_SECRET = 6  # characters; shorter values would blacken ordinary words
CREDENTIALS = "give s3://bucket/prefix, and the keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_learned: set[str] = set()  # secrets of this process that its environment does not name, as a profile's


def register_secrets(*values: str | None) -> None:
    """Remember values that `redact` is to hide from now on in this process."""
    _learned.update(value for value in values if value)


def secrets_in(environment: Mapping[str, str]) -> set[str]:
    """Values of variables that are named like secrets."""
    return {value for name, value in environment.items() if SECRET_NAME.search(name)}


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with `***` for every known secret, for users in URLs and for signatures in their queries."""
    text = SIGNED.sub(r"\g<name>***", USER_IN_URL.sub("***@", text))
    known = {*secrets, *_learned, *secrets_in(os.environ)}
    for secret in sorted((secret for secret in known if len(secret) >= SHORTEST_SECRET), key=len, reverse=True):
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "***")
    return text


def printable(text: str, *, lines: bool = False) -> str:
    """The text with `?` for what would steer a terminal or cannot be encoded; with `lines` its newlines stay."""
    return "".join(letter if letter.isprintable() or (lines and letter == "\n") else "?" for letter in text)


def as_text(name: str) -> str:
    """A name as it can be stored: bytes of a file name that are no UTF-8 as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def uri_defect(uri: str) -> str | None:
    """What is wrong with a URI that must not even be repeated; None when nothing is. It names no part of it."""
    if "\0" in uri:
        return "the URI holds a NUL; correct it"
    scheme, _, rest = uri.partition("://")
    place = rest.split("/")[0]
    if "@" in place or (scheme == "s3" and ":" in place) or USER_IN_URL.search(uri):
        return f"the URI carries credentials or a port (not shown); {CREDENTIALS}"
    if SIGNED.search(uri):
        return f"the URI is signed (not shown), which is not supported; {CREDENTIALS}"
    return None
