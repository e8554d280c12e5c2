"""Seeded mutations of saved models: what a dying disk, an editor, a broken copy or a stranger may do to a folder.

``mutate(folder, other, seed)`` changes one of the two files of a model, and leaves the digest as it was. ``forge`` also
edits values, and then makes the digest fit, as somebody would who wants the model to load.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featdiff.files.model_folder import CONFIG, DIGEST, TENSORS, digest_of, facts_of

#: A folder that may be changed, another model's folder, and a source of chance -> what was done, in words.
Mutation = Callable[[Path, Path, random.Random], str]
#: What stands in for a value of a config.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    -1,
    0.5,
    -0.5,
    1e300,
    2**62,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "text",
    "../../etc/passwd",
    "\x1b[2J",
    "\ud800",
    [],
    [None],
    [1, 2, 3],
    ["layer1"],
    {},
    {"a": 1},
)


def reseal(folder: Path) -> None:
    """Make the digest of a model fit what its files hold now, as far as the config can be read."""
    config = json.loads((folder / CONFIG).read_text())
    config["tensors"] = facts_of((folder / TENSORS).read_bytes())
    config[DIGEST] = digest_of(config)
    (folder / CONFIG).write_text(json.dumps(config))


def mutate(folder: Path, other: Path, seed: int) -> str:
    """One mutation, chosen by the seed."""
    source = random.Random(seed)
    name = source.choice(list(MUTATIONS))
    return f"{name}: {MUTATIONS[name](folder, other, source)}"


def forge(folder: Path, other: Path, seed: int) -> str:
    """Another value in the config, or another tensor, under a digest that fits."""
    source = random.Random(seed)
    name = source.choice(list(FORGERIES))
    done = FORGERIES[name](folder, other, source)
    reseal(folder)
    return f"{name}: {done}"


# ---- bytes of either file ----


def flip_bit(folder: Path, other: Path, source: random.Random) -> str:
    file, data = _either(folder, source)
    place = source.randrange(len(data))
    data[place] ^= 1 << source.randrange(8)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def cut(folder: Path, other: Path, source: random.Random) -> str:
    file, data = _either(folder, source)
    end = source.choice([0, 1, 8, len(data) - 2, source.randrange(len(data) - 1)])  # the last byte is a line break
    file.write_bytes(data[:end])
    return f"{file.name} to {end} of {len(data)} bytes"


def append(folder: Path, other: Path, source: random.Random) -> str:
    file, data = _either(folder, source)
    more = source.choice([b"\0", b"{}", bytes(data[-100:])])
    file.write_bytes(data + more)
    return f"{more!r} to {file.name}"


def zero_block(folder: Path, other: Path, source: random.Random) -> str:
    file, data = _either(folder, source)
    start = source.randrange(len(data))
    length = min(source.choice([1, 16, 512, 4096]), len(data) - start)
    data[start : start + length] = bytes(length)
    file.write_bytes(data)
    return f"{file.name} {start} .. {start + length}"


def swap_blocks(folder: Path, other: Path, source: random.Random) -> str:
    file, data = _either(folder, source)
    length = min(64, len(data) // 4)
    first = source.randrange(len(data) // 2 - length)
    second = source.randrange(len(data) // 2, len(data) - length)
    one, two = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = two, one
    file.write_bytes(data)
    return f"{file.name} {first} and {second}"


def file_of_another_model(folder: Path, other: Path, source: random.Random) -> str:
    name = source.choice([CONFIG, TENSORS])
    shutil.copy(other / name, folder / name)
    return name


def one_file_in_place_of_the_other(folder: Path, other: Path, source: random.Random) -> str:
    target, origin = source.sample([CONFIG, TENSORS], 2)
    shutil.copy(folder / origin, folder / target)
    return f"{origin} as {target}"


# ---- values of the config ----


def edit_value(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    place, key = source.choice(_leaves(config))
    before = place[key]
    place[key] = source.choice([value for value in ODD_VALUES if value is not before])
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{key!r}: {before!r} -> {str(place[key])[:20]!r}"


def nudge_value(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    numbers = [(place, key) for place, key in _leaves(config) if type(place[key]) in (int, float)]
    place, key = source.choice(numbers)
    before = place[key]
    place[key] = before + source.choice([-1, 1]) if isinstance(before, int) else before * (1 + 2**-50) + 1e-300
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{key!r}: {before!r} -> {place[key]!r}"


def swap_values(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    (one, first), (two, second) = source.sample(_leaves(config), 2)
    one[first], two[second] = two[second], one[first]
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{first!r} and {second!r}"


def drop_key(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    place = source.choice(_tables(config))
    key = source.choice(list(place))
    del place[key]
    (folder / CONFIG).write_text(json.dumps(config))
    return repr(key)


def add_key(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    place = source.choice(_tables(config))
    key = source.choice(["surprise", "cache", "workers", "max_pixels", "device", "weights", "pretrained"])
    place[key] = source.choice(ODD_VALUES)
    (folder / CONFIG).write_text(json.dumps(config))
    return repr(key)


def reorder_keys(folder: Path, other: Path, source: random.Random) -> str:
    config = _config(folder)
    place = source.choice([table for table in _tables(config) if len(table) > 1])
    items = list(place.items())
    place.clear()
    place.update(reversed(items))
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{len(items)} keys from {items[0][0]!r} on"


def name_a_key_twice(folder: Path, other: Path, source: random.Random) -> str:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('{\n  "format"', '{\n  "seed": 1, "format": "featdiff",\n  "format"', 1))
    return "format"


def edit_text(folder: Path, other: Path, source: random.Random) -> str:
    text = (folder / CONFIG).read_text()
    place = source.choice([i for i, letter in enumerate(text) if not letter.isspace()])  # spaces do not count
    pieces = ["", "0", "1", "9", "-", ".", "e", '"', ",", "{", "[", "}", "\\", "NaN", "null", "é", "\t"]
    piece = source.choice([piece for piece in pieces if piece != text[place]])
    (folder / CONFIG).write_text(text[:place] + piece + text[place + 1 :])
    return f"{text[place]!r} -> {piece!r} at {place}"


def literal(folder: Path, other: Path, source: random.Random) -> str:
    """What Python's reader of JSON takes, and JSON does not."""
    config = _config(folder)
    place, key = source.choice(_leaves(config))
    text = source.choice(["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 100_000])
    place[key] = "here it goes"
    (folder / CONFIG).write_text(json.dumps(config).replace('"here it goes"', text))
    return f"{key!r}: {text[:12]}"


def encoding(folder: Path, other: Path, source: random.Random) -> str:
    text = (folder / CONFIG).read_text()
    name = source.choice(["utf-16", "utf-8-sig", "utf-32-le"])
    (folder / CONFIG).write_bytes(text.encode(name))
    return name


def spaces(folder: Path, other: Path, source: random.Random) -> str:
    """Not a change: spaces and line breaks between values do not count."""
    config = _config(folder)
    indent = source.choice([None, 0, 1, 4])
    (folder / CONFIG).write_text(json.dumps(config, indent=indent) + "\n" * source.randrange(3))
    return f"indent {indent}"


# ---- the file of tensors ----


def edit_header(folder: Path, other: Path, source: random.Random) -> str:
    header, data = _read_tensors(folder)
    name = source.choice(list(header))
    entry = header[name]
    what = source.choice(["name", "type", "shape", "offsets", "metadata", "gone"])
    if what == "name":
        header[f"{name}x"] = header.pop(name)
    elif what == "type":
        entry["dtype"] = source.choice(["F32", "F16", "BF16", "I32", "U8", "F8_E4M3", "C64", "F4", "X"])
    elif what == "shape":
        entry["shape"] = entry["shape"][::-1] + [1]
    elif what == "offsets":
        entry["data_offsets"] = [end + source.choice([-8, 4, 10**9]) for end in entry["data_offsets"]]
    elif what == "metadata":
        header["__metadata__"] = {"id": "0" * 16}
    else:
        del header[name]
    _write_tensors(folder, header, data)
    return f"{what} of {name}"


def swap_tensors(folder: Path, other: Path, source: random.Random) -> str:
    """The names of two tensors of one shape, as far as there are such."""
    header, data = _read_tensors(folder)
    one = source.choice(list(header))
    alike = [name for name in header if name != one and header[name]["shape"] == header[one]["shape"]]
    two = source.choice(alike or list(header))
    header[one], header[two] = header[two], header[one]
    _write_tensors(folder, header, data)
    return f"{one} and {two}"


def edit_number(folder: Path, other: Path, source: random.Random) -> str:
    """Four bytes of one tensor."""
    header, data = _read_tensors(folder)
    name = source.choice(list(header))
    start, end = header[name]["data_offsets"]
    place = start + 4 * source.randrange(max((end - start) // 4, 1))
    number = struct.pack("<f", source.choice([0.0, -1.0, 1e-20, 1e20, 3.4e38, float("nan"), float("-inf")]))
    _write_tensors(folder, header, data[:place] + number + data[place + 4 :])
    return f"{name} at {place}"


MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        flip_bit,
        cut,
        append,
        zero_block,
        swap_blocks,
        file_of_another_model,
        one_file_in_place_of_the_other,
        edit_value,
        nudge_value,
        swap_values,
        drop_key,
        add_key,
        reorder_keys,
        name_a_key_twice,
        edit_text,
        literal,
        encoding,
        spaces,
        edit_header,
        swap_tensors,
        edit_number,
    )
}
FORGERIES: dict[str, Mutation] = {
    function.__name__: function
    for function in (edit_value, nudge_value, swap_values, drop_key, add_key, edit_header, swap_tensors, edit_number)
}


def _either(folder: Path, source: random.Random) -> tuple[Path, bytearray]:
    file = folder / source.choice([CONFIG, TENSORS])
    return file, bytearray(file.read_bytes())


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def _tables(value: Any) -> list[dict[str, Any]]:
    """All tables in a config that hold anything."""
    if not isinstance(value, dict):
        return []
    inner = [table for part in value.values() for table in _tables(part)]
    return [value, *inner] if value else inner


def _leaves(value: Any) -> list[tuple[Any, Any]]:
    """All places in a config, each as the table or list that holds it and its key there; whole tables, too."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _leaves(value[key])]


def _read_tensors(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_tensors(folder: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)
