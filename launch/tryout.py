"""Whether this machine has what a configuration asks for, found out by trying it and leaving no trace."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import socket
import tempfile
from pathlib import Path

from launch.devices import pick_devices
from runtime.config import Config, check_transport
from runtime.errors import InvalidInput


def try_folder(folder: Path, setting: str = "output_path") -> None:
    """Write a file into the folder, which a setting names, and leave things as they were."""
    missing: list[Path] = []
    try:
        missing += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}); name another folder"
        raise InvalidInput(setting, reason) from error
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def try_port(host: str, port: int) -> None:
    """Bind the address for a moment, in the way that the server will."""
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidInput("host", f"{host} is no address of this machine: {error.strerror}") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise _bind_fault(host, port, error) from error


def try_transport(config: Config) -> None:
    """See that the ranks can exchange tensors on the devices that they get."""
    devices = pick_devices(config.num_gpus * config.replicas, config.device, share=config.dist_backend == "staged")
    check_transport(config, devices.kind)
    if config.sp_engine == "yunchang":
        _need("sp_engine", "yunchang needs", "cuda", "yunchang", "flash_attn")


def try_services(config: Config) -> None:
    """Look for what the gateway reads and imports, a bucket and a database themselves left out."""
    for name in ("webhook_secret_file", "api_keys_file"):
        if (path := getattr(config, name)) is not None:
            try:
                Path(path).expanduser().open("rb").close()
            except OSError as error:
                raise InvalidInput(name, f"{path} cannot be read: {error.strerror}") from error
    if config.output_store is not None:
        _need("output_store", "a bucket needs", "s3", "obstore")
    if config.database_url is not None:
        _need("database_url", "a PostgreSQL database needs", "postgres", "psycopg")


def _need(setting: str, who: str, extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(setting, f"{who} {' and '.join(missing)}: pip install 'framemesh[{extra}]'")


def _bind_fault(host: str, port: int, error: OSError) -> InvalidInput:
    if error.errno == errno.EADDRINUSE:
        return InvalidInput("port", f"{port} on {host} is taken; name another one, or 0 for any free one")
    if error.errno == errno.EACCES:
        return InvalidInput("port", f"{port} may not be used by this user; take one from 1024 on")
    return InvalidInput("host", f"{host} cannot be listened on: {error.strerror}")
