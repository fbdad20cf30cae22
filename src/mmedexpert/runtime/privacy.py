"""What must not land in a manifest, a log or W&B: passwords in addresses, secrets on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "***"
# the user part of an address: everything between the scheme and the last @ of its authority
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET_IN_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:key|token|secret|password|passwd|auth)[\w.-]*=)[^&#\s'\"]+")
_SECRET_OPTION = re.compile(
    r"(?i)^([+~-]*[\w.@/-]*(?:api_?key|token|secret|password|passwd)(?!_env)[\w]*=)(?!null$|none$)(.+)$"
)


def without_password(text: str) -> str:
    """A text in which every address has lost its user, password and secret query values.

    Source: RFC 3986, 3.2.1 (user information) and 3.4 (query).  # ours: which query names are secret
    """
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
        number = option and re.fullmatch(r"[\d.,\[\]e+-]+", option[2])
        found.append(f"{option[1]}{HIDDEN}" if option and not number else word)
    return found
