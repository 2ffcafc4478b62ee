"""Serve _build/html on this computer only; Ctrl-C stops it.

python tools/serve.py [port]    # 8000, or a free port if that is taken
"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGES = Path(__file__).resolve().parents[1] / "_build" / "html"


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without a line of log for each of them."""

    def log_message(self, format, *args):
        """Say nothing."""


def server(port, folder=PAGES):
    """Return a server of ``folder`` on ``port``, or on a free port."""
    handler = partial(Quiet, directory=str(folder))
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError:  # taken, or not allowed
        return ThreadingHTTPServer(("127.0.0.1", 0), handler)


def main():
    """Serve until Ctrl-C."""
    if not (PAGES / "index.html").is_file():
        sys.exit("the book is not built yet; run `make html`")
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with server(port) as httpd:
        address = f"http://127.0.0.1:{httpd.server_address[1]}/"
        print(f"The book is at {address} (Ctrl-C stops it)", flush=True)
        try:
            httpd.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
