"""The process of one submission: it runs a student's cells and answers calls.

    python worker.py < requests > replies

Everything here belongs to the student, who may read and change it: the cells
run in this process. The grader takes what comes out as plain data and nothing
else (`unpack` builds numbers, texts, lists and arrays, never an object of
another kind), so a forged reply can say no more than a wrong answer could.

A message is four bytes of length, then a JSON header, a zero byte and the
bytes of all arrays. Requests: {"run": source}, {"names": [...]} and
{"call": name, "args": [...], "kwargs": {...}}. This file needs torch, numpy
and IPython only, not the course, and is the only one that the sandbox sees of
tools/.
"""

import builtins
import json
import os
import resource
import struct
import sys
import traceback

import numpy as np
import torch

MAX_BYTES = 256 << 20
MAX_TEXT = 20_000
DEPTH = 30
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.bool, torch.complex64, torch.complex128),
    )
}
NUMPY = "float64 float32 float16 int64 int32 int16 int8 uint8 bool".split()
NUMPY += ["uint16", "uint32", "uint64", "complex64", "complex128"]
ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


class NotPlain(TypeError):
    """A value that is no plain data."""


# ----------------------------------------------------------- plain data


def pack(value):
    """Return plain data as bytes.

    Raises:
        NotPlain: for a value of any other type, subclasses included.
    """
    blobs = []
    header = json.dumps(_tree(value, blobs, 0)).encode()
    return header + b"\0" + b"".join(blobs)


