"""One SGLang server over HTTP: requests, errors, and what this release of it can do."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

try:  # comes with SGLang; answers hold thousands of numbers
    from orjson import dumps as _dumps
    from orjson import loads as _loads
except ImportError:
    from json import loads as _loads

    def _dumps(obj: Any, /) -> bytes:
        return json.dumps(obj, separators=(",", ":")).encode()


# SGLang closes a connection that was idle for 5 s. Ours are dropped earlier: of a request that is
# lost in a closing connection it is not always known whether it arrived.
KEEP_ALIVE_S = 2.0


BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0  # before a request is sent again; doubled every time


def backoff(tries: int) -> float:
    """Seconds to wait after the failure that `tries` others came before; spread at random."""
    return min(BACKOFF_S * 2**tries, BACKOFF_MAX_S) * random.uniform(0.5, 1.0)


class BadAnswer(Exception):
    """An answer that is not what SGLang documents. Sent again, the request may fare better."""


class ServerError(Exception):
    """A server did not do what was asked.

    Attributes:
        url: the server.
        status: the HTTP status; 0 where there was no answer (refused, reset, timed out).
        message: what the server said.
    """

    def __init__(self, url: str, path: str, status: int, message: str) -> None:
        super().__init__(f"{url}{path}: {message}" + (f" (status {status})" if status else ""))
        self.url, self.path, self.status, self.message = url, path, status, message

    @property
    def unreachable(self) -> bool:
        return self.status == 0

    @property
    def refused(self) -> bool:
        """The request itself is at fault: sent again, it would be refused again."""
        return 400 <= self.status < 500 and self.status not in (408, 425, 429)


@dataclass(frozen=True)
class Capabilities:
    """What a release offers, seen from its routes and its answers."""

    version: str  # "" where the server does not say
    update_session: bool  # /begin_weight_update and /end_weight_update
    pause: bool  # /pause_generation and /continue_generation
    checksum: bool  # /weights_checker
    weight_version: bool  # /update_weight_version, and versions in answers
    sampling_mask: bool  # log-probs of a truncated law


class ServerClient:
    """Speaks to one server. Use from one event loop.

    Args:
        url: such as http://127.0.0.1:30000.
        api_key: sent as a bearer token.
        connections: most connections at once.
    """

    def __init__(self, url: str, *, api_key: str = "", connections: int = 1024) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections, keepalive_timeout=KEEP_ALIVE_S
                ),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        stream: AsyncIterator[bytes] | None = None,
    ) -> Any:
        """The JSON answer (text where it is not JSON).

        Args:
            stream: a JSON body that is made while it is sent, in place of `body`.

        Raises:
            ServerError: no answer within `timeout` seconds, a broken connection, a status of 400
                and more, or JSON that does not parse.
        """
        data = stream if body is None else _dumps(body)
        try:
            async with asyncio.timeout(timeout):
                try:
                    status, kind, content = await self._exchange(method, path, data)
                except aiohttp.ClientOSError as err:
                    # Without an errno: an idle connection that the server was closing took none of
                    # the request. A stream may have been used up.
                    if err.errno is not None or stream is not None:
                        raise
                    status, kind, content = await self._exchange(method, path, data)
        except TimeoutError:
            message = "timed out" if timeout is None else f"no answer within {timeout:g} s"
            raise ServerError(self.url, path, 0, message) from None
        except aiohttp.ClientError as err:
            raise ServerError(self.url, path, 0, str(err) or type(err).__name__) from err
        if status >= 400:
            raise ServerError(self.url, path, status, error_message(content))
        if kind != "application/json":
            return content.decode(errors="replace")
        try:
            return _loads(content)
        except ValueError:
            start = content[:100].decode(errors="replace")
            message = f"an answer that is not JSON: {start!r}"
            raise ServerError(self.url, path, status, message) from None

    async def _exchange(self, method: str, path: str, data: Any) -> tuple[int, str, bytes]:
        headers = None if data is None else {"Content-Type": "application/json"}
        request = self._open().request(method, self.url + path, data=data, headers=headers)
        async with request as answer:
            return answer.status, answer.content_type, await answer.read()

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        return await self.request("GET", path, timeout=timeout)

    async def post(self, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        return await self.request("POST", path, body, timeout=timeout)

    async def control(self, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """POST a command whose answer says whether it succeeded.

        Raises:
            ServerError: as `request`, or the answer says "success": false.
        """
        answer = await self.post(path, {} if body is None else body, timeout=timeout)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(self.url, path, 200, str(answer.get("message", answer)))
        return answer

    async def server_info(self, *, timeout: float) -> dict[str, Any]:
        """What the server says about itself; its scheduler has to answer for that.

        Raises:
            ServerError: it does not, within `timeout` seconds.
        """
        try:
            return await self.get("/server_info", timeout=timeout)
        except ServerError as err:
            if err.status != 404:
                raise
            return await self.get("/get_server_info", timeout=timeout)  # older releases

    async def capabilities(self, info: Mapping[str, Any], *, timeout: float = 30.0) -> Capabilities:
        """From the server's own list of routes, and from its `server_info`."""
        routes = set((await self.get("/openapi.json", timeout=timeout)).get("paths", {}))
        return Capabilities(
            version=str(info.get("version", "")),
            update_session="/begin_weight_update" in routes,
            pause="/pause_generation" in routes,
            checksum="/weights_checker" in routes,
            weight_version="/update_weight_version" in routes,
            sampling_mask="sampling_mask_max_tokens" in info,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def error_message(content: bytes) -> str:
    """What the body of an error says: SGLang's {"error": ...}, FastAPI's {"detail": ...}, text."""
    text = content.decode(errors="replace")
    try:
        body = _loads(content)
    except ValueError:
        return text[:500]
    for key in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return str(body)[:500]
