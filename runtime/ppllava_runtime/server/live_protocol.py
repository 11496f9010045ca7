"""WebSockets that end well: a server that is told to stop does not cut off an answer."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

RESTARTING = 1012  # of WebSocket


class LiveProtocol(WebSocketsSansIOProtocol):
    """One connection; its application is told of a stop and closes it, when it has said all."""

    def shutdown(self) -> None:
        """Tells the application, once: to it the client has gone, with the code RESTARTING."""
        if not self.handshake_complete or self.close_sent:
            super().shutdown()
            return
        self.stop_keepalive()  # nothing more is read, and so no answer to it
        self.queue.put_nowait({"type": "websocket.disconnect", "code": RESTARTING})

    async def send(self, message: Any) -> None:
        """Sends what the application says."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            # A refusal is an answer too, which uvicorn takes for a failure.
            self.handshake_complete = True
