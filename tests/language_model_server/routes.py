"""Every address of the server: both wire formats, and the control endpoint that tests speak to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import anthropic_batches, openai_batches
from .behaviours import STATUSES
from .openai_chat import model_entry, model_list
from .questions import RequestError
from .record import Entry, Log
from .service import ANTHROPIC, OPENAI, Service, Wire, error_of, failed, key_of, parsed
from .wire import Incoming, Outgoing, as_json


class Server:
    """Everything that one process serves."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.service = Service()
        self._openai = openai_batches.Batches(self.service)
        self._anthropic = anthropic_batches.Batches(self.service)

    async def handle(self, incoming: Incoming) -> Outgoing:
        """Answer one request."""
        if incoming.path.startswith("/control/"):
            return self._control(incoming)
        path = incoming.path
        wire = ANTHROPIC if path.startswith("/v1/messages") or "anthropic-version" in incoming.headers else OPENAI
        entry = self.service.log.enter(_route(incoming), path)
        entry.status = 401
        if not key_of(incoming):
            return failed(wire, RequestError(401, "You didn't provide an API key.", "invalid_api_key"))
        if entry.route == "completions":
            return await self.service.complete(wire, incoming, entry)
        try:
            outgoing = self._manage(wire, incoming, entry)
        except RequestError as error:
            outgoing = failed(wire, error)
        entry.status = outgoing.status
        return outgoing

    def _manage(self, wire: Wire, incoming: Incoming, entry: Entry) -> Outgoing:
        """Answer what is not a question, with the faults that are meant for it."""
        model = self.service.models.get("*")
        fault = model.fault(entry.route, "", "") if model else None
        entry.fault = fault.kind if fault else ""
        if fault and fault.kind in STATUSES:
            return failed(wire, error_of(fault), fault)
        if fault and fault.kind in ("cut", "hang"):
            return Outgoing(cut_at=-1, hold_s=fault.seconds if fault.kind == "hang" else 0.0)
        outgoing = self._found(wire, incoming, entry)
        if fault and fault.kind == "cut_body":
            outgoing.cut_at = 0.5
        return outgoing

    def _found(self, wire: Wire, incoming: Incoming, entry: Entry) -> Outgoing:
        path = incoming.path
        if path.startswith("/v1/messages/batches"):
            return self._anthropic.route(incoming)
        if path.startswith(("/v1/files", "/v1/batches")):
            return self._openai.route(incoming)
        names = self.service.models.names()
        if path == "/v1/models":
            return as_json(_anthropic_models(names) if wire is ANTHROPIC else model_list(names))
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            self.service.model(name)
            return as_json(_anthropic_model(name) if wire is ANTHROPIC else model_entry(name))
        raise RequestError(404, f"Invalid URL ({incoming.method} {path})")

    def _control(self, incoming: Incoming) -> Outgoing:
        """Answer a test: set behaviours, read the log, begin anew."""
        call = incoming.path.removeprefix("/control/")
        log: Log = self.service.log
        try:
            if call == "behaviour":
                body: Mapping[str, Any] = parsed(incoming.body)
                self.service.models.put(body["model"], body["behaviour"])
            elif call == "reset":
                self._begin()
            elif call == "reset_log":
                self.service.log = Log(log.keep_bodies)
            elif call == "keep_bodies":
                log.keep_bodies = bool(parsed(incoming.body)["keep"])
            elif call == "counts":
                return as_json(log.counts())
            elif call == "log":
                return as_json(log.rows(incoming.query.get("bodies") == "1"))
            elif call != "health":
                return as_json({"error": f"no control {call!r}"}, 404)
        except (RequestError, KeyError, TypeError, ValueError) as error:
            return as_json({"error": f"{type(error).__name__}: {error}"}, 400)
        return as_json({"ok": True})


def _route(incoming: Incoming) -> str:
    """Return what kind of call it is, as `behaviours.Route` names them."""
    path = incoming.path
    if path in ("/v1/chat/completions", "/v1/messages"):
        return "completions"
    if path.startswith("/v1/models"):
        return "models"
    if incoming.method == "GET":
        return "downloads" if path.endswith(("/content", "/results")) else "polls"
    return "files" if path.startswith("/v1/files") else "batches"


def _anthropic_model(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": "2026-01-01T00:00:00Z",
        "lifecycle": "active",
    }


def _anthropic_models(names: list[str]) -> dict[str, Any]:
    rows = [_anthropic_model(name) for name in names]
    return {
        "data": rows,
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }
