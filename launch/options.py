"""From words, environment and config file to what the commands get. Knows every setting's name; starts nothing."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from cyclopts import App, ArgumentCollection, Token

from launch.flags import ALIASES, LATER, PREFIX, check_environment, check_later, plain
from runtime.config import Config
from runtime.errors import InvalidInput
from runtime.sampling import SamplingParams

SHEET = ".sheet.png"
"""How the contact sheet's name ends that lies beside a video."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What becomes of the frames of `generate` and `run`."""

    output_file_name: str | None = None
    """Name of the result inside --output-path, ending in .mp4 (a picture: .png, .jpg, .webp); unset: one of its own."""
    save_output: bool | None = None
    """Write the result to disk; `run` always does."""
    return_frames: bool = False
    """Hand the raw frames back: in the Python SDK only."""


def settings_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every setting in a tree of dataclasses."""
    hints, found = get_type_hints(cls), {}
    for field in fields(cls):
        hint, name = hints[field.name], prefix + field.name
        nested = isinstance(hint, type) and is_dataclass(hint)
        found.update(settings_of(hint, f"{name}.") if nested else {name: hint})
    return found


CONFIG, SAMPLING, OUTPUT = settings_of(Config), settings_of(SamplingParams), settings_of(Output)
SETTINGS = CONFIG | SAMPLING | OUTPUT
NAMES = [*SETTINGS, *LATER, *ALIASES]

HTTP_ONLY = frozenset(
    {
        "host",
        "port",
        "served_model_name",
        "batching_delay_ms",
        "replicas",
        "database_url",
        "job_lease",
        "allow_any_model",
        "api_keys_file",
        "api_keys",
        "protect_metrics",
        "rate_limit",
        "max_concurrent_per_key",
        "max_queue",
        "max_pixels",
        "lenient",
        "public_url",
        "enable_metrics",
        "allow_private_urls",
        "output_store",
        "output_redirect",
        "keep_results_hours",
        "webhook_url",
        "webhook_secret_file",
    }
)
"""Settings of the HTTP server, which `generate` does not start."""

ELSEWHERE = frozenset({"bind", "mesh", "frames_bind"})
"""Settings of meshes and gateways that are apart."""

MESH_ONLY = frozenset(
    [
        "model_path",
        "revision",
        "served_model_name",
        "backend",
        "num_gpus",
        "sp_degree",
        "ulysses_degree",
        "ring_degree",
        "enable_cfg_parallel",
        "cfg_parallel_size",
        "sp_engine",
        "dist_backend",
        "device",
        "dist_timeout",
        "tp_size",
        "use_fsdp_inference",
        "dit_precision",
        "vae_precision",
        "text_encoder_precisions",
        "attention_backend",
        "vae_tiling",
        "vae_slicing",
        "vae_sp",
        "batching_max_size",
        "batching_config",
        "scheduling_policy",
        "key_weights",
        "max_active",
        "cost_cache",
        "checkpoint_every_steps",
        "spool_dir",
        "checkpoint_max_bytes",
        "drain_timeout",
        "start_timeout",
        "trace_path",
        "replicas",
        "bind",
    ]
)
"""Settings of schedulers and ranks, which `gateway` does not start."""


def _only(*names: Iterable[str], without: Iterable[str] = ()) -> dict[str, Any]:
    left_out = {*without}
    return {name: hint for name, hint in SETTINGS.items() if name in {*chain(*names)} and name not in left_out}


def _group(names: Iterable[str]) -> set[str]:
    """The dotted names too."""
    wanted = {*names}
    return {name for name in SETTINGS if name.partition(".")[0] in wanted}


COMMANDS = {
    "serve": _only(CONFIG, without=ELSEWHERE),
    "mesh": _only(CONFIG, without=(HTTP_ONLY | ELSEWHERE) - {"served_model_name", "bind"}),
    "gateway": _only(CONFIG, without=_group(MESH_ONLY | {"vae_config"})),
    "generate": _only(SETTINGS, without=ELSEWHERE),
    "run": _only(SETTINGS, without=ELSEWHERE),
    "doctor": CONFIG,
}
"""Which settings each command works with."""

BOOLEANS = frozenset(
    {name for name, hint in SETTINGS.items() if bool in (hint, *get_args(hint))}
    | {name for name, later in LATER.items() if not later.takes_value}
    | {"dry_run"}
)


@dataclass(frozen=True)
class Setting:
    """A value that did not come from the command line."""

    spelling: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Intake:
    """A command line, environment and file, with everything taken out that the commands do not work with."""

    tokens: list[str]
    settings: dict[str, Setting]
    notes: list[str]

    def fill(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give cyclopts the settings that the command line leaves open, and check every number."""
        for name, setting in self.settings.items():
            argument, _, _ = arguments.match(flag(name))
            if not argument.tokens:
                for index, value in enumerate(setting.values):
                    argument.append(Token(keyword=setting.spelling, value=value, source="", index=index))
        for argument in arguments:
            for token in argument.tokens:
                _check_number(argument.hint, token.keyword or argument.name, token.value)


