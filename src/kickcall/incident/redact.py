"""Which words of a command line are secrets, and what is left of it without them? Pure.

In doubt a word is taken out: a developer can ask for what is missing, and nobody can take back what
was mailed. What only names a secret (`password-secret=sec0`, a file) stays. Any user of the host
may run a QEMU, and write what he likes on its command line: all of this takes linear time.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REMOVED = "(removed)"
_LONG_ENOUGH = 6
"""A secret shorter than this is not looked for in other texts: it would be found everywhere."""
_TOKEN_LENGTH = 16
"""A name in a URL that is so long may be a token."""
_DEEPEST = 30
"""Of JSON. Deeper than any option of QEMU goes."""

_SECRET_KEY = re.compile(
    r"(?<!by)pass(?!through|-through)|pwd|secret|token|cookie|credential|private|psk|signature"
    r"|bearer|authorization|key$|(^|[._-])(auth|sig|pin|pw|chap)$",
    re.IGNORECASE,
)
_NAMES_ONE = re.compile(
    r"((password|key|cookie)-secret|id|file|path|dir|fd|fdset|[._-](size|len|offset|bits))$",
    re.IGNORECASE,
)
"""Keys whose value says where a secret is (QAPI: `key-secret`, `passwordid`, `x509-key-file`)."""
_SWITCHES = frozenset({"on", "off", "yes", "no", "true", "false", "y", "n"})
_NO_SWITCHES = frozenset({"spice", "iscsi"})
"""Options of which `password=on` is a password: for -vnc it is a switch (ui/vnc.c)."""
_ALL_OF_IT = {
    "fw_cfg": re.compile(r"^string$"),
    "smbios": re.compile(r"^(?!(type|file|path)$)"),
    "acpitable": re.compile(r"^data$"),
}
"""Values that are the guest's business: Ignition's and cloud-init's configurations, and systemd's
credentials, which come in OEM strings of the SMBIOS."""
_SHELL = "exec:"
"""An address, of -incoming for one, that is a command for a shell."""
_TAKE_ANY = frozenset(
    {"append", "blockdev", "drive", "fw_cfg", "global", "iscsi"}
    | {"object", "set", "smbios", "spice", "vnc"}
)
"""Options whose argument may begin with a dash, and may be a secret."""

_TOKENS = re.compile(r"([\s\"'<>]+)")
_KEY = re.compile(r"(?<![\w.-])([\w.-]+)\s*=\s*")
_VALUE = re.compile(r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')?\S*")
_HEADER = re.compile(r"\b((?:proxy-)?authorization\s?:\s?|bearer\s|basic\s)([^\"'\r\n]+)", re.I)
_HARMLESS_QUERY = re.compile(r"(socket|transport|header-digest)=[^&]*")
"""What follows `?` in nbd+unix:///?socket=… and iscsi://….?transport=iser."""


@dataclass(frozen=True, slots=True)
class Redacted:
    """A command line that may be shown."""

    arguments: tuple[str, ...]
    removed: frozenset[str]
    """What was taken out of it, to be taken out of everything else, too."""

    @property
    def count(self) -> int:
        """How many of its words are not as they were."""
        return sum(REMOVED in one for one in self.arguments)


def redact(arguments: Sequence[str]) -> Redacted:
    """Return a command line without secrets: that of a QEMU, or of any back-end."""
    removed: set[str] = set()
    shown: list[str] = []
    option = ""
    for word in arguments:
        try:
            if option and (not word.startswith("-") or _is_secret(option) or option in _TAKE_ANY):
                shown.append(_argument(option, word, removed))
                option = ""
            elif word.startswith("-"):
                name, equals, value = word.partition("=")
                option = "" if equals else word.lstrip("-")
                # `--password=…`, as back-ends have it
                tail = equals + _argument(name.lstrip("-"), value, removed) if equals else ""
                shown.append(name + tail)
            else:
                shown.append(_text(word, removed))
        except RecursionError:
            shown.append(_remove(word, removed))
            option = ""
    return Redacted(tuple(shown), frozenset(removed))


def scrub(content: bytes, removed: Iterable[str]) -> bytes:
    """Return a text without any secret that was found in a command line."""
    for secret in sorted(removed, key=len, reverse=True):
        if len(secret) < _LONG_ENOUGH:
            continue
        for form in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
        ):
            content = content.replace(form.encode("utf-8", "surrogatepass"), REMOVED.encode())
    return content


def _is_secret(key: str) -> bool:
    return bool(_SECRET_KEY.search(key)) and not _NAMES_ONE.search(key)


def _remove(value: str, removed: set[str]) -> str:
    if value in ("", REMOVED):
        return value
    removed.add(value)
    return REMOVED


