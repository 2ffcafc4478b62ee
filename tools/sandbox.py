"""A process that may use processor, memory and nothing else.

    python tools/sandbox.py --install  # what `make setup` runs

`Worker` starts tools/worker.py by bubblewrap (https://github.com/containers/
bubblewrap): other namespaces for processes, network, users and files; of the
disk only the system's programs, Python, its packages and lora_from_scratch can
be read, and a private /tmp can be written. Run by root, each sandbox becomes a
user that nobody else is, so that limits count. Memory of one process, sizes of
files and the number of processes are limited inside; time and the memory of all
together are watched from here, and who takes more is ended with all that it
started.
"""

import contextlib
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import worker  # noqa: E402
from tools.find_chromium import install_from_debian  # noqa: E402

NOBODY = 65534
MEGABYTES = 4096  # of address space, each process
ALL_MEGABYTES = 6144  # in memory, all processes of a sandbox
DISK_MEGABYTES = 512  # in /tmp, which is memory too
FILE_MEGABYTES = 100
PROCESSES = 32  # and threads; four times as many if the user is shared
USERS = range(1_000_000, 2_000_000)  # one for each sandbox that root starts
START_SECONDS = 120  # to import torch on a busy machine
HELP = (
    "submissions are run by bubblewrap, and it is missing here.\n"
    "Debian, Ubuntu: apt install bubblewrap. Fedora: dnf install bubblewrap.\n"
    "macOS and Windows have no such thing: grade in a Linux virtual machine,"
    " in WSL 2 or in a container."
)


class Stopped(Exception):
    """The process ended, or was ended; its message says why."""


def command():
    """Return the command that runs worker.py in its sandbox.

    Raises:
        FileNotFoundError: if bubblewrap is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise FileNotFoundError(HELP)
    package = ROOT / "lora_from_scratch"
    inner = Path("/grader/worker.py")
    parts = [bwrap, "--new-session", "--die-with-parent", "--cap-drop", "ALL"]
    parts += ["--unshare-ipc", "--unshare-pid", "--unshare-net"]
    parts += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    if os.getuid() == 0:  # worker.py then becomes another user itself
        parts += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        parts += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    parts += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp"]
    for path, megabytes in (("/tmp", DISK_MEGABYTES), ("/dev/shm", 64)):
        parts += ["--perms", "1777", "--size", str(megabytes << 20)]
        parts += ["--tmpfs", path]
    for path in system_folders():
        parts += readable(path, path)
    for name in ("bin", "lib", "lib64", "sbin"):
        link = Path("/", name)
        if link.is_symlink():
            parts += ["--symlink", os.readlink(link), str(link)]
        elif link.is_dir():
            parts += readable(link, link)
    parts += readable(package, Path("/course", package.name))
    recorded = Path("notebooks", "results")  # numbers that lessons read
    parts += readable(ROOT / recorded, Path("/course", recorded))
    parts += readable(Path(worker.__file__), inner)
    parts += ["--remount-ro", "/", "--remount-ro", "/dev", "--clearenv"]
    for name, value in environment().items():
        parts += ["--setenv", name, value]
    if os.getuid() == 0:
        user, processes = random.choice(USERS), PROCESSES
    else:  # the limit counts all that this user runs
        user, processes = NOBODY, running() + 4 * PROCESSES
    limits = user, MEGABYTES, FILE_MEGABYTES, processes
    return [*parts, "--", sys.executable, str(inner), *map(str, limits)]


def readable(path, inside):
    """Return the options that show a file or folder under another path."""
    parts = []
    for folder in reversed(inside.parents[:-1]):  # else only root may enter
        parts += ["--perms", "0755", "--dir", str(folder)]
    return [*parts, "--ro-bind", str(path), str(inside)]


def system_folders():
    """Return the folders of programs and packages, none inside another."""
    found = {Path("/usr"), Path(sys.base_prefix), Path(sys.prefix)}
    return sorted(
        path
        for path in found
        if not any(other in path.parents for other in found)
    )


def environment():
    """Return the environment of a student's process."""
    from tools.notebooks import ENVIRONMENT

    return ENVIRONMENT | {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "agg",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "/course",
    }


def running():
    """Return how many threads of this user run now."""
    return sum(
        process.info["num_threads"] or 0
        for process in psutil.process_iter(["uids", "num_threads"])
        if process.info["uids"].real == os.getuid()
    )


class Worker:
    """One process in the sandbox; `ask` sends a request and waits."""

    def __init__(self, start=None):
        self.process = subprocess.Popen(
            start or command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self.complaint, self.asked = "", 0
        try:
            self.receive(START_SECONDS)
        except Stopped as error:
            raise OSError(
                f"the sandbox does not start: {error}\n{self.complaint}"
            ) from None

    def ask(self, request, seconds):
        """Return the reply to a request.

        Raises:
            Stopped: if none came in that time, or none that can be read.
        """
        self.asked += 1
        message = worker.pack(request | {"n": self.asked})
        self.write(struct.pack("<I", len(message)) + message, seconds)
        reply = self.receive(seconds)
        if type(reply) is not dict or reply.pop("n", None) != self.asked:
            self.end("it sent what nobody asked for")
        return reply

    def write(self, data, seconds):
        """Send bytes to a process that may not take them."""
        until, data = time.monotonic() + seconds, memoryview(data)
        while data:
            left = until - time.monotonic()
            pipe = self.process.stdin.fileno()
            if left <= 0 or not select.select([], [pipe], [], left)[1]:
                self.end(f"it took longer than {seconds} s")
            try:
                data = data[os.write(pipe, data) :]
            except OSError:
                self.end("the process ended")

    def receive(self, seconds):
        """Read one message."""
        until = time.monotonic() + seconds
        (length,) = struct.unpack("<I", self.read(4, until, seconds))
        if length > worker.MAX_BYTES:
            self.end(f"it sent more than {worker.MAX_BYTES >> 20} MB")
        try:
            return worker.unpack(self.read(length, until, seconds))
        except ValueError as error:
            self.end(str(error))

    def read(self, count, until, seconds):
        """Read so many bytes before a point in time."""
        data = bytearray()
        while len(data) < count:
            left = until - time.monotonic()
            if left <= 0:
                self.end(f"it took longer than {seconds} s")
            pipe = self.process.stdout
            if not select.select([pipe], [], [], min(left, 0.5))[0]:
                if self.megabytes() > ALL_MEGABYTES:
                    self.end(f"it took more than {ALL_MEGABYTES} MB of memory")
                continue
            chunk = os.read(pipe.fileno(), min(count - len(data), 1 << 20))
            if not chunk:
                self.end("the process ended")
            data += chunk
        return bytes(data)

    def megabytes(self):
        """Return the memory of all processes of the sandbox."""
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total >> 20

    def end(self, why):
        """End the process and all its children, then raise why."""
        self.close()
        raise Stopped(why)

    def close(self):
        """End the process and keep what the sandbox itself complained of."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            self.process.stdin.close()
        except OSError:
            pass
        self.complaint = self.process.stderr.read(5000).decode(errors="replace")
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.process.stdout.closed:
            self.close()


def main():
    """Say whether submissions can be run here; with --install, see to it."""
    installing = "--install" in sys.argv[1:]
    if installing and sys.platform == "linux" and not shutil.which("bwrap"):
        install_from_debian("bubblewrap")
    try:
        with Worker():
            print("submissions can be run here")
    except OSError as error:
        print(error, file=sys.stderr)
        if not installing or os.environ.get("CI"):
            sys.exit(1)


if __name__ == "__main__":
    main()
