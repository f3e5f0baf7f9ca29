"""Reading bodies: JSON, multipart and forms become one dictionary, and that one of the models of `gateway.schema`."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from gateway.inputs import Upload
from gateway.schema import Generation
from gateway.services import services
from runtime.errors import InvalidInput

MAX_FORM_FIELDS = 200
MAX_FORM_FILES = 32
"""More than any endpoint takes, so that it is the endpoint that says how many."""
MAX_PART_BYTES = 70_000_000
"""Starlette's own 1 MB would refuse an image given as a data URL before anybody could say what is wrong with it."""
MOST_SHOWN = 40
"""Characters of a wrong value that an error repeats."""
SHOWN = {dict: "an object", list: "a list", Upload: "a file", int: "a number of very many digits"}
"""What an error says instead of a value that it cannot repeat."""
LARGE_BYTES = 1_000_000
"""Bodies beyond it are not decoded in the event loop."""

NESTED = ("extra_body", "extra_params")
"""Fields that hold further fields: what SGLang and vLLM-Omni clients send."""

BODY_TYPES = ("application/json", "text/json", "application/x-www-form-urlencoded")
"""Besides multipart; none at all is JSON too."""

Fields = dict[str, Any]
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], lists: Collection[str] = ()) -> Body:
    """The body, whichever of the three content types it came in; files are `Upload`s.

    Fields in `lists` may be repeated in a form, with or without ``[]``; they come out as lists.

    Raises:
        InvalidInput: names the first field that is wrong.
    """
    read = _merge_nested(await _read_fields(request, lists))
    # Null says nothing, but not of a field that does not exist.
    fields = {name: value for name, value in read.items() if value is not None or name not in kind.model_fields}
    lenient = services(request).config.lenient and issubclass(kind, Generation)
    ignored = list(_drop_what_is_unknown(fields, kind)) if lenient else []
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise _complain(error.errors(include_url=False)[0], kind) from error
    if lenient and isinstance(body, Generation):
        body.be_lenient(ignored)
    return body


def _drop_what_is_unknown(fields: Fields, kind: type[BaseModel]) -> Iterator[str]:
    """Take out the fields that are no parameter and the values that are no choice; a warning for each."""
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        for complaint in error.errors(include_url=False):
            field = complaint["loc"][0] if complaint["loc"] else None
            if complaint["type"] in {"extra_forbidden", "literal_error"} and field in fields:
                del fields[field]
                yield f"{_complain(complaint, kind)}; it was ignored"


async def discard_body(request: Request) -> None:
    """Read it to its end, as far as bodies may go, and keep nothing: a client that still sends hears no answer."""
    async for _part in request.stream():
        pass


async def _read_fields(request: Request, lists: Collection[str]) -> Fields:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, lists)
    if content_type and content_type not in BODY_TYPES and not content_type.endswith("+json"):
        message = f"{content_type} is not read here; take application/json or multipart/form-data"
        raise InvalidInput("content-type", message, code="unsupported_media_type")
    raw = await request.body()
    if len(raw) > LARGE_BYTES and not content_type.endswith("urlencoded"):
        return await asyncio.to_thread(_decode_object, "body", raw)
    # `curl -d '{…}'` without a header calls its JSON a form.
    if content_type == "application/x-www-form-urlencoded" and not raw.lstrip().startswith(b"{"):
        return unbracket(_split_form(raw), lists)
    return _decode_object("body", raw)


async def _read_form(request: Request, lists: Collection[str]) -> Fields:
    try:
        form = await WholeForm(request).parse()
    except MultiPartException as error:
        raise InvalidInput("body", f"is no form: {error.message}", code="invalid_form") from error
    try:
        return unbracket([(name, await _value(sent)) for name, sent in form.multi_items()], lists)
    finally:
        await form.close()


async def _value(sent: UploadFile | str) -> Upload | str:
    """A part of a form; starlette keeps large files on disk, and its files end with the form."""
    return sent if isinstance(sent, str) else Upload(await sent.read())


