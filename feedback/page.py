"""A page for one person on this machine: an HTML file that sends changes and shows the state after each.

The person's browser runs other people's pages too. They can send requests to this machine, and let a name of
their own lead here, so a request is answered only with this machine's name as its Host, no other page as its
Origin, and the token of the address that the program prints. The page itself loads and runs nothing else.
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
    """html: the text, in which NONCE stands for the word that lets its style and script run. talk: from a
    change to the state after it, both JSON, for one request at a time; a change that makes no sense is a
    ValueError. port: 0 takes a free one."""

    def __init__(self, port, html, talk):
        self.html, self.talk, self.lock, self.token = html, talk, threading.Lock(), secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), Request)
        except OSError as e:
            raise ValueError(f"--port {port}: {e.strerror}") from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/?token={self.token}"


class Request(BaseHTTPRequestHandler):
    timeout = 10                            # seconds to wait for a browser that falls silent

    def is_trusted(self):
        """Whether it may be answered; if not, it is refused here."""
        server, token = self.server, self.path.removeprefix("/?token=")
        origins = [None, *(f"http://{host}" for host in server.hosts)]
        if self.headers.get("Host") in server.hosts and self.headers.get("Origin") in origins \
                and hmac.compare_digest(token.encode(), server.token.encode()):
            return True
        self.reply(403, "open the address that the program printed last")
        return False

    def do_GET(self):
        if self.is_trusted():
            nonce = secrets.token_urlsafe(16)
            self.reply(200, self.server.html.replace("NONCE", nonce), "text/html", nonce)

    def do_POST(self):
        if not self.is_trusted():
            return
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if length > LARGEST:
                return self.reply(413, f"more than {LARGEST} bytes")
            change = json.loads(self.rfile.read(max(0, length)))
            with self.server.lock:
                state = self.server.talk(change)
        except (ValueError, RecursionError) as e:
            return self.reply(400, str(e))
        except OSError as e:                # the disk's, or the browser went away
            return self.reply(500, e.strerror or str(e))
        self.reply(200, json.dumps(state), "application/json")

    def reply(self, status, text, kind="text/plain", nonce="none"):
        content = text.encode()
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)),
                   "Content-Security-Policy": POLICY.format(nonce), "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        with suppress(OSError):             # a browser may have gone away
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *about):
        """Nothing: the terminal is for the person."""