def _tree(value, blobs, depth):
    kind = type(value)
    if depth > DEPTH:
        raise NotPlain(f"lists in lists more than {DEPTH} deep")
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple, set, frozenset, torch.Size):
        name = {torch.Size: "tuple", frozenset: "set"}.get(kind, kind.__name__)
        return {name: [_tree(v, blobs, depth + 1) for v in value]}
    if kind is dict:
        pairs = [
            [_tree(k, blobs, depth + 1), _tree(v, blobs, depth + 1)]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    if kind in (torch.Tensor, torch.nn.Parameter):
        data = value.detach().cpu()
        if data.layout != torch.strided or data.dtype not in DTYPES.values():
            raise NotPlain(f"a tensor of {data.layout}, {data.dtype}")
        if data.numel():  # an empty one cannot be viewed as bytes
            flat = data.contiguous().reshape(-1).view(torch.uint8)
            blobs.append(flat.numpy().tobytes())
        name = str(data.dtype).removeprefix("torch.")
        return {"tensor": [name, list(data.shape), bool(value.requires_grad)]}
    if kind is np.ndarray or isinstance(value, np.generic):
        data = np.asarray(value)
        if data.dtype.name not in NUMPY:
            raise NotPlain(f"a numpy array of {data.dtype}")
        blobs.append(np.ascontiguousarray(data).tobytes())
        name = "array" if kind is np.ndarray else "scalar"
        return {name: [data.dtype.name, list(data.shape)]}
    if kind is torch.dtype and value in DTYPES.values():
        return {"dtype": str(value).removeprefix("torch.")}
    raise NotPlain(f"a {kind.__module__}.{kind.__qualname__}")


def unpack(message):
    """Return the plain data in bytes that nobody vouches for.

    Raises:
        ValueError: if they are no such data.
    """
    try:
        header, _, blob = message.partition(b"\0")
        value, used = _value(json.loads(header), blob, 0, 0)
    except (KeyError, TypeError, IndexError, RecursionError, MemoryError) as e:
        raise ValueError(f"not plain data: {type(e).__name__}: {e}") from None
    if used != len(blob):
        raise ValueError("not plain data: bytes are left over")
    return value


def _value(tree, blob, at, depth):
    if depth > DEPTH + 1:
        raise ValueError("not plain data: too deep")
    if tree is None or type(tree) in (bool, int, float, str):
        return tree, at
    if type(tree) is not dict or len(tree) != 1:
        raise ValueError("not plain data: no kind")
    [(kind, content)] = tree.items()
    if kind in ("list", "tuple", "set"):
        values = []
        for part in content:
            value, at = _value(part, blob, at, depth + 1)
            values.append(value)
        return {"list": list, "tuple": tuple, "set": set}[kind](values), at
    if kind == "dict":
        found = {}
        for key, part in content:
            key, at = _value(key, blob, at, depth + 1)
            found[key], at = _value(part, blob, at, depth + 1)
        return found, at
    if kind == "dtype":
        return DTYPES[content], at
    name, shape, *flag = content
    if kind not in ("tensor", "array", "scalar"):
        raise ValueError(f"not plain data: {kind!r}")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("not plain data: a shape")
    if kind == "tensor":
        size, dtype = DTYPES[name].itemsize, np.uint8
    elif name in NUMPY:
        dtype = np.dtype(name)
        size = dtype.itemsize
    else:
        raise ValueError("not plain data: a type of numbers")
    count = size
    for n in shape:
        count *= n
    if at + count > len(blob):
        raise ValueError("not plain data: bytes are missing")
    data = np.frombuffer(blob, np.uint8, count, at).copy()
    if kind == "tensor":
        data = torch.from_numpy(data) if count else torch.empty(0)
        data = data.view(DTYPES[name]) if count else data.to(DTYPES[name])
        data = data.reshape(shape)
        if flag == [True] and (data.is_floating_point() or data.is_complex()):
            data.requires_grad_()
        return data, at + count
    data = data.view(dtype).reshape(shape)
    return (data if kind == "array" else data[()]), at + count


def send(stream, value):
    """Write a message."""
    message = pack(value)
    stream.write(struct.pack("<I", len(message)) + message)
    stream.flush()


# ------------------------------------------------- in the student's process


def limit(name, amount):
    """Set one limit of this process and its children, not above the old."""
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(which, (amount, amount))


def read(stream, count):
    """Read exactly so many bytes, or end with the grader."""
    data = stream.read(count)
    if len(data) < count:
        os._exit(0)
    return data


def shell_of_student():
    """Return an IPython shell that keeps no history and draws into cells."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    return InteractiveShell.instance(config=config)


def run(shell, source):
    """Run one cell; return {"printed": text, "error": None or [...]}."""
    from IPython.utils.capture import capture_output

    with capture_output() as caught:
        result = shell.run_cell(source, store_history=False)
    error = result.error_before_exec or result.error_in_exec
    said = caught.stdout + caught.stderr
    for out in caught.outputs:
        said += out.data.get("text/plain", "") + "\n"
    return {"printed": said[:MAX_TEXT], "error": told(error)}


def told(error):
    """Return [type, message] of an error, or None."""
    return error and [type(error).__name__, str(error)[:2000]]


def reply_to(shell, request):
    """Return the reply to one request."""
    if "run" in request:
        return run(shell, request["run"])
    if "names" in request:
        found = {}
        for name in request["names"]:
            if name in shell.user_ns:
                value = shell.user_ns[name]
                found[name] = _state(value)
        return {"names": found}
    return call(shell, request)


def _state(value):
    """Return how a name is to be shown to the grader."""
    if callable(value) and not isinstance(value, torch.Tensor):
        return {"callable": True}
    try:
        pack(value)
    except NotPlain as error:
        return {"not plain": str(error)}
    return {"value": value}


def call(shell, request):
    """Call a function of the student; return {"value": ...} or an error."""
    try:
        function = shell.user_ns[request["call"]]
        value = function(*request["args"], **request["kwargs"])
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": [*told(error), f"{last.name}, line {last.lineno}"]}
    try:
        pack(value)
    except NotPlain as error:
        return {"not plain": str(error)}
    return {"value": value}


def main():
    """Answer requests until the grader goes away."""
    user, megabytes, files, processes = (int(text) for text in sys.argv[1:])
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)  # and with it go all capabilities
    limit("RLIMIT_AS", megabytes << 20)
    limit("RLIMIT_FSIZE", files << 20)
    limit("RLIMIT_NPROC", processes)
    limit("RLIMIT_CORE", 0)
    torch.set_num_threads(1)
    shell = shell_of_student()
    # What a cell prints to the bare descriptors must not mix with replies.
    asked = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    send(replies, {"ready": True})
    while True:
        (length,) = struct.unpack("<I", read(asked, 4))
        request = unpack(read(asked, length))
        try:
            reply = reply_to(shell, request)
        except BaseException as error:
            reply = {"error": [*told(error), "the grader's side"]}
        send(replies, reply | {"n": request["n"]})


if __name__ == "__main__":
    main()
