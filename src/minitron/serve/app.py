"""The routes of the server, and what stands before all of them: keys, errors in OpenAI's form, and a log without
prompts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ..version import __version__
from .bodies import read
from .chat_route import ChatAnswer, chat_sequences, choices_of
from .completion_route import CompletionAnswer, completion_sequences
from .context import Context
from .errors import ApiError, failed, unavailable
from .gate import PAGE, Gate
from .generation import ClientLeft, Generation, unless_client_leaves
from .judging_routes import JudgingRoutes
from .requests import rendered
from .responses_route import ResponsesAnswer
from .responses_schema import ResponsesRequest
from .scheduler import TextSequence
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, validated
from .served import AnyModel, ServedModel
from .streams import EventStream

CLOSED_BY_CLIENT = 499
"""Status in the log of a request whose client has left, as nginx writes it."""
_log = logging.getLogger("minitron.serve")

Handler = Callable[[Request], Awaitable[Any]]


def make_app(context: Context) -> Starlette:
    """The ASGI application of a server whose engine loop is running."""
    routes, judging = Routes(context), JudgingRoutes(context)
    found: list[Any] = [
        Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        Route("/v1/completions", routes.complete, methods=["POST"]),
        Route("/v1/responses", routes.respond, methods=["POST"]),
        Route("/v1/embeddings", judging.embeddings, methods=["POST"]),
        Route("/v1/classify", judging.classify, methods=["POST"]),
        Route("/classify", judging.classify, methods=["POST"]),
        Route("/v1/models", routes.models, methods=["GET"]),
        Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/detokenize", routes.detokenize, methods=["POST"]),
        Route("/health", routes.health, methods=["GET"]),
        Route("/ready", routes.ready, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
    ]
    found += _page_routes()
    middleware = [Middleware(Gate, context=context)]
    if context.settings.cors:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(context.settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            ),
        )
    handlers: Any = {
        ApiError: _api_error,
        ClientLeft: _client_left,
        HTTPException: _http_error,
        Exception: _unexpected,
    }
    return Starlette(routes=found, middleware=middleware, exception_handlers=handlers)


def _page_routes() -> list[Route]:
    """The files of the page, if it is there; index.html is at / too."""

    def route(path: str, file: Path) -> Route:
        async def give(http: Request) -> Response:
            return FileResponse(file, headers={"Cache-Control": "no-cache"})

        return Route(path, give, methods=["GET"])

    files = [path for path in sorted(PAGE.rglob("*")) if path.is_file()]
    index = [route("/", PAGE / "index.html")] if PAGE / "index.html" in files else []
    return index + [route(f"/{path.relative_to(PAGE).as_posix()}", path) for path in files]


class Routes:
    """The functions behind the routes."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._started = int(time.time())

    # --- text ------------------------------------------------------------------------------------------------------

    async def chat(self, http: Request) -> Any:
        """The assistant's next message."""
        request = await read(http, self._context, ChatRequest)
        model = self._context.served.find(request.model)
        choices = choices_of(model, request)
        # Rendering and compiling of grammars may take long; the event loop goes on meanwhile.
        sequences = await asyncio.to_thread(chat_sequences, self._context, model, request)
        return await self._answer(http, model, sequences, ChatAnswer(model, request, choices), bool(request.stream))

    async def complete(self, http: Request) -> Any:
        """The continuations of texts."""
        request = await read(http, self._context, CompletionRequest)
        model = self._context.served.find(request.model)
        sequences = await asyncio.to_thread(completion_sequences, self._context, model, request)
        return await self._answer(
            http, model, sequences, CompletionAnswer(model, request, sequences), bool(request.stream)
        )

    async def respond(self, http: Request) -> Any:
        """The output items that follow some input items."""
        request = await read(http, self._context, ResponsesRequest)
        as_chat = validated(ChatRequest, request.chat_values())
        model = self._context.served.find(request.model)
        [choice] = choices_of(model, as_chat)
        sequences = await asyncio.to_thread(chat_sequences, self._context, model, as_chat)
        return await self._answer(http, model, sequences, ResponsesAnswer(model, request, choice), bool(request.stream))

    async def _answer(
        self, http: Request, model: ServedModel, sequences: list[TextSequence], answer: Any, stream: bool
    ) -> Any:
        """Run sequences and respond with an answer, whole or as events."""
        if self._context.draining:
            raise unavailable("the server is shutting down")
        generation = Generation(self._context.served, model, sequences, self._context.metrics)
        if stream:
            resources = ExitStack()
            resources.enter_context(generation)  # a full queue is refused with a status, before the stream begins
            return EventStream(answer.events(generation), self._context.settings.body_seconds, resources)
        with generation:
            return JSONResponse(await unless_client_leaves(http.receive, answer.whole(generation)))

    # --- models and tokens -----------------------------------------------------------------------------------------

    async def models(self, http: Request) -> Response:
        """The models that can be asked."""
        return JSONResponse({"object": "list", "data": [self._model(model) for model in self._context.served]})

    async def model(self, http: Request) -> Response:
        """One model."""
        return JSONResponse(self._model(self._context.served.any_of(http.path_params["name"])))

    def _model(self, model: AnyModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "minitron",
            "max_model_len": model.context,
        }

    async def tokenize(self, http: Request) -> Response:
        """The token ids of a text or a conversation."""
        request = await read(http, self._context, TokenizeRequest)
        model = self._context.served.find(request.model)
        ids = await asyncio.to_thread(_tokenized, model, request)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": model.context, "tokens": ids}
        if request.return_token_strs:
            found["token_strs"] = model.tokenizer.convert_ids_to_tokens(ids)
        return JSONResponse(found)

    async def detokenize(self, http: Request) -> Response:
        """The text of token ids."""
        request = await read(http, self._context, DetokenizeRequest)
        model = self._context.served.find(request.model)
        ids = model.check_ids(request.tokens, "tokens")
        return JSONResponse({"prompt": model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)})

    # --- operation -------------------------------------------------------------------------------------------------

    async def health(self, http: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "ok", "version": __version__})

    async def ready(self, http: Request) -> Response:
        """Whether requests would be answered."""
        if not self._context.served.loop.alive:
            raise unavailable("the engine does not run")
        if self._context.draining:
            raise unavailable("the server is shutting down")
        return JSONResponse({"status": "ready", "models": [model.name for model in self._context.served]})

    async def metrics(self, http: Request) -> Response:
        """Counters for Prometheus."""
        text = self._context.metrics.text(self._context.served.writing)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _tokenized(model: ServedModel, request: TokenizeRequest) -> list[int]:
    if request.prompt is not None:
        return model.encode(request.prompt, request.add_special_tokens)
    text = rendered(model, request.messages or [], request.tools, request.add_generation_prompt)
    return model.encode(text, special=False)


# --- errors --------------------------------------------------------------------------------------------------------


async def _api_error(http: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _client_left(http: Request, error: Any) -> Response:
    return Response(status_code=CLOSED_BY_CLIENT)


async def _http_error(http: Request, error: Any) -> Response:
    if error.status_code == 404:
        found = ApiError(f"there is no {http.method} {http.url.path} here", status=404, code="unknown_url")
    elif error.status_code == 405:
        found = ApiError(
            f"{http.url.path} does not take {http.method}", status=405, code="method_not_allowed", headers=error.headers
        )
    else:
        found = ApiError(str(error.detail), status=error.status_code)
    return await _api_error(http, found)


async def _unexpected(http: Request, error: Exception) -> Response:
    return await _api_error(http, failed("an unexpected error; the server's log has more"))
