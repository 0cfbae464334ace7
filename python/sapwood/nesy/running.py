"""One run of a program's generators, whatever the reading."""

from __future__ import annotations

from collections.abc import Callable
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from sapwood.nesy.draws import ChoiceLeaf, ContinuousLeaf, Guard, Leaf, NondetLeaf
from sapwood.nesy.errors import TraceError

if TYPE_CHECKING:
    from sapwood.nesy.program import Program

#: What a program may yield, beside other programs.
Step = Leaf | ChoiceLeaf | NondetLeaf | ContinuousLeaf | Guard


def run(program: Program, answer: Callable[[Step], Any]) -> Any:
    """Runs a program; ``answer`` gives the value of each step. Returns what the program returns.

    Programs that it yields run in place. Errors of the user's code come through as they are.
    """
    started = program.start()
    if not isinstance(started, GeneratorType):
        return started
    try:
        item = next(started)
        while True:
            if isinstance(item, Step):
                value = answer(item)
            elif hasattr(item, "start"):
                value = run(item, answer)
            else:
                raise TraceError(
                    f"sapwood.nesy: yield must get a draw, a guard or a program{where(started)}, "
                    f"got {type(item).__name__}"
                )
            item = started.send(value)
    except StopIteration as stop:
        return stop.value
    finally:
        started.close()


def where(generator: GeneratorType[Any, Any, Any]) -> str:
    """The place in a user's file where a generator stands."""
    frame = generator.gi_frame
    if frame is None:
        return ""
    return f" ({frame.f_code.co_filename}:{frame.f_lineno})"