def _argument(option: str, value: str, removed: set[str]) -> str:
    """Return the argument of `-option` without secrets."""
    if value.lstrip().startswith(("{", "[")):
        return _json(option, value, removed)
    if _is_secret(option):
        return _remove(value, removed)
    if value.startswith(_SHELL):
        return _SHELL + _remove(value.removeprefix(_SHELL), removed)
    if option == "append":
        return _text(value, removed)
    return _options(option, value, removed)


def _options(option: str, text: str, removed: set[str]) -> str:
    """Return `key=value,…` without secrets; a comma is doubled to stand for itself.

    (QEMU: util/qemu-option.c, get_opt_value.)
    """
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    pairs = [part.partition("=") for part in parts]
    said = {key: value for key, equals, value in pairs if equals}
    kind = said.get("qom-type", pairs[0][0])
    about = said.get("property", "")
    shown = []
    for key, equals, value in pairs:
        if not equals:
            clean = _text(key, removed)
        elif key == "value" and _is_secret(about):  # -global driver=D,property=P,value=V
            clean = f"{key}={_remove(value, removed)}"
        else:
            clean = f"{key}={_value(option, kind, key, value, removed)}"
        shown.append(clean.replace(",", ",,"))
        if clean.endswith(f"json:{REMOVED}"):
            break  # what follows may be the rest of it: its commas should have been doubled
    return ",".join(shown)


def _value(option: str, kind: str, key: str, value: str, removed: set[str]) -> str:
    """Return the value of one key of an option without secrets. `kind` is the object's type."""
    all_of_it = _ALL_OF_IT.get(option)
    if all_of_it is not None and all_of_it.search(key):
        return _remove(value, removed)
    if key == "data" and kind.startswith("secret"):
        return _remove(value, removed)
    if _is_secret(key) and not (value in _SWITCHES and option not in _NO_SWITCHES):
        return _remove(value, removed)
    return _text(value, removed)


def _text(text: str, removed: set[str]) -> str:
    """Return any text without what looks like a secret: in URLs, after `key=`, in JSON."""
    # QEMU's pseudo-protocol for block devices (block.c, parse_json_filename).
    head, colon, rest = text.partition("json:")
    if colon and rest.lstrip().startswith("{"):
        return _assigned(head, removed) + colon + _json("", rest, removed)
    if text.startswith("{"):
        return _json("", text, removed)
    text = "".join(_url(part, removed) for part in _TOKENS.split(text))
    text = _HEADER.sub(lambda found: found[1] + _remove(found[2], removed), text)
    return _assigned(text, removed)


def _url(text: str, removed: set[str]) -> str:
    """Return a word without the user, the query and the fragment of a URL in it."""
    scheme, slashes, rest = text.partition("://")
    if not slashes:
        return text
    user, at, place = rest.rpartition("@")
    if at:
        name, _, password = user.replace("%", ":", 1).partition(":")  # iscsi has USER%PASSWORD
        removed.update(one for one in (user, password) if one and password)
        if len(name) >= _TOKEN_LENGTH:
            removed.add(name)
        user = REMOVED
    for mark in "#?":
        place, found, query = place.partition(mark)
        if query and not _HARMLESS_QUERY.fullmatch(query):
            query = _remove(query, removed)
        place += found + query
    return scheme + slashes + user + at + place


def _assigned(text: str, removed: set[str]) -> str:
    """Return a text without what follows `key=`, up to the next space, where the key is a secret.

    In rbd:pool/image:id=admin:key=…:mon_host=… what follows goes, too.
    """
    shown, at = [], 0
    for found in _KEY.finditer(text):
        if found.start() < at or not _is_secret(found[1]):
            continue
        value = _VALUE.match(text, found.end())
        if value is None or value[0] in _SWITCHES:
            continue
        shown += [text[at : found.end()], _remove(value[0], removed)]
        removed.update(part for part in re.split(r"[:;,&\"']", value[0], maxsplit=1)[:1] if part)
        at = value.end()
    return "".join(shown) + text[at:]


def _json(option: str, text: str, removed: set[str]) -> str:
    """Return JSON without secrets. QEMU's parser takes more than JSON: what is none goes whole."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _remove(text, removed)
    return json.dumps(_tree(option, "", "", value, removed, 0), separators=(",", ":"))


def _tree(option: str, kind: str, key: str, value: Any, removed: set[str], depth: int) -> Any:
    """Return what stands under `key` in JSON, without secrets."""
    if depth > _DEEPEST:
        return _remove(json.dumps(value), removed)
    if isinstance(value, dict):
        kind = str(value.get("qom-type", kind))
        return {
            name: _tree(option, kind, str(name), inner, removed, depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_tree(option, kind, key, inner, removed, depth + 1) for inner in value]
    if isinstance(value, str):
        return _value(option, kind, key, value, removed)
    if value is not None and not isinstance(value, bool) and _is_secret(key):
        return _remove(str(value), removed)
    return value
