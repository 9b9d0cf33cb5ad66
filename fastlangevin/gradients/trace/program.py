"""A trace as two compiled functions: one for the constants of a chain, one for each step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastlangevin.gradients.trace.instructions import Instruction, Slot, Trace, mapped
from fastlangevin.gradients.trace.rewrite import rewrite
from fastlangevin.gradients.trace.split import Draft


class Program:
    """Energies and their gradient as a function of the states, for one trace.

    ``prepare`` maps the tensors of the slots ``inputs``, which do not depend on the states, to the
    constants of the steps, and ``step`` maps (states, *constants) to (energies or None, gradient).
    """

    def __init__(self, trace: Trace, energies: bool) -> None:
        results = (trace.energies, trace.grad) if energies else (trace.grad,)
        draft = Draft(trace, results)
        rewrite(draft)
        constants = draft.constants()
        made = {n for i in (*draft.once, *draft.added) for n in i.written}
        self.inputs = draft.inputs()
        self.instructions = len(draft.each)
        self.constant_bytes = sum(_bytes(draft, n) for n in constants if n in made)
        self.step_bytes = _most_bytes(draft)
        self.prepare = compiled(self.inputs, draft.added, constants, ())
        self.step = compiled([0, *constants], draft.each, draft.results, constants)


def _bytes(draft: Draft, number: int) -> int:
    value = draft.values[number]
    return math.prod(value.shape) * value.dtype.itemsize if value.storage == number else 0


def _most_bytes(draft: Draft) -> int:
    """Return the most bytes that the values of a step take at one time."""
    dying: dict[int, list[int]] = {}
    for number, k in draft.last_reads().items():
        dying.setdefault(k, []).append(number)
    made: set[int] = set()
    held = most = 0
    for k, instruction in enumerate(draft.each):
        new = set(instruction.written) - made
        held += sum(_bytes(draft, n) for n in new)
        made |= new
        most = max(most, held)
        held -= sum(_bytes(draft, n) for n in dying.get(k, ()) if n in made)
    return most


def compiled(
    parameters: Sequence[int],
    instructions: Sequence[Instruction],
    results: Iterable[int],
    kept: Iterable[int],
) -> Callable[..., Any]:
    """Return a function of the parameters' values that runs instructions and frees what it can."""
    results = list(results)
    last: dict[int, int] = {}
    for k, instruction in enumerate(instructions):
        last.update(dict.fromkeys((*instruction.written, *instruction.reads), k))
    held = {*results, *kept}
    objects: dict[str, Any] = {}

    def name(value: Any) -> Any:
        if isinstance(value, Slot):
            return _Name(f"v{value.number}")
        if value is None or type(value) in (int, bool):
            return value
        objects[f"c{len(objects)}"] = value
        return _Name(f"c{len(objects) - 1}")

    lines = [f"def run({', '.join(f'v{n}' for n in parameters)}):"]
    for k, instruction in enumerate(instructions):
        function = name(getattr(instruction.op, "_op", instruction.op))
        arguments = [repr(mapped(argument, name)) for argument in instruction.args]
        arguments += [f"{key}={mapped(v, name)!r}" for key, v in instruction.kwargs.items()]
        outputs = ["_" if n is None else f"v{n}" for n in instruction.outputs]
        target = outputs[0] if instruction.single else f"({', '.join(outputs)},)"
        lines.append(f"    {target} = {function}({', '.join(arguments)})")
        touched = {*instruction.written, *instruction.reads}
        dead = [n for n in touched if last[n] == k and n not in held]
        if dead:
            lines.append(f"    del {', '.join(f'v{n}' for n in sorted(dead))}")
    lines.append(f"    return ({''.join(f'v{n}, ' for n in results)})")
    exec(compile("\n".join(lines), "<program>", "exec"), objects)
    run: Callable[..., Any] = objects["run"]
    return run


class _Name(str):
    """A variable's name, whose representation is the name itself."""

    def __repr__(self) -> str:
        return str(self)
