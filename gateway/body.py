"""Reading bodies: JSON, multipart and forms become one dictionary, and that one of the models of `gateway.schema`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from gateway.schema import Generation
from gateway.services import services
from runtime.errors import InvalidInput

MAX_FORM_FIELDS = 200
MAX_FORM_FILES = 4
MAX_PART_BYTES = 70_000_000
"""Starlette's own 1 MB would refuse an image given as a data URL before anybody could say what is wrong with it."""

NESTED = ("extra_body", "extra_params")
"""Fields that hold further fields: what SGLang and vLLM-Omni clients send."""

BODY_TYPES = ("application/json", "text/json", "application/x-www-form-urlencoded")
"""Besides multipart; none at all is JSON too."""

Fields = dict[str, Any]
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body, whichever of the three content types it came in.

    Raises:
        InvalidInput: names the first field that is wrong.
    """
    fields = {name: value for name, value in _merge_nested(await _read_fields(request)).items() if value is not None}
    if fields.get("input_reference") is not None:
        raise InvalidInput("input_reference", "text-to-video models take no image", code="unsupported_parameter")
    lenient = services(request).config.lenient and issubclass(kind, Generation)
    ignored = list(_drop_what_is_unknown(fields, kind)) if lenient else []
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_input(error, kind) from error
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


async def _read_fields(request: Request) -> Fields:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        limits = {"max_files": MAX_FORM_FILES, "max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_PART_BYTES}
        async with request.form(**limits) as form:
            return unbracket(form.multi_items())
    if content_type and content_type not in BODY_TYPES and not content_type.endswith("+json"):
        message = f"{content_type} is not read here; take application/json or multipart/form-data"
        raise InvalidInput("content-type", message, code="unsupported_media_type")
    raw = await request.body()
    # `curl -d '{…}'` without a header calls its JSON a form.
    if content_type == "application/x-www-form-urlencoded" and not raw.lstrip().startswith(b"{"):
        return unbracket(_split_form(raw))
    return _decode_object("body", raw)


def _split_form(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as error:
        raise InvalidInput("body", f"is no form: {error}") from error


def _decode_object(field: str, raw: bytes | str) -> Fields:
    try:
        return msgspec.json.decode(raw, type=Fields)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidInput(field, f"is no JSON object: {error}", code="invalid_json") from error


def unbracket(pairs: Iterable[tuple[str, Any]]) -> Fields:
    """Form fields as clients flatten them: ``a=1``, ``b[c]=2``, ``d[]=3`` -> ``{a: 1, b: {c: 2}, d: [3]}``.

    Raises:
        InvalidInput: a field is given twice, or as two different things.
    """
    fields: Fields = {}
    for name, value in pairs:
        is_item = name.endswith("[]")
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


def _as_invalid_input(error: ValidationError, kind: type[BaseModel]) -> InvalidInput:
    """The first complaint."""
    return _complain(error.errors(include_url=False)[0], kind)


def _complain(first: ErrorDetails, kind: type[BaseModel]) -> InvalidInput:
    """In OpenAI's words."""
    field = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        return InvalidInput(field, "is required", code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidInput(field, f"is no parameter of this endpoint{hint}", code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InvalidInput(field, message[0].lower() + message[1:])
