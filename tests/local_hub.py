"""A hub on this computer: enough of its file requests for huggingface_hub."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


@contextmanager
def local_hub(files):
    """Serve files; yield (address, list of "METHOD path range" requests).

    The repository's name chooses what goes wrong: ``test/wrong-bytes`` changes
    the end of each file, ``test/cut-once`` closes the connection in the middle
    of the first answer, ``test/cut-always`` of every answer,
    ``test/other-commit`` answers with another commit, ``test/gated`` refuses,
    ``test/no-commit`` knows no commit; every other name is honest.

    Args:
        files: {file name: bytes}.
    """
    requests, cut = [], set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(send_body=False)

        def do_GET(self):
            self.answer(send_body=True)

        def answer(self, send_body):
            asked_range = self.headers.get("Range", "")
            requests.append(f"{self.command} {self.path} {asked_range}".strip())
            owner, _, rest = self.path.lstrip("/").partition("/")
            name, _, rest = rest.partition("/resolve/")
            commit, _, file_name = rest.partition("/")
            if owner != "test" or file_name not in files:
                return self.refuse(404, "EntryNotFound")
            if name == "gated":
                return self.refuse(403, "GatedRepo")
            if name == "no-commit" or commit != COMMIT:
                return self.refuse(404, "RevisionNotFound")
            body = files[file_name]
            # an honest hub's ETag, so that only the bytes give a lie away
            etag = hashlib.sha256(body).hexdigest()
            if name == "wrong-bytes":
                body = body[:-1] + bytes([body[-1] ^ 1])
            start = int(asked_range.removeprefix("bytes=").split("-")[0] or 0)
            self.send_response(206 if asked_range else 200)
            self.send_header("ETag", f'"{etag}"')
            given = OTHER_COMMIT if name == "other-commit" else commit
            self.send_header("X-Repo-Commit", given)
            self.send_header("Content-Length", str(len(body) - start))
            if asked_range:
                last = len(body) - 1
                self.send_header(
                    "Content-Range", f"bytes {start}-{last}/{len(body)}"
                )
            self.end_headers()
            if not send_body:
                return
            if name == "cut-always" or (
                name == "cut-once" and file_name not in cut
            ):
                cut.add(file_name)
                half = start + (len(body) // 2 if start == 0 else 0)
                self.wfile.write(body[start:half])
                self.close_connection = True
                return
            self.wfile.write(body[start:])

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code}, said the test")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
