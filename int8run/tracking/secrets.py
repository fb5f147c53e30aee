"""Passwords and tokens inside settings and texts: what is shown, kept or sent has `***` in their place.

A login in an address is left out altogether: the address can still be opened in a browser, which asks for it.
"""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
# of an address for browsers the login ends before the path; in those of databases a password may have a slash
HTTP_LOGIN = re.compile(r"(https?://)[^\s/?#'\"]{0,500}@", flags=re.IGNORECASE)
OTHER_LOGIN = re.compile(
    r"(?<!http)(?<!https)(://)(?:[^\s/:@'\"]{0,500}:[^\s'\"]{0,500}|[^\s/@'\"]{0,500})@", flags=re.IGNORECASE
)
NAMES = (
    "password|passwd|pwd|token|secret|credentials?|api_?key|access_?key|secret_?key|private_?key|signature"
)
QUERY = re.compile(rf"([?&][\w-]*(?:{NAMES}|sig)=)[^\s&#,'\"]+", flags=re.IGNORECASE)
QUOTED = r"(?<=')[^']+(?=')|(?<=\")[^\"]+(?=\")"  # all of it, spaces included
# `…_token=x`; with a colon in capitals alone, as variables of the environment are: a prompt has `(token:1.2)`
ASSIGNED = re.compile(rf"((?<![^\W_])(?:{NAMES})=['\"]?)(?:{QUOTED}|[^\s,}}\]'\"&#]+)", flags=re.IGNORECASE)
VARIABLE = re.compile(rf"((?<![^\W_])(?:{NAMES.upper()})['\"]?\s*[:=]\s*['\"]?)[^\s,}}\]'\"]+")
SECRET_KEY = re.compile(rf"(?:.*[_.-])?(?:{NAMES})", flags=re.IGNORECASE)
# tokens known by how they begin: of Hugging Face, GitHub, GitLab, OpenAI, Slack, Amazon, Databricks; JWT
KNOWN_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|dapi[0-9a-f]{32}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
BEARER = re.compile(r"\b(Bearer |Basic )[\w.~+/=-]{8,}")


def remove_login(text: str) -> str:
    """An address, or a text with addresses, without users and passwords."""
    return OTHER_LOGIN.sub(r"\1", HTTP_LOGIN.sub(r"\1", text))


def mask_secrets(text: str) -> str:
    """A text as it may be shown, kept and sent: without logins, and with `***` for passwords and tokens."""
    text = remove_login(text)
    for pattern in (QUERY, ASSIGNED, VARIABLE, BEARER):
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return KNOWN_TOKEN.sub(MASK, text)


def mask_secret_settings(value: Any, key: str = "") -> Any:
    """Settings as they may be shown, kept and sent.

    Args:
        value: plain values in mappings and lists.
        key: its name: the whole text under a name such as `HF_TOKEN` is masked.
    """
    if isinstance(value, Mapping):
        return {name: mask_secret_settings(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secret_settings(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    is_variable = value.startswith("${")  # a name where a secret stands, and not the secret
    if value and SECRET_KEY.fullmatch(key) and not is_variable:
        return MASK
    return mask_secrets(value)
