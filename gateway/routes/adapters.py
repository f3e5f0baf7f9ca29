"""The LoRA routes of the reference system: refused, since the models here are served as they were loaded."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.body import discard_body
from gateway.replies import error_reply

router = APIRouter(prefix="/v1")


@router.get("/list_loras")
@router.post("/set_lora")
@router.post("/merge_lora_weights")
@router.post("/unmerge_lora_weights")
async def refuse(request: Request) -> Response:
    """400 `lora_not_supported`, whatever was asked."""
    await discard_body(request)
    message = "LoRA adapters are not supported by this server; models run as they were loaded"
    return error_reply(400, message, None, "lora_not_supported")
