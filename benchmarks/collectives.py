"""Collectives of a compiled program: how many bytes each device sends when it runs once, read from the optimised HLO.

A collective in a loop counts as often as the loop goes round. Sizes become bytes sent as by the ring algorithm, in
which each device passes pieces on to its neighbour: in an all-reduce of S bytes, each of n devices sends 2 (n-1)/n S.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SENT = {
    "all-reduce": lambda size, devices: 2 * (devices - 1) * size / devices,
    "all-gather": lambda size, devices: (devices - 1) * size,
    "reduce-scatter": lambda size, devices: (devices - 1) * size / devices,
    "all-to-all": lambda size, devices: (devices - 1) * size / devices,
    "collective-permute": lambda size, devices: size,
}
"""Bytes that a device sends, from those of the operands (an all-gather's is one n-th of its result) and n devices."""

UNCOUNTED = ("ragged-all-to-all", "collective-broadcast", "send", "recv")


class Branch(NamedTuple):
    """A branch of a conditional.

    Attributes:
        conditional: the name scopes that it was traced in, 'jit(f)/.../cond'.
        index: of the branch; of `jax.lax.cond` 0 is the false one, 1 the true one.
    """

    conditional: str
    index: int


class Collective(NamedTuple):
    """All alike collectives of a program.

    Attributes:
        kind: one of `SENT`.
        devices: that take part in one of them, 2 or more.
        in_loop: whether they are in a loop.
        branches: that they are in, outermost first: they are executed by a device that takes all of these.
        count: executions in one run of the program.
        bytes_sent: by each device in all these executions; a permutation is charged to every device.
    """

    kind: str
    devices: int
    in_loop: bool
    branches: tuple[Branch, ...]
    count: int
    bytes_sent: float


def collectives(program: str) -> list[Collective]:
    """What a compiled program communicates; collectives of a single device are left out.

    Args:
        program: optimised HLO after partitioning, as from `compiled.as_text()`.

    Raises:
        ValueError: a collective is of a kind that isn't counted, or in a loop that goes round nobody knows how often.
    """
    computations, entry = _parse(program)
    header = program.partition("\n")[0]
    sizes = [re.search(rf"{what}=(\d+)", header) for what in ("replica_count", "num_partitions")]
    all_devices = math.prod(int(size[1]) for size in sizes if size)
    merged = {}
    for found in _executed(computations, entry, all_devices):
        count, bytes_sent = merged.get(found[:4], (0, 0.0))
        merged[found[:4]] = count + found.count, bytes_sent + found.bytes_sent
    return [Collective(*alike, *numbers) for alike, numbers in merged.items()]


class _Instruction(NamedTuple):
    """`name = shape opcode(arguments), attributes`; `operands` are the instructions among the arguments."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    root: str


def _executed(computations: dict[str, _Computation], name: str, all_devices: int) -> Iterator[Collective]:
    """The collectives of one execution of a computation."""
    computation = computations[name]
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in SENT:
            size = sum(_bytes(computation.instructions[operand].shape) for operand in instruction.operands)
            devices = _participants(instruction, all_devices)
            if devices > 1:
                yield Collective(kind, devices, False, (), 1, SENT[kind](size, devices))
        elif kind in UNCOUNTED:
            raise ValueError(f"instruction {instruction.name}: got {kind}; allowed: {', '.join(SENT)}")
        elif kind == "while":
            inside = list(_executed(computations, _called(instruction, "body"), all_devices))
            rounds = _rounds(instruction, computation, computations) if inside else 0
            for found in inside:
                count, bytes_sent = rounds * found.count, rounds * found.bytes_sent
                yield found._replace(in_loop=True, count=count, bytes_sent=bytes_sent)
        elif kind == "conditional":
            scopes = re.search(r'op_name="([^"]*)"', instruction.attributes)
            for index, called in enumerate(_branches(instruction)):
                branch = Branch(scopes[1] if scopes else "", index)
                for found in _executed(computations, called, all_devices):
                    yield found._replace(branches=(branch, *found.branches))
        elif kind in ("fusion", "call", "async"):
            yield from _executed(computations, _called(instruction, "calls|to_apply"), all_devices)


def _participants(instruction: _Instruction, all_devices: int) -> int:
    """How many devices communicate with each other."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes):
        moves = re.findall(r"(\d+),(\d+)", pairs[1])
        return len({device for source, target in moves if source != target for device in (source, target)})
    groups = re.search(r"replica_groups=(.*)", instruction.attributes)[1]
    if mesh := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
        # mesh['x'=2,'y'=4] {'x','y':(2)2}: along x, and along the second factor 2 of y.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    listed = re.match(r"\{\{([\d,]*)\}", groups)
    return len(listed[1].split(",")) if listed else all_devices


def _rounds(loop: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int:
    """How often a loop of a computation goes round."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    # The TPU compiler doesn't write it down, but leaves `for counter in range(start, limit)` as it was.
    condition, body = (computations[_called(loop, part)] for part in ("condition", "body"))
    if test := re.fullmatch(r"compare\(element (\d+), (\d+)\)LT", _expression(condition, condition.root)):
        counter, limit = int(test[1]), int(test[2])
        start = _expression(computation, _elements(computation, loop.operands[0])[counter])
        step = _expression(body, _elements(body, body.root)[counter])
        if start.isdigit() and step == f"add(element {counter}, 1)":
            return limit - int(start)
    raise ValueError(f"loop {loop.name}: there are collectives in it, and no telling how often it goes round")


def _expression(computation: _Computation, name: str) -> str:
    """What an instruction computes from constants and from the elements of its computation's argument."""
    _, _, opcode, arguments, attributes = instruction = computation.instructions[name]
    operands = instruction.operands
    if opcode == "constant":
        return arguments
    if opcode in ("copy", "bitcast"):
        return _expression(computation, operands[0])
    if opcode == "get-tuple-element" and computation.instructions[operands[0]].opcode == "parameter":
        return "element " + re.search(r"index=(\d+)", attributes)[1]
    if opcode in ("add", "compare"):
        direction = re.search(r"direction=(\w+)", attributes)
        of_operands = ", ".join(_expression(computation, operand) for operand in operands)
        return f"{opcode}({of_operands})" + (direction[1] if direction else "")
    return opcode


def _elements(computation: _Computation, name: str) -> list[str]:
    """Names of a tuple's elements."""
    return computation.instructions[name].operands


def _called(instruction: _Instruction, attribute: str) -> str:
    return re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", instruction.attributes)[1]


def _branches(conditional: _Instruction) -> list[str]:
    """Computations of a conditional's branches; of the form with two the false one comes first, as in the other one."""
    if listed := re.search(r"branch_computations=\{(.*?)\}", conditional.attributes):
        return re.findall(r"[\w.\-]+", listed[1])
    return [_called(conditional, f"{which}_computation") for which in ("false", "true")]


def _bytes(shape: str) -> int:
    """Of a shape as it is written, f32[3,4]{1,0} or a tuple of such."""
    bits = sum(
        int(width or 8) * math.prod(int(size) for size in re.findall(r"\d+", sizes))  # pred has 8 bits
        for width, sizes in re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([^\]]*)\]", shape)
    )
    return bits // 8


def _parse(program: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the one that the program starts with."""
    computations, entry = {}, None
    for line in program.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, instructions = opened[2], {}
            entry = name if opened[1] else entry
        elif assigned := re.match(r"  (ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, rest = _split(assigned[3], " ")
            opcode, rest = _split(rest.lstrip(), "(")
            arguments, attributes = _split(rest[1:], ")")
            instructions[assigned[2]] = _Instruction(assigned[2], shape, opcode, arguments, attributes)
            if assigned[1]:
                computations[name] = _Computation(instructions, root=assigned[2])
    return computations, entry


def _split(text: str, end: str) -> tuple[str, str]:
    """Text up to the first `end` that isn't in parentheses, and the rest from there on."""
    depth = 0
    for index, character in enumerate(text):
        if depth == 0 and character == end:
            return text[:index], text[index:]
        depth += {"(": 1, ")": -1}.get(character, 0)
    return text, ""
