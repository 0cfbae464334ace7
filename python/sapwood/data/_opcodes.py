"""Reads a batch file of CIFAR-10's Python version without executing anything in it.

Such a file is a pickle: a program for a small stack machine that can call any function. Here the
standard library only splits it into its opcodes; this module follows them as inert data, knows the
few that a dictionary of lists, texts and one array needs, and refuses everything else. The
functions that rebuild an array are recognised by their names; they are never looked up.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_OPCODES = 1 << 20  # a batch of 10 000 images has some 50 000

#: What a file may name, in NumPy 1 and 2, and what is understood by it.
_NAMES = {
    "numpy ndarray": "array type",
    "numpy dtype": "dtype",
    "numpy.core.multiarray _reconstruct": "empty array",
    "numpy._core.multiarray _reconstruct": "empty array",
    "numpy.core.numeric _frombuffer": "array of buffer",
    "numpy._core.numeric _frombuffer": "array of buffer",
    "_codecs encode": "encode",
}


@dataclass(frozen=True)
class _Named:
    """A function or type that the file names."""

    meaning: str


@dataclass
class _Array:
    """An array; the file makes an empty one first and fills it later."""

    content: NDArray[np.uint8] | None = None


_BYTE = _Named("the dtype of bytes")
_MARK = _Named("mark")


def read_dictionary(content: bytes) -> dict[str, Any]:
    """The dictionary that a batch file holds; texts, integers, lists, tuples and byte arrays.

    Raises:
        ValueError: if the content is damaged, or is or does anything else.
    """
    machine = _Machine()
    end = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        if count == _MOST_OPCODES:
            raise ValueError(f"there must be at most {_MOST_OPCODES} opcodes, got more")
        if (opcode.name == "PROTO") != (count == 0):
            raise ValueError("the protocol must be 2 to 5 and stand at the beginning")
        action = _ACTIONS.get(opcode.name)
        if action is None:
            raise ValueError(f"opcode {opcode.name} has no place in a batch file")
        action(machine, argument)
        end = (position or 0) + 1  # the position of STOP, a single byte, in the end
    if end != len(content):
        raise ValueError(f"the file must end after {end} bytes, got {len(content)}")
    return machine.result()


class _Machine:
    """The stack that the opcodes work on, and the memory of values that occur again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def result(self) -> dict[str, Any]:
        if len(self.stack) != 1 or type(self.stack[0]) is not dict:
            raise ValueError("the file must hold one dictionary")
        found: dict[str, Any] = self.stack[0]
        return {
            key: value.content if isinstance(value, _Array) else value
            for key, value in found.items()
        }

    def start(self, protocol: int) -> None:
        if not 2 <= protocol <= 5:
            raise ValueError(f"the protocol must be 2 to 5, got {protocol}")

    def stop(self, _: None) -> None:
        """The dictionary is complete."""

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("an opcode needs a value, but the stack is empty")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"an opcode needs a {kind.__name__} on the stack")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is _MARK:
                values = self.stack[position + 1 :]
                del self.stack[position:]
                return values
        raise ValueError("an opcode needs a mark, but there is none")

    def remember(self, slot: int | None) -> None:
        value = self.pop()
        self.memory[len(self.memory) if slot is None else slot] = value
        self.push(value)

    def recall(self, slot: int) -> None:
        if slot not in self.memory:
            raise ValueError(f"slot {slot} of the memory is empty")
        self.push(self.memory[slot])

    def push_tuple(self, size: int) -> None:
        values = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def push_marked_tuple(self, _: None) -> None:
        self.push(tuple(self.since_mark()))

    def append(self, _: None) -> None:
        value = self.pop()
        self.top(list).append(value)

    def extend(self, _: None) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict)[_text(key)] = value

    def set_items(self, _: None) -> None:
        values = self.since_mark()
        if len(values) % 2:
            raise ValueError("a dictionary needs a value for every key")
        target = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_text(key)] = value

    def push_name(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(f"the file may name NumPy's arrays only, got {name[:80]!r}")
        self.push(_Named(_NAMES[name]))

    def push_stacked_name(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self.push_name(f"{_text(module)} {_text(name)}")

    def call(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Named or type(arguments) is not tuple:
            raise ValueError("a call needs a function and its arguments")
        self.push(_call(function.meaning, arguments))

    def build(self, _: None) -> None:
        """Fills an empty array; a dtype of single bytes needs nothing more."""
        state = self.pop()
        if self.stack and self.stack[-1] is _BYTE:
            return
        array = self.stack[-1] if self.stack else None
        if not isinstance(array, _Array) or array.content is not None:
            raise ValueError("what is filled must be an empty array")
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an empty array must be filled with five values")
        _, shape, dtype, is_fortran, payload = state
        array.content = _array(payload, dtype, shape, "F" if is_fortran is True else "C")


def _call(meaning: str, arguments: tuple[Any, ...]) -> Any:
    """What a function would have returned."""
    if meaning == "dtype" and arguments and _is_text(arguments[0], "u1"):
        return _BYTE
    if meaning == "empty array" and len(arguments) == 3 and arguments[0] == _Named("array type"):
        return _Array()
    if meaning == "array of buffer" and len(arguments) == 4:
        payload, dtype, shape, order = arguments
        return _Array(_array(payload, dtype, shape, _text(order)))
    if meaning == "encode" and len(arguments) == 2 and _is_text(arguments[1], "latin1"):
        return _text(arguments[0]).encode("latin-1")
    raise ValueError(f"a call ({meaning}) must have the arguments of an array of bytes")


def _array(payload: Any, dtype: Any, shape: Any, order: str) -> NDArray[np.uint8]:
    """A view of the payload."""
    if dtype is not _BYTE or not isinstance(payload, bytes | bytearray):
        raise ValueError("the array must hold unsigned bytes")
    is_shape = type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
    if not is_shape or len(shape) != 2 or shape[0] * shape[1] != len(payload):
        raise ValueError(f"the array must have two sizes whose product is {len(payload)}")
    flat = np.frombuffer(payload, dtype=np.uint8)
    if order not in ("C", "F"):
        raise ValueError("the array must be stored in C or in Fortran order")
    return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).T


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise ValueError(f"a text must stand where there is a {type(value).__name__}")
    return value


def _is_text(value: Any, expected: str) -> bool:
    return (
        isinstance(value, bytes | str) and len(value) == len(expected) and _text(value) == expected
    )


Action = Callable[[_Machine, Any], None]


def _push_new(make: Callable[[], Any]) -> Action:
    return lambda machine, _: machine.push(make())


def _push_tuple(size: int) -> Action:
    return lambda machine, _: machine.push_tuple(size)


def _push_python2_text(machine: _Machine, value: str) -> None:
    """The texts of Python 2 are bytes, which the standard library shows as Latin-1."""
    machine.push(value.encode("latin-1"))


def _nothing(machine: _Machine, _: Any) -> None:
    """Lengths of frames help who reads in pieces."""


_ACTIONS: dict[str, Action] = {
    "PROTO": _Machine.start,
    "FRAME": _nothing,
    "STOP": _Machine.stop,
    "NONE": _push_new(lambda: None),
    "NEWTRUE": _push_new(lambda: True),
    "NEWFALSE": _push_new(lambda: False),
    "MARK": _push_new(lambda: _MARK),
    "EMPTY_DICT": _push_new(dict),
    "EMPTY_LIST": _push_new(list),
    "EMPTY_TUPLE": _push_tuple(0),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "TUPLE": _Machine.push_marked_tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.push_name,
    "STACK_GLOBAL": _Machine.push_stacked_name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "SHORT_BINSTRING": _push_python2_text,
    "BINSTRING": _push_python2_text,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
}
