"""The folder of CURVE keys: this host's own pair and the hosts that it trusts. Files and their modes; no sockets.

    DIR/HOST.secret          this host's pair, for the owner's eyes alone (0600)
    DIR/HOST.pub             its public half, to be copied to the other hosts
    DIR/authorized/*.pub     the public halves of the hosts that may connect here, and that are connected to

Every file is a certificate in the form that pyzmq's `zmq.auth.load_certificate` reads. `addresses` in a .pub are the
names under which a host is reached: they choose the key that its server has to prove. Who is taken out of
`authorized` is refused at the next handshake; a connection that stands is not cut.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import stat
import string
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import InvalidInput
from runtime.log import get_logger

SECRET, PUBLIC, AUTHORIZED = ".secret", ".pub", "authorized"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
MAX_FILE_BYTES = 64 * 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
Z85 = frozenset(string.ascii_letters + string.digits + ".-:+=^!/*?&<>()[]{}@%$#")
"""Digits of a key in text; it has 40 of them."""

log = get_logger("keys")


@dataclass(frozen=True)
class Host:
    """A host that may take part."""

    name: str
    key: bytes
    """Public, Z85."""
    addresses: tuple[str, ...]
    """Names and numbers under which it is connected to, its own name included."""


class Authorized:
    """The hosts of `authorized/`, read anew whenever something in the folder changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state: object = None
        self._hosts: tuple[Host, ...] = ()

    def hosts(self) -> tuple[Host, ...]:
        """A file that cannot be used is left out, with a warning; an unreadable folder holds nobody."""
        state = self._look()
        if state != self._state:
            self._hosts = tuple(host for path in _public_files(self._folder) if (host := _try_host(path)) is not None)
            if self._state is not None:
                log.info("authorized hosts", folder=str(self._folder), hosts=[host.name for host in self._hosts])
            self._state = state
        return self._hosts

    def _look(self) -> tuple[tuple[str, int, int, int], ...]:
        """Changes whenever a file comes, goes, or is written."""
        found = []
        for path in _public_files(self._folder):
            with contextlib.suppress(OSError):
                state = path.stat()
                found.append((path.name, state.st_mtime_ns, state.st_size, state.st_mode))
        return tuple(found)


@dataclass(frozen=True)
class Keys:
    """What the sockets of one process need."""

    folder: Path
    own: Host
    secret: bytes = field(repr=False)
    """Z85. Never logged."""
    authorized: Authorized

    def is_authorized(self, key: bytes) -> bool:
        """Whether a host with this public key (Z85) may connect here; this host itself always may."""
        return any(key == host.key for host in (self.own, *self.authorized.hosts()))

    def server_key(self, address: str) -> bytes:
        """The public key that the server at this address has to prove that it owns.

        Raises:
            InvalidInput: no host of the folder has the address, or several do.
        """
        wanted = _canonical(address)
        if wanted in LOOPBACK:
            return self.own.key
        found = {host.key: host for host in (self.own, *self.authorized.hosts()) if wanted in host.addresses}
        if len(found) == 1:
            return next(iter(found))
        place = self.folder / AUTHORIZED
        if found:
            names = ", ".join(sorted(host.name for host in found.values()))
            raise InvalidInput("endpoint", f"{address} is an address of several keys in {place} ({names}); keep one")
        raise InvalidInput(
            "endpoint",
            f"no key in {place} has the address {address}; copy that host's {PUBLIC} file there, "
            'or add the address to its line "addresses"',
        )


def load_keys(folder: str | Path | None) -> Keys | None:
    """This host's keys; None without a folder.

    Raises:
        InvalidInput: there is no pair or more than one, a file is malformed, or somebody else could read the secret
            or write to what is trusted.
    """
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    secret_file = _only_secret(folder)
    for place in (folder, folder / AUTHORIZED):
        _check_mode(place, 0o022, "could be changed by others", "go-w")
    _check_mode(secret_file, 0o077, "is open to others", "600")
    secret_half = _read(secret_file)
    if "secret-key" not in secret_half:
        raise InvalidInput(
            "curve_dir", f'{secret_file} has no line "secret-key"; make a new pair with framemesh keygen'
        )
    own = read_host(secret_file.with_suffix(PUBLIC))
    if secret_half.get("public-key", "").encode() != own.key:
        raise InvalidInput("curve_dir", f"{secret_file} and its {PUBLIC} file are of two different pairs")
    return Keys(folder, own, _key(secret_half["secret-key"], secret_file), Authorized(folder / AUTHORIZED))