def is_flag_of(command: str, word: str) -> bool:
    """Whether a command takes this flag, of those that some command has."""
    name = word[2:].replace("-", "_").removeprefix("no_")
    return name not in SETTINGS or name in COMMANDS.get(command, SETTINGS)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def take_in(tokens: list[str], environ: Mapping[str, str]) -> Intake:
    """Read the file and the environment, and bring the command line into the form that cyclopts takes.

    Raises:
        InvalidInput: names a flag, key or variable that is unknown or asks for what is missing, or an unreadable file.
    """
    if not tokens or tokens[0] not in COMMANDS or not {"--help", "-h"}.isdisjoint(tokens):
        return Intake(tokens, {}, [])
    command, phrases = tokens[0], list(_phrases(tokens[1:]))
    words = [word for phrase in phrases for word in _rewrite(phrase, command)]
    file = next((phrase.value for phrase in phrases if phrase.name == "config"), None)
    from_file = _known(read_file(file), file) if file is not None else {}
    from_environment, notes = _from_environment(environ)
    settings = from_file | from_environment
    profile = next((phrase.value for phrase in phrases if phrase.name == "profile_file"), None)
    if profile is not None and command == "serve":
        said = {n: s.values[0] for n, s in settings.items()} | dict(_said(phrase) for phrase in phrases)
        from_profile, idle = read_profile(profile, said)
        settings, notes = from_profile | settings, notes + idle
    given = {phrase.name for phrase in phrases} | settings.keys()
    usable = {name: setting for name, setting in settings.items() if name in COMMANDS[command]}
    return Intake([command, *words], usable, notes + _idle_notes(command, given))


def _idle_notes(command: str, given: set[str]) -> list[str]:
    of_requests = given & (SAMPLING.keys() | OUTPUT.keys()) - COMMANDS[command].keys()
    of_http = given & HTTP_ONLY if command == "generate" else set[str]()
    of_others = given & CONFIG.keys() - COMMANDS[command].keys()
    why = {
        "it starts no HTTP server": of_http,
        "they belong to a request, not to a server": of_requests,
        "they belong to other commands": of_others,
    }
    return [
        f"note: no effect on {command}: {', '.join(sorted(idle))} ({reason})" for reason, idle in why.items() if idle
    ]


def _belongs(name: str) -> str:
    if name not in CONFIG:
        return "it goes with `generate` or with each request"
    return f"it goes with {' and '.join(f'`{command}`' for command, names in COMMANDS.items() if name in names)}"


@dataclass(frozen=True)
class Phrase:
    """One flag of the command line with the words behind it, up to the next flag."""

    head: str
    words: tuple[str, ...]

    @property
    def spelling(self) -> str:
        return self.head.partition("=")[0]

    @property
    def name(self) -> str:
        """Name of the setting, aliases resolved; empty for words in front of the first flag."""
        name = self.spelling[2:].replace("-", "_")
        return ALIASES.get(name, name)

    @property
    def attached(self) -> bool:
        return "=" in self.head

    @property
    def value(self) -> str | None:
        """What stands behind the `=`, else the next word."""
        return self.head.partition("=")[2] if self.attached else next(iter(self.words), None)

    @property
    def rest(self) -> list[str]:
        """The words behind the value."""
        return list(self.words if self.attached else self.words[1:])


