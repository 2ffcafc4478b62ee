"""The door of the server: errors in one shape, the token, the body's size.

    {"error": {"message", "type", "param", "code"}}     OpenAI's, for all

Source: OpenAI API reference, "Error codes"; vLLM docs, "Security" (what needs
the token); ASGI specification 3.0, "HTTP connection scope".
Taught in: notebooks/15_serving.ipynb
"""

import asyncio
import hashlib
import hmac
import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora_from_scratch.serving.metrics import Metrics

MAX_BODY_BYTES = 2**18
MAX_BODY_SECONDS = 30.0  # who sends slower than this is let go
OPEN_PATHS = "/health", "/metrics"  # need no token, as in vLLM
COUNTED_PATHS = "/v1/completions", "/v1/chat/completions"


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: what is wrong and the way out.
        code: OpenAI's word for it, which programs compare.
        param: the field of the body that is to blame.
        headers: to send with it.
    """

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.headers = code, param, headers

    def body(self) -> dict:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": _printable(self.message),
                "type": kind,
                "param": self.param and _printable(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _printable(text):
    # half a character (a lone surrogate) cannot be sent as UTF-8
    return text.encode("utf-8", "backslashreplace").decode()


async def _api_error(request: Request, error: ApiError):
    return error.response()


async def _http_error(request: Request, error: HTTPException):
    """Turn 404 and 405 of the router into OpenAI's shape."""
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(
        error.status_code, message, headers=error.headers
    ).response()


async def _invalid_body(request: Request, error: RequestValidationError):
    """Turn FastAPI's 422 into OpenAI's 400."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, first["loc"][1:]))
    if first["type"] == "json_invalid":
        param, message = "", f"not JSON: {first['ctx']['error']}"
    elif not param and first["type"] in ("missing", "model_attributes_type"):
        message = "send a JSON object, with Content-Type: application/json"
    elif first["type"] == "extra_forbidden":
        message = "unknown here, or cannot be honored with this value"
    message = f"{param}: {message}" if param else message
    return ApiError(400, message, param=param or None).response()


async def _bug(request: Request, error: Exception):
    # Starlette raises the error again, and uvicorn logs it
    return ApiError(
        500, "internal error; the server's log says more"
    ).response()


def answer_errors(app: FastAPI) -> None:
    """Give every error that leaves ``app`` OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(Exception, _bug)


class Gate:
    """What a request passes before the app sees it (ASGI middleware).

    Asks for the token, reads the body whole, whatever its Content-Length
    claims, and counts the answer.

    Args:
        app: what comes behind.
        metrics: where answers are counted.
        token: None lets everybody in.
    """

    def __init__(self, app, metrics: Metrics, token: str | None):
        self.app, self.metrics = app, metrics
        self.token = None if token is None else _digest(token.encode())

    async def __call__(self, scope, receive, send):
        """Handle one connection, and count it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})  # request.state in a route
        state["arrived"] = time.perf_counter()
        status = 499  # nginx's number for a client that left

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.enter(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            if scope["path"] in COUNTED_PATHS:
                self.metrics.count_request(state.get("model"), status)

    async def enter(self, scope, receive, send):
        """Call the app, or answer the error that keeps the request out."""
        try:
            if scope["path"] not in OPEN_PATHS:
                self.check_token(dict(scope["headers"]))
            async with asyncio.timeout(MAX_BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            late = ApiError(408, f"no whole body in {MAX_BODY_SECONDS:g} s")
            return await late.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is None:
            return None
        messages = [{"type": "http.request", "body": body}]

        async def again():
            return messages.pop() if messages else await receive()

        return await self.app(scope, again, send)

    def check_token(self, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError 401 unless the right token came along."""
        if self.token is None:
            return
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        # digests: equal lengths, compared in constant time
        same = hmac.compare_digest(_digest(sent), self.token)
        if not same or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "no token, or a wrong one; send Authorization: Bearer TOKEN",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(token):
    return hashlib.sha256(token).digest()


async def _read(receive):
    """Return the body; None if the client left before its end."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"a body may have {MAX_BODY_BYTES:,} bytes")
        more = message.get("more_body", False)
    return bytes(body)
