"""A job server that records what it is sent: the requests of Ray's client answered from memory, by a real HTTP server.

What a real one does with a job is tested on a real one (tests/jobs/cluster/test_cluster.py).
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import ray

Behaviour = Literal["open", "token", "redirect", "website"]


@dataclass
class RecordingServer:
    """Jobs by id, and every request with its headers and body."""

    address: str
    behaviour: Behaviour
    token: str
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)

    @property
    def authorizations(self) -> list[str]:
        """What each request carried, in order."""
        return [headers.get("authorization", "") for _, headers, _ in self.requests]

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        self.requests.append((f"{method} {path}", headers, body))
        if self.behaviour == "token" and headers.get("authorization") != f"Bearer {self.token}":
            return (403, "Forbidden") if headers.get("authorization") else (401, "Unauthorized")
        match method, path.strip("/").split("/"):
            case "GET", ["api", "version"]:
                return 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}
            case "GET", ["api", "jobs"]:
                return 200, list(self.jobs.values())
            case "POST", ["api", "jobs"]:
                return self._submit(json.loads(body))
            case "GET", ["api", "jobs", job_id] if job_id in self.jobs:
                return 200, self.jobs[job_id]
            case "GET", ["api", "jobs", job_id, "logs"] if job_id in self.jobs:
                return 200, {"logs": self.jobs[job_id]["log"]}
            case "POST", ["api", "jobs", job_id, "stop"] if job_id in self.jobs:
                self.jobs[job_id]["status"] = "STOPPED"
                return 200, {"stopped": True}
            case "GET", ["api", "packages", "gcs", name]:
                return (200, {}) if name in self.packages else (404, "none")
            case "PUT", ["api", "packages", "gcs", name]:
                self.packages[name] = body
                return 200, {}
        return 404, "none"

    def end(self, job_id: str, status: str, log: str = "") -> None:
        """A job comes to its end."""
        self.jobs[job_id] |= {"status": status, "end_time": 2000, "log": log}

    def _submit(self, request: dict[str, Any]) -> tuple[int, Any]:
        job_id = request["submission_id"]
        if job_id in self.jobs:
            return 500, f"Traceback\nValueError: Job with submission_id {job_id} already exists."
        kept = {name: request.get(name) for name in ("entrypoint", "metadata", "runtime_env")}
        known = {"type": "SUBMISSION", "submission_id": job_id, "status": "RUNNING", "start_time": 1000, "log": ""}
        self.jobs[job_id] = kept | known
        return 200, {"submission_id": job_id, "job_id": job_id}


@contextlib.contextmanager
def recording_server(behaviour: Behaviour = "open", token: str = "") -> Iterator[RecordingServer]:
    """A server on loopback, ended with the block."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            status, content = server.answer(self.command, self.path, headers, body)
            is_site = server.behaviour in ("redirect", "website")
            status = {"redirect": 302, "website": 200}.get(server.behaviour, status)
            text = content if isinstance(content, str) else json.dumps(content)
            data = b"<html>" if is_site else text.encode()
            self.send_response(status)
            self.send_header("content-type", "text/html" if is_site else "application/json")
            if server.behaviour == "redirect":
                self.send_header("location", "https://login.example/")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = RecordingServer(address=f"http://127.0.0.1:{http.server_port}", behaviour=behaviour, token=token)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