def _phrases(tokens: list[str]) -> Iterator[Phrase]:
    head, words = "", list[str]()
    for token in tokens:
        # No flag holds a space, but a prompt that starts with two dashes does.
        if token.startswith("--") and not re.search(r"\s", token.partition("=")[0]):
            yield Phrase(head, tuple(words))
            head, words = token, []
        else:
            words.append(token)
    yield Phrase(head, tuple(words))


def _rewrite(phrase: Phrase, command: str) -> list[str]:
    """The words of a phrase with booleans and leading dashes unambiguous, aliases resolved, missing features gone."""
    name, value = phrase.name, phrase.value
    positive = name.removeprefix("no_")
    if positive in SETTINGS and positive not in COMMANDS[command]:
        raise InvalidInput(phrase.spelling, f"is no flag of {command}; {_belongs(positive)}")
    if name in SETTINGS.keys() - BOOLEANS and phrase.rest and not _is_list(SETTINGS[name]):
        raise InvalidInput(phrase.spelling, f"takes one value; {phrase.rest[0]!r} is too many (text goes in quotes)")
    if positive in BOOLEANS:
        return _rewrite_boolean(phrase, positive)
    if value is None and (name in LATER or (name in SETTINGS and _is_list(SETTINGS[name]))):
        raise InvalidInput(phrase.spelling, "needs a value")
    if value is not None and check_later(name, plain(value), phrase.spelling):
        return phrase.rest
    spelling = flag(name) if name in ALIASES.values() else phrase.spelling
    if value is not None and name in SETTINGS and (phrase.attached or value.startswith("-")):
        return [f"{spelling}={value}", *phrase.rest]
    head = spelling + phrase.head.removeprefix(phrase.spelling)
    return [head, *phrase.words] if head else list(phrase.words)


def _rewrite_boolean(phrase: Phrase, name: str) -> list[str]:
    """`--x`, `--x true`, `--x=true`, `--no-x` as `--x=true` or `--x=false`."""
    opposite = {"true": "false", "false": "true"}
    said, rest = "true", list(phrase.words)
    if phrase.value is not None and (phrase.attached or phrase.value.lower() in opposite):
        said, rest = phrase.value.lower(), phrase.rest
    said = said if phrase.name == name else opposite.get(said, said)
    return rest if check_later(name, plain(said), phrase.spelling) else [f"{flag(name)}={said}", *rest]


