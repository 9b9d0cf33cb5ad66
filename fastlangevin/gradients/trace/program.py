"""A trace as compiled functions: one for the constants of a chain, and others for its steps."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fastlangevin.gradients.trace.instructions import Instruction, Slot, Trace, mapped, renamed
from fastlangevin.gradients.trace.rewrite import rewrite
from fastlangevin.gradients.trace.split import Draft


class Program:
    """Energies and their gradient as a function of the states, for one trace.

    ``added`` computes the tensors of the slots ``constants``, which the steps read, from those of
    the slots ``inputs``, which do not depend on the states; see :func:`preparation`. ``step`` maps
    (states, *constants) to (gradient,) or (energies, gradient).
    """

    def __init__(self, trace: Trace, energies: bool) -> None:
        results = (trace.energies, trace.grad) if energies else (trace.grad,)
        draft = Draft(trace, results)
        rewrite(draft)
        self.added, self.inputs = draft.added, draft.inputs()
        self.constants = constants = draft.constants()
        made = {n for i in (*draft.once, *draft.added) for n in i.written}
        self.instructions = len(draft.each)
        self.constant_bytes = sum(_bytes(draft, n) for n in constants if n in made)
        self.step_bytes = _most_bytes(draft)
        self.step = compiled([0, *constants], draft.each, draft.results, constants)


def preparation(
    trace: Trace, programs: Sequence[Program], inputs: Sequence[int]
) -> Callable[..., list[list[Any]]]:
    """Return a function from the tensors of the slots ``inputs`` to the constants of each program.

    What several programs prepare in the same way, such as packed weights, is prepared once.
    """
    instructions: list[Instruction] = []
    outputs: dict[Any, tuple[int | None, ...]] = {}
    constants: list[list[int]] = []
    count = len(trace.values)  # greater than every slot of the trace
    for program in programs:
        names: dict[int, int] = {}  # from the program's slots to those of the function
        for instruction in program.added:
            shared = renamed(instruction, names)
            key = shared.op, repr((shared.args, shared.kwargs))
            if key not in outputs:
                outputs[key] = tuple(range(count, count + len(shared.outputs)))
                count += len(shared.outputs)
                instructions.append(replace(shared, outputs=outputs[key]))
            pairs = zip(instruction.outputs, outputs[key], strict=True)
            names.update((n, to) for n, to in pairs if n is not None and to is not None)
        constants.append([names.get(n, n) for n in program.constants])
    results = list(dict.fromkeys(n for slots in constants for n in slots))
    run = compiled(inputs, instructions, results, ())

    def prepare(*values: Any) -> list[list[Any]]:
        tensors = dict(zip(results, run(*values), strict=True))
        return [[tensors[n] for n in slots] for slots in constants]

    return prepare


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
