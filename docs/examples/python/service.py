"""A caption service: pip install edgecap fastapi uvicorn, then EDGECAP_BUNDLE=x.edgecap uvicorn service:app

curl --data-binary @photo.jpg localhost:8000/caption        # {"caption": "a dog runs on grass", …}
curl --data-binary @photo.jpg localhost:8000/stream -N      # the words as they are said
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from edgecap import Captioner
from edgecap.runtime import EdgecapError

MAX_BYTES = 16 * 2**20
AT_ONCE = os.cpu_count() or 1  # more captions side by side would only make each of them slower


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Captioner.load(os.environ["EDGECAP_BUNDLE"], threads=1) as captioner:
        app.state.captioner, app.state.places = captioner, asyncio.Semaphore(AT_ONCE)
        yield


app = FastAPI(lifespan=lifespan)


async def photo_of(request: Request) -> bytes:
    photo = bytearray()
    async for chunk in request.stream():
        photo += chunk
        if len(photo) > MAX_BYTES:
            raise HTTPException(413, f"more than {MAX_BYTES:,} bytes")
    return bytes(photo)


@app.post("/caption")
async def caption(request: Request, beam: int | None = None) -> dict[str, Any]:
    photo = await photo_of(request)
    try:
        async with app.state.places:
            found = await app.state.captioner.acaption(photo, beam=beam, deadline_ms=10_000)
    except EdgecapError as error:  # a broken photo, a beam of 100
        raise HTTPException(422, error.message) from None
    return found.to_dict()


@app.post("/stream")
async def stream(request: Request) -> StreamingResponse:
    pieces = app.state.captioner.astream(await photo_of(request), beam=1)
    try:
        async with app.state.places:  # the look at the photo, most of the work; what is wrong with it shows here
            first = await anext(pieces, "")
    except EdgecapError as error:
        raise HTTPException(422, error.message) from None

    async def said() -> AsyncIterator[str]:  # a client that leaves cancels this, and with it the search
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(said(), media_type="text/plain; charset=utf-8")
