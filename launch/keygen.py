"""`framemesh keygen`: a CURVE key pair for this host, and in words what has to be copied where."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from runtime.keys import AUTHORIZED, LOOPBACK, write_pair
from runtime.wire import new_pair


def default_folder() -> Path:
    """Where keys go when no folder is named."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "framemesh" / "keys"


def keygen(folder: Path | None, name: str | None) -> int:
    """Make a pair and say what to do with it.

    Raises:
        InvalidInput: the folder holds a pair already, or cannot be written.
    """
    place = (folder if folder is not None else default_folder()).expanduser().absolute()
    host = name if name is not None else socket.gethostname().partition(".")[0]
    addresses = own_addresses()
    secret, public = write_pair(place, host, *new_pair(), addresses)
    print(f"""\
{secret}  the secret key: it never leaves this host
{public}  the public key

1. Copy the public key to every other host of the mesh, into its folder "{AUTHORIZED}":
     scp {public} OTHER:{place / AUTHORIZED}/
2. Copy the .pub files of the other hosts into {place / AUTHORIZED}/ here.
3. Start every process with --curve-dir {place}, or with FRAMEMESH_CURVE_DIR={place}

The others reach {host} as {", ".join((host, *addresses))}.
If they use another address, add it to the line "addresses" in {public.name} before you copy it.""")
    return 0


def own_addresses() -> tuple[str, ...]:
    """The numbers under which other hosts can reach this one."""
    import psutil

    inet = {socket.AF_INET, socket.AF_INET6}
    found = [each.address for card in psutil.net_if_addrs().values() for each in card if each.family in inet]
    # A percent sign is a link-local address with its interface, which no other host can use.
    return tuple(sorted(word for word in found if word not in LOOPBACK and "%" not in word))