class WholeForm(MultiPartParser):
    """A multipart body up to its last boundary: one that was cut off is refused, not read as far as it came.

    Every error leaves the temporary files closed, which starlette's own parser forgets for a part that never ends.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(
            request.headers,
            self._to_the_end(request.stream()),
            max_files=MAX_FORM_FILES,
            max_fields=MAX_FORM_FIELDS,
            max_part_size=MAX_PART_BYTES,
        )
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _to_the_end(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for part in stream:
            yield part
        if not self._ended:
            raise MultiPartException("it ends before its last boundary")


def _split_form(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as error:
        raise InvalidInput("body", f"is no form: {error}") from error


def _decode_object(field: str, raw: bytes | str) -> Fields:
    if not raw.strip():
        raise InvalidInput(field, "is empty; send a JSON object", code="invalid_json")
    try:
        return msgspec.json.decode(raw, type=Fields)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidInput(field, f"is no JSON object: {error}", code="invalid_json") from error


def unbracket(pairs: Iterable[tuple[str, Any]], lists: Collection[str] = ()) -> Fields:
    """Form fields as clients flatten them: ``a=1``, ``b[c]=2``, ``d[]=3`` -> ``{a: 1, b: {c: 2}, d: [3]}``.

    Names in `lists` are lists without brackets too.

    Raises:
        InvalidInput: a field is given twice, or as two different things.
    """
    fields: Fields = {}
    for name, value in pairs:
        is_item = name.endswith("[]") or name in lists
        outer, *inner = _split_brackets(name.removesuffix("[]"))
        if "" in inner:
            raise InvalidInput(name, "is a list of something else than values")
        place, key = fields, outer
        for part in inner:
            place, key = _descend(place, key, name), part
        if is_item:
            items = place.setdefault(key, [])
            if not isinstance(items, list):
                raise InvalidInput(name, "is given as a list and as something else")
            items.append(value)
        elif key in place:
            raise InvalidInput(name, "is given twice")
        else:
            place[key] = value
    return fields


def _split_brackets(name: str) -> list[str]:
    """``a[b][c]`` -> a, b, c; anything else is one name."""
    return re.split(r"\]\[|\[", name.removesuffix("]")) if name.endswith("]") else [name]


def _descend(place: Fields, key: str, name: str) -> Fields:
    inner = place.setdefault(key, {})
    if not isinstance(inner, dict):
        raise InvalidInput(name, "is given as an object and as something else")
    return inner


def _merge_nested(fields: Fields) -> Fields:
    for name in NESTED:
        nested = fields.pop(name, None)
        if nested is None:
            continue
        if isinstance(nested, str):
            nested = _decode_object(name, nested)
        if not isinstance(nested, dict):
            raise InvalidInput(name, "is no object")
        for key, value in nested.items():
            if fields.setdefault(key, value) != value:
                raise InvalidInput(key, f"is given twice, outside of {name} and in it")
    return fields


def _complain(first: ErrorDetails, kind: type[BaseModel]) -> InvalidInput:
    """In OpenAI's words."""
    field = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        return InvalidInput(field, "is required", code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidInput(field, f"is no parameter of this endpoint{hint}", code="unknown_parameter")
    return InvalidInput(field, wrong_value(first["msg"], first["input"]))


def wrong_value(message: str, given: object) -> str:
    """A sentence of pydantic's about a value, with the value: `'avi' should be 'mp4' or 'gif'`."""
    said = re.sub("^(Value error, )?(Input |String )?", "", message)
    return f"{_shown(given)} {said[0].lower()}{said[1:]}"


def _shown(given: object) -> str:
    """As short as a message may have it, whatever was sent."""
    if isinstance(given, str):
        return repr(given if len(given) <= MOST_SHOWN else given[:MOST_SHOWN] + "…")
    if isinstance(given, float) or (isinstance(given, int) and given.bit_length() <= 64):
        return str(given).lower()
    return SHOWN.get(type(given), "this")
