"""What must not land in a manifest, a log or W&B: passwords in addresses, secrets on a command line."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
# the user part of an address: everything between the scheme and the last @ of its authority
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET_IN_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:key|token|secret|password|passwd|auth)[\w.-]*=)[^&#\s'\"]+")
_SECRET_OPTION = re.compile(
    r"(?i)^([+~-]*[\w.@/-]*(?:api_?key|token|secret|password|passwd)(?!_env)[\w]*=)(?!null$|none$)(.+)$"
)
_NUMBER = re.compile(r"[\d.,\[\]e+-]+")


_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:(?:api_?)?key|token|secret|passw(?:or)?d)(?:_|$)")
SHORTEST = 6  # ours: characters of a secret that is looked for in texts; `EMPTY` is no secret
_known: set[str] = set()


def hide(secrets: Iterable[str | None]) -> None:
    """Have these values hidden wherever this process tells something: a server may send a key back."""
    _known.update(one for one in secrets if one and len(one) >= SHORTEST)


def hide_address(address: str) -> None:
    """Have hidden what an address tells of who logs in, as it stands, as it is meant, and as HTTP sends it."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    if user:
        sent = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        alone = [] if password else [user, unquote(user)]  # a user's name beside a password is no secret
        hide([password, unquote(password), sent, *alone])
    for found in _SECRET_IN_QUERY.finditer(address):
        value = found[0].partition("=")[2]
        hide([value, unquote(value)])


def hide_words(words: Sequence[str]) -> None:
    """Have hidden what a command line holds of secrets (`redacted` says what)."""
    for word in words:
        option = _SECRET_OPTION.match(word)
        if option and not _NUMBER.fullmatch(option[2]):
            hide([option[2], option[2].strip("'\"")])
        for address in re.findall(r"\w+://[^\s'\"]+", word):
            hide_address(address)


def without_known(text: str) -> str:
    """A text without the values that `hide` was given, nor those of the environment's keys, tokens and passwords."""
    told = {v for name, v in os.environ.items() if len(v) >= SHORTEST and _SECRET_VARIABLE.search(name)}
    for secret in sorted(_known | told, key=len, reverse=True):
        for spelled in {secret, json.dumps(secret)[1:-1], quote(secret, safe="")}:
            text = text.replace(spelled, HIDDEN)
    return text


def without_password(text: str) -> str:
    """A text in which every address has lost its user, password and secret query values, and no known secret stands.

    Source: RFC 3986, 3.2.1 (user information) and 3.4 (query).  # ours: which query names are secret
    """
    text = without_known(text)
    return _SECRET_IN_QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


_END = r"\s,;'\"\[\](){}<>|"  # ours: what ends a path or a host within a text
# an absolute path, one of the home folder or above the working one
_PLACE = re.compile(rf"(?<![\w./~>\\-])(?:file:/+|(?:~|\.\.)?/(?=[^/{_END}])|[A-Za-z]:[\\/](?!/)|\\\\)[^{_END}]*")
_SERVER = re.compile(rf"(?<=://)[^/?#{_END}]+")


def without_places(text: str) -> str:
    """A text for other eyes: paths of this machine become <folder>, hosts of addresses <server>, and no passwords."""
    return _PLACE.sub("<folder>", _SERVER.sub("<server>", without_password(text)))


def redacted(words: Sequence[str]) -> list[str]:
    """A command line without secrets: addresses as `without_password`, values of keys, tokens and passwords hidden.

    A number is no secret (`model.max_new_tokens=56`).  # ours
    """
    found = []
    for word in map(without_password, words):
        option = _SECRET_OPTION.match(word)
        number = option and _NUMBER.fullmatch(option[2])
        found.append(f"{option[1]}{HIDDEN}" if option and not number else word)
    return found
