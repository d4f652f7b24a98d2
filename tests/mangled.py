"""Hostile versions of good files, for fuzzing: damaged bytes, strange JSON, false headers."""

import contextlib
import json
import resource
import struct
from pathlib import Path

from hypothesis import strategies as st

# What a hostile file may say in place of a number, a name, a list or a table.
LEAVES = st.one_of(
    st.sampled_from([
        None, True, False, -1, 0, 1, 3, 255, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 10**400,
        0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), "", "x", "0", "q", "../x", "\0",
        "\ud800", "9" * 40, [], [0], ["x", "x", "x"], [[]], [-1, 2**40], {}, {"x": 1}, {"0": "x"},
    ]),
    st.integers(-(2**70), 2**70),
    st.text(max_size=6),
    st.lists(st.integers(-3, 2**33), max_size=4),
)  # fmt: skip


def _places(value, path=()):
    """Paths of everything within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list | tuple) else items
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _changed(value, path, change):
    """A copy in which `change(container, key)` was applied at a path that is not empty."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = _changed(copy[key], rest, change)
    else:
        change(copy, key)
    return copy


@st.composite
def altered(draw, value, leaves=LEAVES, most=3):
    """A nested value with up to `most` places replaced, removed, renamed or added."""
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        path = draw(st.sampled_from(places))
        if not path:
            if draw(st.integers(0, 9)) == 0:  # all of it, seldom
                return draw(leaves)
            continue
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        new, name = draw(leaves), draw(st.one_of(st.text(max_size=5), st.just("blocks.9")))

        def change(container, key, kind=kind, new=new, name=name):
            if kind == "replace":
                container[key] = new
            elif kind == "remove":
                del container[key]
            elif isinstance(container, dict):
                container[name] = container.pop(key)
            else:
                container.append(new)

        value = _changed(value, path, change)
    return value


@st.composite
def damaged(draw, content: bytes, most=4):
    """Bytes cut short, overwritten, doubled, moved or lengthened."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        # headers decide more than what follows them
        top = draw(st.sampled_from([16, 64, 512, len(content)]))
        at = draw(st.integers(0, min(top, len(content))))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        kind = draw(
            st.sampled_from(["cut", "write", "write", "ones", "insert", "delete", "double"])
        )
        if kind == "cut":
            del content[at:]
        elif kind == "write":
            content[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "ones":
            content[at : at + size] = b"\xff" * size
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=size))
        elif kind == "delete":
            del content[at : at + size]
        else:
            content[at:at] = content[at : at + size]
    return bytes(content)


def split_safetensors(content: bytes):
    """(header, data) of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_safetensors(header, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + data


def hostile_safetensors(content: bytes):
    """Versions of a safetensors file: another header over the same data, or damaged bytes."""
    header, data = split_safetensors(content)
    return st.one_of(
        altered(header).map(lambda changed: join_safetensors(changed, data)), damaged(content)
    )


def hostile_metadata(content: bytes, key: str):
    """Versions of a safetensors file whose metadata holds other JSON under `key`."""
    header, data = split_safetensors(content)
    told = json.loads(header["__metadata__"][key])

    def put(text):
        return join_safetensors({**header, "__metadata__": {key: text}}, data)

    return st.one_of(altered(told).map(lambda x: put(json.dumps(x))), st.text(max_size=20).map(put))


@contextlib.contextmanager
def bounded_memory(more_bytes=2**30):
    """Allocations fail beyond what the process has and this much more, so that tests see them."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(load, *, names, errors=(ValueError, FileNotFoundError)):
    """What `load()` returns, or None where it refuses with an error that names the file.

    Only the documented classes themselves count: a subclass, such as json's or the codec's own, is
    a library's error that went through without a word on the file.
    """
    try:
        with bounded_memory():
            return load()
    except errors as error:
        refusal = error
    assert type(refusal) in errors, f"{type(refusal).__name__}: {refusal}"
    assert any(name in str(refusal) for name in names), f"names no file: {refusal}"
    return None
