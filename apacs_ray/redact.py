"""Secrets and control characters taken out of text that is printed or stored; URIs that carry secrets refused."""

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
_registered: set[str] = set()  # secrets of this process that its environment does not name, as a profile's


def register_secrets(*values: str | None) -> None:
    """Have `redact` hide these values from now on in this process."""
    _registered.update(value for value in values if value)


def secrets_in(environment: Mapping[str, str]) -> set[str]:
    """Return the values of variables that are named like secrets."""
    return {value for name, value in environment.items() if SECRET_NAME.search(name)}


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text with `***` for every known secret, for users in URLs and for signatures in their queries.

    Args:
        text: To be printed or stored.
        secrets: Known to the caller, beside those of the environment and of `register_secrets`.

    Returns:
        The text without them, in clear and URL-encoded; secrets of fewer than `SHORTEST_SECRET` characters stay.
    """
    text = SIGNED.sub(r"\g<name>***", USER_IN_URL.sub("***@", text))
    values = {*secrets, *_registered, *secrets_in(os.environ)}
    for secret in sorted((secret for secret in values if len(secret) >= SHORTEST_SECRET), key=len, reverse=True):
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "***")
    return text


def printable(text: str, *, lines: bool = False) -> str:
    """Return the text with `?` for what would steer a terminal or cannot be encoded; with `lines` newlines stay."""
    return "".join(letter if letter.isprintable() or (lines and letter == "\n") else "?" for letter in text)


def as_text(name: str) -> str:
    r"""Return a name as it can be stored: bytes of a file name that are no UTF-8 as `\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def uri_defect(uri: str) -> str | None:
    """Return what is wrong with a URI, None when nothing is. The URI itself must not be repeated: no part of it is."""
    if "\0" in uri:
        return "the URI holds a NUL; correct it"
    scheme, _, rest = uri.partition("://")
    place = rest.split("/")[0]
    if "@" in place or (scheme == "s3" and ":" in place) or USER_IN_URL.search(uri):
        return f"the URI carries credentials or a port (not shown); {CREDENTIALS}"
    if SIGNED.search(uri):
        return f"the URI is signed (not shown), which is not supported; {CREDENTIALS}"
    return None
