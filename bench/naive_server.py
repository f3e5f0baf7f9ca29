"""The naive server to compare with: one diffusers.WanPipeline behind HTTP, one request at a time, in order of arrival.

`python -m bench.naive_server MODEL_FOLDER` prints its URL and serves until it is stopped.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response


def create_app(pipeline: Any) -> FastAPI:
    app = FastAPI()
    turn = asyncio.Lock()

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        """The frames as raw uint8 (frames, height, width, 3)."""
        words = await request.json()
        async with turn:
            frames = await asyncio.to_thread(_generate, pipeline, words)
        return Response(frames.tobytes(), media_type="application/octet-stream")

    return app


def _generate(pipeline: Any, words: dict[str, Any]) -> np.ndarray[Any, Any]:
    pictures = pipeline(
        words["prompt"],
        height=words["height"],
        width=words["width"],
        num_frames=words["num_frames"],
        num_inference_steps=words["num_inference_steps"],
        guidance_scale=words["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(words["seed"]),
        output_type="pil",
    ).frames[0]
    return np.stack([np.asarray(picture) for picture in pictures])


def main() -> None:
    from bench.latency import load_pipeline

    torch.set_num_threads(1)
    app = create_app(load_pipeline(sys.argv[1]))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