def read_file(path: str) -> dict[str, Any]:
    """A config file's settings by dotted name.

    Raises:
        InvalidInput: the file cannot be read, or is neither JSON nor YAML, or holds no mapping.
    """
    load: Callable[[str], Any] = json.loads if path.endswith(".json") else yaml.safe_load
    try:
        content = load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput("--config", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if load is json.loads else "YAML"
        reason = " ".join(str(error).split())
        raise InvalidInput("--config", f"{path} cannot be read as {kind}: {reason}") from error
    if not isinstance(content, dict | None):
        raise InvalidInput("--config", f"{path} holds no mapping of settings to values")
    return dict(_flatten(content or {}))


LAYOUT_SETTINGS = frozenset(
    {"num_gpus", "sp_degree", "ulysses_degree", "ring_degree", "enable_cfg_parallel", "cfg_parallel_size"}
)
"""What a profile decides together: half of a layout is none."""
PROFILE_PARTS = {
    "layout": (LAYOUT_SETTINGS, LAYOUT_SETTINGS | {"use_fsdp_inference"}),
    "model": (frozenset({"model_path"}), frozenset({"revision"})),
}
"""Part of a profile -> what decides it, and what is left out where something else was said on that by hand."""


def _said(phrase: Phrase) -> tuple[str, str]:
    """(setting, value) of a flag; a switch alone says true, and one with no- in front the opposite."""
    name = phrase.name.removeprefix("no_")
    if name not in BOOLEANS:
        return phrase.name, phrase.value or ""
    value = phrase.value if phrase.value in {"true", "false"} else "true"
    return name, value if phrase.name == name else {"true": "false", "false": "true"}[value]


def read_profile(path: str, said: Mapping[str, str]) -> tuple[dict[str, Setting], list[str]]:
    """The settings of a profile that `framemesh tune` wrote, without those that were said by hand, and a note on each.

    Args:
        path: of the profile.
        said: settings given by hand, with what they say.

    Raises:
        InvalidInput: the file cannot be read or is no profile.
    """
    try:
        flags = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))["flags"].items()
    except OSError as error:
        raise InvalidInput("--profile-file", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput("--profile-file", f"{path} is no profile of `framemesh tune`") from error
    found = _known({name: value for name, value in flags if value is not False}, path)
    notes = []
    by_hand = {name for name in found if name in said and said[name].lower() != found[name].values[0].lower()}
    for name in sorted(by_hand):
        notes.append(f"note: {name}: {said[name]} by hand wins over {found[name].values[0]} of the profile")
    dropped = {name for name in found if name in said}
    otherwise = by_hand | (said.keys() - found.keys())
    for part, (decisive, belonging) in PROFILE_PARTS.items():
        rest = sorted((belonging & found.keys()) - dropped)
        if rest and decisive & otherwise:
            dropped |= set(rest)
            notes.append(f"note: {', '.join(rest)} of the profile belong to its own {part} and are left out")
    return {name: setting for name, setting in found.items() if name not in dropped}, notes


def _flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the leaves; a group of settings is a branch, any other mapping is a leaf."""
    groups = {name.partition(".")[0] for name in SETTINGS if "." in name}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name not in groups:
            yield name, value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif value is not None:
            raise InvalidInput(name, f"{value!r} is no mapping of its settings to values")


def _known(content: dict[str, Any], source: str) -> dict[str, Setting]:
    """The keys of a config file that say something, under the names used here."""
    found: dict[str, Setting] = {}
    for key, value in content.items():
        name, spelling = ALIASES.get(key, key), f"{key} ({source})"
        if name not in SETTINGS and name not in LATER:
            raise InvalidInput(spelling, f"is no setting{did_you_mean(key, NAMES)}", code="unknown_parameter")
        if check_later(name, value, spelling) or value in (None, []):
            continue
        values = tuple(str(item) for item in (value if isinstance(value, list) else [value]))
        if found.get(name, Setting("", values)).values != values:
            raise InvalidInput(spelling, f"contradicts {found[name].spelling}, which is the same setting")
        _check_shape(SETTINGS[name], value, spelling)
        found[name] = Setting(spelling, values)
    return found


def _check_shape(hint: Any, value: Any, spelling: str) -> None:
    """Refuse what would turn into a value that nobody wrote: YAML reads `no` as false and `010` as 8."""
    if isinstance(value, dict) or (isinstance(value, list) and not _is_list(hint)):
        raise InvalidInput(spelling, f"takes one value, not {value!r}")
    items = value if isinstance(value, list) else [value]
    if str in (hint, *get_args(hint)) and not all(isinstance(item, str) for item in items):
        raise InvalidInput(spelling, f"{value!r} is not text; put it in quotes")


def _check_number(hint: Any, spelling: str, word: str) -> None:
    """Refuse fractions that would be rounded, and numbers that are none; anything else is cyclopts' to refuse."""
    if {int, float}.isdisjoint((hint, *get_args(hint))):
        return
    try:
        number = float(word)
    except ValueError:
        return
    if not math.isfinite(number):
        raise InvalidInput(spelling, f"{word} is no finite number")
    if int in (hint, *get_args(hint)) and not number.is_integer():
        raise InvalidInput(spelling, f"{word} is no whole number")


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


NEAR = 0.65
"""So much alike is a slip, on difflib's scale."""


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a refusal. What all the names begin with makes nothing alike."""
    bare = [name.removeprefix(prefix) for name in names]
    close = difflib.get_close_matches(word.removeprefix(prefix), bare, n=1, cutoff=NEAR)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Setting], list[str]]:
    """The settings among the environment variables, and warnings about variables that have no effect."""
    names = {PREFIX + name.replace(".", "_").upper(): name for name in NAMES}
    found, notes = dict[str, Setting](), check_environment(environ)
    for variable, value in sorted(environ.items()):
        if not variable.startswith(PREFIX) or not value:
            continue
        if variable not in names:
            notes.append(f"warning: {variable} is no setting{did_you_mean(variable, names, PREFIX)}")
            continue
        name = ALIASES.get(names[variable], names[variable])
        if not check_later(name, plain(value), variable):
            words = value.replace(",", " ").split() if _is_list(SETTINGS[name]) else [value]
            found[name] = Setting(variable, tuple(words))
    return found, notes
