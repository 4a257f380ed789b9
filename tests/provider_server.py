"""A server on loopback that speaks the protocols of OpenAI (chat completions) and Anthropic (messages), by a script."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-loopback-1234567890"


@dataclass
class Answer:
    """One reply: a status with headers and a body; `body` None is the usual completion of `text`."""

    status: int = 200
    text: str = "Paris"
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """(id, name, arguments) of tools."""
    reasoning: str = ""
    finish: str = ""
    held: threading.Event | None = None
    """The reply is sent when this is set."""


class ProviderServer(ThreadingHTTPServer):
    """Answers requests from `script`, one after another, and then as `respond` says. Keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: deque[Answer] = deque()
        self.respond: Callable[[dict[str, Any]], Answer] = lambda request: Answer()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.key: str | None = KEY
        self.lock = threading.Lock()
        self.running = 0
        self.most_at_once = 0

    @property
    def host(self) -> str:
        """The address; OpenAI's protocol is under /v1."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ProviderServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = server.script.popleft() if server.script else server.respond(request)
            server.running += 1
            server.most_at_once = max(server.most_at_once, server.running)
        if answer.held is not None:
            answer.held.wait(20)
        sent = f"{self.headers.get('Authorization', '')} {self.headers.get('X-Api-Key', '')}"
        if server.key is not None and server.key not in sent:
            answer = Answer(401, body=json.dumps({"error": {"message": f"Incorrect API key provided: {sent.strip()}"}}))
        with server.lock:
            server.running -= 1
        openai = self.path == "/v1/chat/completions"
        body = answer.body
        if body is None:
            body = json.dumps(_completion(request, answer) if openai else _message(request, answer))
        self.send_response(answer.status if openai or self.path == "/v1/messages" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())


def _completion(request: dict[str, Any], answer: Answer) -> dict[str, Any]:
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for call_id, name, arguments in answer.calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    message |= {"tool_calls": calls} if calls else {}
    message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish or "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


def _message(request: dict[str, Any], answer: Answer) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": "s"})
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += [{"type": "tool_use", "id": call, "name": name, "input": given} for call, name, given in answer.calls]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": content,
        "stop_reason": answer.finish or "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 11, "output_tokens": 3},
    }


@contextmanager
def provider_server() -> Iterator[ProviderServer]:
    """A server that runs inside the block."""
    server = ProviderServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
