"""Who may reach the studio."""

import asyncio
import hmac
import ipaddress
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from rite_diffusion.errors import StudioError
from rite_diffusion.studio.workspace import checked_name

SHORTEST_PASSWORD = 8  # characters
PAUSE = 0.5  # seconds that a wrong password costs


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_logins(texts: Sequence[str]) -> dict[str, str]:
    """User -> password of `user:password` texts; StudioError where one is none."""
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


def refuse_open_door(host: str, share: bool, logins: dict[str, str]) -> None:
    """Raise StudioError where others could reach a studio that asks nobody for a password."""
    if logins or (is_loopback(host) and not share):
        return
    what = "--share" if share else f"--host {host}"
    raise StudioError(
        f"{what} lets others in: they could use this machine and see your pictures. "
        "Add --auth user:password."
    )


def gatekeeper(logins: dict[str, str]) -> Callable[[str, str], Awaitable[bool]]:
    """What Gradio asks for each login; those of one user are answered in turn, wrong ones late."""
    turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def admit(user: str, password: str) -> bool:
        expected = logins.get(user, "")
        async with turns[user if expected else ""]:
            if expected and hmac.compare_digest(expected.encode(), password.encode()):
                return True
            await asyncio.sleep(PAUSE)
            return False

    return admit
