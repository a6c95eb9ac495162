"""A caption service: pip install edgecap fastapi uvicorn, then EDGECAP_BUNDLE=x.edgecap uvicorn service:app

curl --data-binary @photo.jpg localhost:8000/caption        # {"caption": "a dog runs on grass", …}
curl --data-binary @photo.jpg localhost:8000/stream -N      # the words as they are said
"""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from edgecap import Captioner
from edgecap.runtime import Caption, EdgecapError

T = TypeVar("T")
MAX_BYTES = 16 * 2**20
DEADLINE = 10_000  # milliseconds of a search
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


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, which ends with the client's connection: a framework does not cancel an endpoint by itself."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HTTPException(499, "the client has left")
    except EdgecapError as error:  # a broken photo, a beam of 100
        raise HTTPException(422, error.message) from None
    finally:
        task.cancel()
        left.cancel()


@app.post("/caption")
async def caption(request: Request, beam: int | None = None) -> dict[str, Any]:
    photo = await photo_of(request)

    async def found() -> Caption:
        async with app.state.places:
            return await app.state.captioner.acaption(photo, beam=beam, deadline_ms=DEADLINE)

    return (await while_there(request, found())).to_dict()


async def said(photo: bytes) -> AsyncIterator[str]:
    async with app.state.places:
        pieces = app.state.captioner.astream(photo, beam=1, deadline_ms=DEADLINE)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()


@app.post("/stream")
async def stream(request: Request) -> StreamingResponse:
    pieces = said(await photo_of(request))

    async def begin() -> str:  # the look at the photo; what is wrong with it shows before the answer begins
        return await anext(pieces, "")

    first = await while_there(request, begin())

    async def whole() -> AsyncIterator[str]:  # a client that leaves cancels this, and with it the search
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(whole(), media_type="text/plain; charset=utf-8")
