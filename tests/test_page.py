"""A page on this machine: who is answered, and what a broken request does."""
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from feedback.page import LARGEST, Page


@pytest.fixture
def page():
    said = []

    def talk(change):
        if change == "nonsense":
            raise ValueError("this makes no sense")
        if change == "disk":
            raise OSError(28, "No space left on device")
        said.append(change)
        return {"n": len(said)}
    page = Page(0, "<script nonce=NONCE></script>", talk)
    page.said = said
    thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield page
    page.shutdown()
    page.server_close()
    thread.join()


def ask(page, method="POST", body="{}", path=None, **headers):
    """(status, headers, text) of a request that is fine but for what is given. A header None is left out."""
    headers = {"Host": page.hosts[0], "Content-Length": str(len(body))} | {
        name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)
    connection.putrequest(method, path or f"/?token={page.token}", skip_host=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body.encode() if method == "POST" else None)
    reply = connection.getresponse()
    status, headers, text = reply.status, reply.headers, reply.read().decode()
    connection.close()
    return status, headers, text


def test_a_page_is_served_and_answers_its_own_requests(page):
    status, headers, text = ask(page, "GET")
    nonce = re.fullmatch("<script nonce=(.+)></script>", text)[1]
    policy = headers["Content-Security-Policy"]
    assert status == 200 and f"script-src 'nonce-{nonce}'" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert nonce not in ask(page, "GET")[2]                             # new each time
    for host in page.hosts:
        status, headers, text = ask(page, body='{"a": [1]}', Host=host, Origin=f"http://{host}")
        assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert json.loads(text) == {"n": 2} and page.said == [{"a": [1]}] * 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_foreign_requests_are_refused(page, method):
    port = page.server_port
    for host in (None, "", "evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1",
                 f"127.0.0.1:{port}.evil.example", f"[::1]:{port}"):
        assert ask(page, method, Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1",
                   f"http://127.0.0.1:{port}.evil.example", ""):
        assert ask(page, method, Origin=origin)[0] == 403, origin
    for path in ("/", "/?token=", f"/?token={page.token[:-1]}", f"/?token={page.token}x", "/?token=%ff%00",
                 f"/?token={page.token}&a=b", f"//evil?token={page.token}"):
        assert ask(page, method, path=path)[0] == 403, path
    assert page.said == [] and page.token not in ask(page, method, path="/")[2]


def test_a_token_serves_one_run_only(page):
    other = Page(0, "", None)
    other.server_close()
    assert len(other.token) >= 16 and other.token != page.token
    assert ask(page, path=f"/?token={other.token}")[0] == 403


def test_a_page_listens_on_this_machine_alone_and_a_taken_port_is_one_line(page):
    assert page.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=f"--port {page.server_port}: .*in use"):
        Page(page.server_port, "", None)


@pytest.mark.parametrize("body, length, status", [
    ("", None, 400), ("", "0", 400), ("{", "1", 400), ("{}", "-5", 400), ("{}", "two", 400),
    ("[" * 4000, "4000", 400), ("NaN and", "7", 400), ("\udc80", "3", 400),
    ('"nonsense"', "10", 400), ('"disk"', "6", 500),
    ("x" * (LARGEST + 1), str(LARGEST + 1), 413), ("{}", "9" * 30, 413)])
def test_a_broken_request_is_refused_and_kills_nothing(page, body, length, status):
    body = body.encode("utf-8", "surrogatepass").decode("latin-1")
    assert ask(page, body=body, Content_Length=length)[0] == status
    assert ask(page, body='"next"')[0] == 200 and page.said == ["next"]


def test_whatever_is_not_http_or_stops_half_way_holds_up_nobody(page):
    head = f"POST /?token={page.token} HTTP/1.1\r\nHost: {page.hosts[0]}\r\nContent-Length: 100\r\n\r\n{{"
    waiting = []
    for junk in (b"", b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"PUT / HTTP/1.1\r\n\r\n", b"A" * 70000,
                 head.encode(), head.replace(page.token, "ÿ").encode("latin-1")):
        waiting.append(socket.create_connection(("127.0.0.1", page.server_port)))
        waiting[-1].sendall(junk)
    assert ask(page)[0] == 200                                          # while the others are still open
    for connection in waiting:
        connection.close()
    assert ask(page)[0] == 200 and page.said == [{}, {}]


def test_requests_at_once_are_taken_one_by_one(page):
    inside, most = [], []

    def talk(change):
        inside.append(change)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(change)
        return change
    page.talk = talk
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: ask(page, body=str(n)), range(40)))
    assert [int(text) for _, _, text in replies] == list(range(40)) and max(most) == 1
