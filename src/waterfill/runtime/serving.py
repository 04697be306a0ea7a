"""A compressed model behind an OpenAI-compatible endpoint.

HTTP is uvicorn's; requests and answers of chats are those of fastapi-openai-compat. Here is what
they ask for: the model, one request after the other.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from waterfill.runtime.generation import Continuation, Inputs, Writer
from waterfill.runtime.requests import plain_message, sampling_of
from waterfill.types import WaterfillError

SHUTDOWN_SECONDS = 2  # for answers that are under way when the server is stopped


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 finds a free one. WaterfillError if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise WaterfillError(f"cannot listen at {host}, port {port}: {why}") from error


def serve(writer: Writer, name: str, sock: socket.socket) -> None:
    """Answer requests until the process is told to stop.

    Parameters
    ----------
    writer : the model
    name : what clients call it
    sock : from `listen`
    """
    import uvicorn

    config = uvicorn.Config(
        make_app(writer, name),
        log_level="error",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[sock])


def require() -> None:
    """WaterfillError if what serving needs is not installed."""
    try:
        import fastapi_openai_compat
        import uvicorn
    except ImportError as error:
        raise WaterfillError(
            "serving needs more packages: pip install 'waterfill[serve]'"
        ) from error
    del fastapi_openai_compat, uvicorn


def make_app(writer: Writer, name: str) -> Any:
    """The FastAPI application: /v1/models, /v1/chat/completions, /v1/completions."""
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from fastapi_openai_compat import create_chat_completion_router
    from starlette.exceptions import HTTPException as AnyHTTPException

    service = Service(writer, name)
    app = FastAPI(title=f"waterfill: {name}")

    async def refused(_: Request, error: Exception) -> JSONResponse:
        """Errors in the form that OpenAI's clients read."""
        status, said = 400, str(error)
        if isinstance(error, AnyHTTPException):
            status, said = error.status_code, str(error.detail)
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = {"error": {"message": said, "type": kind, "param": None, "code": status}}
        return JSONResponse(content, status)

    for refusal in (AnyHTTPException, RequestValidationError):
        app.add_exception_handler(refusal, refused)

    async def chat(model: str, messages: list[Any], body: dict[str, Any]) -> Any:
        try:
            return await service.chat(model, messages, body)
        except WaterfillError as error:
            raise HTTPException(_status(error), str(error)) from error

    async def complete(body: dict[str, Any]) -> Any:
        try:
            answer = await service.complete(body)
        except WaterfillError as error:
            raise HTTPException(_status(error), str(error)) from error
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return StreamingResponse(answer, media_type="text/event-stream")

    app.include_router(
        create_chat_completion_router(
            list_models=lambda: [name], run_completion=chat, owned_by="waterfill"
        )
    )
    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)
    return app


class _NoSuchModel(WaterfillError):
    pass


def _status(error: WaterfillError) -> int:
    return 404 if isinstance(error, _NoSuchModel) else 400


@dataclass
class Service:
    """One model that answers one request at a time; the others wait in the order they came.

    Attributes
    ----------
    writer : the model
    name : the only one that requests may ask for
    """

    writer: Writer
    name: str
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def chat(self, model: str, messages: list[Any], body: Mapping[str, Any]) -> Any:
        """A chat completion, or an asynchronous generator of its chunks."""
        self._check(model)
        said = [plain_message(m) for m in messages]
        text = self._start(self.writer.encode_chat(said), body)
        if body.get("stream"):
            return self._chat_chunks(text, body)
        return _chat(self.name, text, "".join([p async for p in self._pieces(text)]))

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any] | AsyncGenerator[str, None]:
        """A text completion, or an asynchronous generator of its server-sent events."""
        self._check(body.get("model"))
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise WaterfillError("the prompt must be one text")
        text = self._start(self.writer.encode(prompt), body)
        if body.get("stream"):
            return self._text_events(text, body)
        written = "".join([piece async for piece in self._pieces(text)])
        return _text(self.name, written, _finish(text)) | {"usage": _usage(text)}

    def _check(self, model: Any) -> None:
        if model != self.name:
            raise _NoSuchModel(f"there is no model {model!r} here, only {self.name!r}")

    def _start(self, inputs: Inputs, body: Mapping[str, Any]) -> Continuation:
        return self.writer.write(inputs, sampling_of(body))

    async def _pieces(self, text: Continuation) -> AsyncGenerator[str, None]:
        from fastapi.concurrency import run_in_threadpool

        async with self._turn:
            stream = iter(text)
            try:
                while (piece := await run_in_threadpool(next, stream, None)) is not None:
                    yield piece
            finally:
                stream.close()

    async def _chat_chunks(
        self, text: Continuation, body: Mapping[str, Any]
    ) -> AsyncGenerator[Any, None]:
        answer = f"chatcmpl-{uuid.uuid4().hex}"
        async for piece in self._pieces(text):
            yield _chat_chunk(answer, self.name, piece)
        yield _chat_chunk(answer, self.name, "", _finish(text))
        if _wants_usage(body):
            yield _chat_chunk(answer, self.name, None, usage=_usage(text))

    async def _text_events(
        self, text: Continuation, body: Mapping[str, Any]
    ) -> AsyncGenerator[str, None]:
        answer = _text(self.name, "", None)["id"]
        async for piece in self._pieces(text):
            yield _event(_text(self.name, piece, None, answer))
        last = _text(self.name, "", _finish(text), answer)
        yield _event(last | ({"usage": _usage(text)} if _wants_usage(body) else {}))
        yield "data: [DONE]\n\n"


def _chat(name: str, text: Continuation, written: str) -> Any:
    from fastapi_openai_compat import ChatCompletion, Choice
    from fastapi_openai_compat import Message as Said

    said = Said(role="assistant", content=written)
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        object="chat.completion",
        created=int(time.time()),
        model=name,
        choices=[Choice(index=0, message=said, finish_reason=_finish(text))],
        usage=_usage(text),
    )


def _chat_chunk(
    answer: str,
    name: str,
    piece: str | None,
    finish: str | None = None,
    usage: dict[str, int] | None = None,
) -> Any:
    from fastapi_openai_compat import ChatCompletion, Choice
    from fastapi_openai_compat import Message as Said

    delta = Said(role="assistant", content=piece)
    return ChatCompletion(
        id=answer,
        object="chat.completion.chunk",
        created=int(time.time()),
        model=name,
        choices=[] if usage else [Choice(index=0, delta=delta, finish_reason=finish)],
        usage=usage,
    )


def _text(name: str, written: str, finish: str | None, answer: str = "") -> dict[str, Any]:
    choice = {"index": 0, "text": written, "logprobs": None, "finish_reason": finish}
    return {
        "id": answer or f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
        "choices": [choice],
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _finish(text: Continuation) -> str:
    return text.finish or "stop"


def _usage(text: Continuation) -> dict[str, int]:
    took = text.timings
    return {
        "prompt_tokens": took.prompt_tokens,
        "completion_tokens": took.tokens,
        "total_tokens": took.prompt_tokens + took.tokens,
    }


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(isinstance(options, dict) and options.get("include_usage"))
