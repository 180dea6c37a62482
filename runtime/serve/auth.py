"""Who may come in: tokens, short-lived tickets for browsers, and the two headers that tell a foreign page from our own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from longtake.errors import LongtakeError

TICKET_S = 60
LOCAL = "local"  # the user where no tokens are asked for
USER = re.compile(r"[A-Za-z0-9._-]{1,64}")


def tokens_from_file(path: Path) -> dict[bytes, str]:
    """Digests of tokens to users: a line "user:token" each, or a token alone, whose user is named after its digest.

    Raises:
        LongtakeError: the file cannot be read, holds none, or one that is too short to be secret.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongtakeError(f"the token file {path} cannot be read", got=str(error), fix="check --token-file") from None
    users = {}
    for number, line in enumerate((each.strip() for each in lines), 1):
        if line and not line.startswith("#"):
            user, _, token = line.rpartition(":")
            digest = hashlib.sha256(token.encode()).digest()
            user = user or f"user-{digest.hex()[:8]}"
            if len(token) < 16 or not USER.fullmatch(user):
                fix = "make one: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
                got = f"{len(token)} characters in line {number}"
                raise LongtakeError(f"{path} holds a bad token", got=got, expected="user:token, 16 or more", fix=fix)
            users[digest] = user
    if not users:
        raise LongtakeError(f"{path} holds no tokens", expected="a line user:token each", fix="write one")
    return users


@dataclass(frozen=True)
class Door:
    """Who comes in. tokens: None where nobody is asked. hosts: names that this server goes by. origins: pages that may use it."""

    secret: bytes
    tokens: dict[bytes, str] | None = None
    hosts: tuple[str, ...] = ("localhost",)
    origins: tuple[str, ...] = ()

    def user(self, authorization: str | None, ticket: str | None = None, now: float | None = None) -> str | None:
        """The user of a bearer token or ticket; None if there is none."""
        if self.tokens is None:
            return LOCAL
        if ticket is not None:
            return self._user_of_ticket(ticket, time.time() if now is None else now)
        kind, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        found = [user for digest, user in self.tokens.items() if hmac.compare_digest(digest, given)]
        return found[0] if found and kind.lower() == "bearer" else None

    def ticket(self, user: str, now: float | None = None) -> str:
        """A ticket for `user` that is good for a minute: signed, not stored."""
        until = int(time.time() if now is None else now) + TICKET_S
        text = f"{user}|{until}|{secrets.token_hex(8)}".encode()
        return base64.urlsafe_b64encode(text + self._sign(text)).decode().rstrip("=")

    def _user_of_ticket(self, ticket: str, now: float) -> str | None:
        try:
            data = base64.urlsafe_b64decode(ticket + "=" * (-len(ticket) % 4))
            text, signature = data[:-32], data[-32:]
            if not hmac.compare_digest(self._sign(text), signature):
                return None
            user, until, _ = text.decode().split("|")
        except (ValueError, UnicodeDecodeError):
            return None
        return user if now <= int(until) and user in (self.tokens or {}).values() else None

    def _sign(self, text: bytes) -> bytes:
        return hmac.digest(self.secret, text, "sha256")

    def knows_host(self, host: str | None) -> bool:
        """Whether a Host header names this server: an address, localhost, or a name that was given. A page whose name was made
        to point here (DNS rebinding) comes with its own name."""
        name = _hostname(host)
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            allowed = {"localhost", *self.hosts, *(urlsplit(origin).hostname or "" for origin in self.origins)}
            return name in allowed

    def knows_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether an Origin header, if there is one, is this server's own page or an allowed one."""
        if origin is None or origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(host) and parts.netloc == host


def _hostname(host: str | None) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname if host else None
    except ValueError:
        return None
