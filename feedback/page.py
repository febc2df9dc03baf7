"""A page for one person on this machine: an HTML file that sends changes and shows the state after each.

The person's browser also runs other people's pages, which can send requests to this machine, even under a
host name of their own. So a request is answered only if its Host is this machine, its Origin no other page,
and its path holds the token of the address that the program printed. The page itself loads nothing else and
runs no script but its own.
"""
import hmac
import json
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGEST = 4096                              # bytes of a change
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Page(ThreadingHTTPServer):
    """html: the page, in which the word NONCE is replaced by the nonce that lets its style and script run.
    talk: a function from a change to the state after it, both JSON, called for one request at a time; it
    raises ValueError for a change that makes no sense. port: 0 takes a free one."""

    def __init__(self, port, html, talk):
        self.html, self.talk, self.lock, self.token = html, talk, threading.Lock(), secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), Request)
        except OSError as e:
            raise ValueError(f"--port {port}: {e.strerror}") from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/?token={self.token}"


class Request(BaseHTTPRequestHandler):
    timeout = 10                            # seconds to wait for a silent browser

    def parse_request(self):
        """Every request comes through here. False, after a reply, for one that may not be answered."""
        if not super().parse_request():
            return False
        server, token = self.server, self.path.removeprefix("/?token=")
        origins = [None, *(f"http://{host}" for host in server.hosts)]
        if self.headers.get("Host") in server.hosts and self.headers.get("Origin") in origins \
                and hmac.compare_digest(token.encode(), server.token.encode()):
            return True
        self.reply(403, "open the address that the program printed last")
        return False

    def do_GET(self):
        nonce = secrets.token_urlsafe(16)
        self.reply(200, self.server.html.replace("NONCE", nonce), "text/html", nonce)

    def do_POST(self):
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if length > LARGEST:
                return self.reply(413, f"more than {LARGEST} bytes")
            change = json.loads(self.rfile.read(max(0, length)))
            with self.server.lock:
                state = self.server.talk(change)
        except (ValueError, RecursionError) as e:
            return self.reply(400, str(e))
        except OSError as e:                # from the disk, or the browser is gone
            return self.reply(500, e.strerror or str(e))
        self.reply(200, json.dumps(state), "application/json")

    def reply(self, status, text, kind="text/plain", nonce="none"):
        content = text.encode()
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)),
                   "Content-Security-Policy": POLICY.format(nonce), "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        with suppress(OSError):             # the browser may be gone
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        """Prints nothing: the terminal is for the person."""