def write_pair(folder: Path, name: str, public: bytes, secret: bytes, addresses: tuple[str, ...]) -> tuple[Path, Path]:
    """Write a new pair (Z85); returns the files (secret, public).

    Raises:
        InvalidInput: there is a pair already, the name is unfit for a file, or the folder cannot be written.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput("name", f"{name!r} is no host name; take letters, digits, '.', '-' and '_'")
    secret_file, public_file = folder / f"{name}{SECRET}", folder / f"{name}{PUBLIC}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / AUTHORIZED).mkdir(mode=0o700, exist_ok=True)
        _check_mode(folder, 0o022, "could be changed by others", "go-w")
        there = [path for path in (*sorted(folder.glob(f"*{SECRET}")), public_file) if path.exists()]
        if there:
            raise InvalidInput("curve_dir", f"{there[0]} is there already and is not overwritten; take another folder")
        about = f'metadata\n    name = "{name}"\n    addresses = "{" ".join(addresses)}"\ncurve\n'
        pair = f'    public-key = "{public.decode()}"\n'
        _create(
            public_file, 0o644, f"# Public key of {name}: copy it to {AUTHORIZED}/ of the other hosts.\n{about}{pair}"
        )
        hidden = f'    secret-key = "{secret.decode()}"\n'
        _create(secret_file, 0o600, f"# SECRET key of {name}: it stays on this host.\n{about}{pair}{hidden}")
    except OSError as error:
        raise InvalidInput("curve_dir", f"{folder} cannot be written: {error.strerror}") from error
    return secret_file, public_file


def _only_secret(folder: Path) -> Path:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == SECRET)
    except OSError as error:
        raise InvalidInput("curve_dir", f"{folder} cannot be read: {error.strerror}; see framemesh keygen") from error
    if not found:
        raise InvalidInput("curve_dir", f"{folder} holds no key pair of this host; make one with framemesh keygen")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InvalidInput("curve_dir", f"{folder} holds several secret keys ({names}); keep this host's own alone")
    return found[0]


def _check_mode(path: Path, forbidden: int, fault: str, chmod: str) -> None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidInput("curve_dir", f"{path} cannot be read: {error.strerror}") from error
    if stat.S_IMODE(state.st_mode) & forbidden:
        mode = f"{stat.S_IMODE(state.st_mode):04o}"
        raise InvalidInput("curve_dir", f"{path} {fault} (mode {mode}); run: chmod {chmod} {path}")
    if state.st_uid not in {0, os.geteuid()}:
        raise InvalidInput("curve_dir", f"{path} belongs to user {state.st_uid}, not to this process's user; chown it")


def _public_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == PUBLIC)
    except OSError:
        return []


def _try_host(path: Path) -> Host | None:
    try:
        return read_host(path)
    except InvalidInput as error:
        log.warning("not authorized: a key file that cannot be used", reason=error.message)
        return None


def read_host(path: Path) -> Host:
    """One .pub file; a host without a line `addresses` is known by the name of its file.

    Raises:
        InvalidInput: the file cannot be read, can be written by others, or holds no public key.
    """
    _check_mode(path, 0o022, "could be changed by others", "go-w")
    words = _read(path)
    if "secret-key" in words:
        raise InvalidInput("curve_dir", f"{path} holds a SECRET key, which nobody else may have; make a new pair")
    if "public-key" not in words:
        raise InvalidInput("curve_dir", f'{path} has no line "public-key"')
    name = words.get("name", path.stem)
    addresses = [_canonical(word) for word in (path.stem, name, *words.get("addresses", "").split())]
    return Host(name, _key(words["public-key"], path), tuple(dict.fromkeys(addresses)))


def _read(path: Path) -> dict[str, str]:
    """The lines `name = "value"` of a certificate."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode()
    except OSError as error:
        raise InvalidInput("curve_dir", f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput("curve_dir", f"{path} is no text") from error
    lines = (line.strip().partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, equals, value in lines if equals}


def _key(text: str, path: Path) -> bytes:
    if len(text) != 40 or not Z85.issuperset(text):
        raise InvalidInput("curve_dir", f"{path} holds no key of 40 Z85 characters")
    return text.encode()


def _canonical(address: str) -> str:
    """One spelling for every spelling of a number; names without regard to case."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address.lower().rstrip(".")


def _create(path: Path, mode: int, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
