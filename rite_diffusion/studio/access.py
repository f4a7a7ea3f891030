"""Access to the studio: addresses, user names and passwords."""

import asyncio
import hmac
import ipaddress
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.workspace import checked_name

SHORTEST_PASSWORD = 8  # characters
PAUSE = 0.5  # seconds until a wrong password is answered


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_logins(texts: Sequence[str]) -> dict[str, str]:
    """User -> password, from `user:password` texts; StudioError for a text of another form."""
    logins = {}
    for text in texts:
        user, colon, password = text.partition(":")
        if not colon or len(password) < SHORTEST_PASSWORD:
            raise StudioError(
                "--auth takes user:password, with a password of at least "
                f"{SHORTEST_PASSWORD} characters."
            )
        logins[checked_name(user)] = password
    return logins


def require_password(host: str, share: bool, logins: dict[str, str]) -> None:
    """Raise StudioError where other machines could reach a studio without passwords."""
    if logins or (is_loopback(host) and not share):
        return
    what = "--share" if share else f"--host {host}"
    raise StudioError(
        f"{what} lets others in: they could use this machine and see your pictures. "
        "Add --auth user:password."
    )


def login_check(logins: dict[str, str]) -> Callable[[str, str], Awaitable[bool]]:
    """The function by which Gradio checks a login.

    It answers one login of a user at a time, and wrong passwords after a pause: guessing is slow.
    """
    locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def check(user: str, password: str) -> bool:
        expected = logins.get(user, "")
        async with locks[user if expected else ""]:
            if expected and hmac.compare_digest(expected.encode(), password.encode()):
                return True
            await asyncio.sleep(PAUSE)
            return False

    return check
