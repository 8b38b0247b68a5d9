"""What XLA compiled: FLOPs, collectives and memory of one device, read from a `jax.stages.Compiled`.

XLA's own `cost_analysis` counts the body of a loop once. Here the optimized HLO is walked from its entry, and each
loop body counts times its trip count, nested ones too: the known trip count, else the largest integer constant of the
loop's condition (a loop from 0), else 1. Of a conditional's branches the largest counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One communication among devices.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its result on one device.
      times: how often it runs in one call: the product of the trip counts of the loops around it.
    """

    kind: str
    bytes: int
    times: int


class Memory(NamedTuple):
    """Bytes on one device. `aliased` are those of the outputs that reuse an argument (donated)."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int


def flops(compiled: jax.stages.Compiled) -> float:
    """FLOPs of all matmuls that one device runs in one call: 2 for each multiplication and its addition.

    Counted are dots, convolutions (into which TPUs turn dots), the matmuls and attention of GPU and CPU libraries, and
    what a Pallas kernel for TPUs declares as its cost. Everything elementwise, and other kernels of one's own, are not.
    """
    module = _Module(compiled.as_text())
    return float(module.fold(module.matmul_flops, sum, lambda value, times: value * times, max))


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Every communication of one call; the two halves of an asynchronous one count as one."""
    module = _Module(compiled.as_text())
    return module.fold(
        module.collectives,
        lambda parts: [c for part in parts for c in part],
        lambda found, times: [c._replace(times=c.times * times) for c in found],
        functools.partial(max, key=traffic),
    )


def traffic(found: Iterable[Collective]) -> int:
    """Bytes of all their results together."""
    return sum(c.bytes * c.times for c in found)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiled function allocates on one device, by XLA's buffer assignment."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


T = TypeVar("T")

_METADATA = re.compile(r'metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-$]+) (?:\(.*\) -> .*)?\{$")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-$]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-$]+))"
)
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str  # all that follows the operands

    @property
    def result(self) -> str:
        """The type of what it computes; the first half of an asynchronous pair also returns its operands."""
        parts = _split(self.type[1:-1])
        return parts[1] if self.opcode.endswith("-start") and len(parts) > 1 else self.type

    def dims(self, name: str) -> list[int]:
        """The attribute `name={0,1}`; the library calls' configs write it "name":["0","1"]."""
        found = re.search(name + r'"?[=:][\[{]([^}\]]*)', self.attributes)
        return [int(x) for x in re.findall(r"\d+", found[1])] if found else []


class _Module:
    """A module's computations: {name: instructions}."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                self.computations[head[2]] = lines = []
                self.entry = head[2] if head[1] else self.entry
            elif self.computations and (found := _NAME.match(line)):
                lines.append(_instruction(found[1], line[found.end() :]))
        self.types = {name: {i.name: i.type for i in instructions} for name, instructions in self.computations.items()}

    def fold(
        self,
        own: Callable[[str, _Instruction], T],
        join: Callable[[list[T]], T],
        repeat: Callable[[T, int], T],
        largest: Callable[[list[T]], T],
    ) -> T:
        """What the entry computation does: `own(computation, instruction)` and what each instruction calls."""

        @functools.cache
        def of(computation: str) -> T:
            return join([part for i in self.computations[computation] for part in parts(computation, i)])

        def parts(computation: str, i: _Instruction) -> Iterator[T]:
            yield own(computation, i)
            if i.opcode.endswith(("-done", "-update")):
                return  # the first half has it
            called = [(key, name) for key, name in _called(i.attributes) if name in self.computations]
            branches = [of(name) for key, name in called if key in _BRANCHES]
            if branches:
                yield largest(branches)
            for key, name in called:
                if key not in _BRANCHES:
                    yield repeat(of(name), self.trips(i) if key == "body" else 1)

        return of(self.entry)

    def trips(self, loop: _Instruction) -> int:
        """How often the body of a while loop runs."""
        known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
        if known:
            return int(known[1])
        condition = re.search(r"\bcondition=%?([\w.\-$]+)", loop.attributes)
        constants = [
            int(i.operands[0])
            for i in self.computations.get(condition[1] if condition else "", [])
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type) and i.operands[0].isdigit()
        ]
        return max(constants, default=1)

    def shape(self, computation: str, operand: str) -> list[int]:
        """Of an operand, by its name."""
        return _shape(self.types[computation].get(operand, ""))

    def matmul_flops(self, computation: str, i: _Instruction) -> float:
        opcode, target = i.opcode.removesuffix("-start"), ""
        if opcode == "custom-call":
            found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
            target = found[1] if found else ""
        elif opcode not in ("dot", "scaled-dot", "convolution"):
            return 0
        lhs, rhs = ([*(self.shape(computation, x) for x in i.operands[:2]), [], []])[:2]
        out = _shape(i.result)
        if opcode == "convolution":
            return 2 * _convolution(i, lhs, rhs, out)
        if opcode in ("dot", "scaled-dot"):
            return 2 * math.prod(out) * math.prod(lhs[k] for k in i.dims("lhs_contracting_dims"))
        if target.startswith("__cublas$"):
            return 2 * math.prod(out) * math.prod(lhs[k] for k in i.dims("lhs_contracting_dimensions"))
        if target == "__onednn$matmul":
            transposed = re.search(r"transpose_a\W+true", i.attributes)
            return 2 * math.prod(out) * lhs[-2 if transposed else -1]
        if target.startswith("__cudnn$fmha"):  # forward q k^T and p v; backward those of q, k, v and p, and q k^T again
            scores = re.search(r'intermediate_tensor_shape.*?dimensions\W+((?:"?\d+"?,?)+)', i.attributes)
            matmuls = 5 if "Backward" in target else 2
            return 2 * matmuls * lhs[-1] * math.prod(int(x) for x in re.findall(r"\d+", scores[1])) if scores else 0
        declared = re.search(r"cost_estimate\W+flops\W+(\d+)", i.attributes)
        return int(declared[1]) if declared else 0

    def collectives(self, computation: str, i: _Instruction) -> list[Collective]:
        kind = i.opcode.removesuffix("-done")
        return [Collective(kind, _bytes(i.type), 1)] if kind in KINDS else []


def _instruction(name: str, rest: str) -> _Instruction:
    rest = _COMMENT.sub("", _METADATA.sub("", rest))
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if not opcode:
        return _Instruction(name, rest[:end], "", [], "")
    after = opcode.end() - 1 + _closing(rest[opcode.end() - 1 :])
    operands = [x.split()[-1].lstrip("%") for x in _split(rest[opcode.end() : after - 1])]
    return _Instruction(name, rest[:end], opcode[1], operands, rest[after:])


def _closing(text: str) -> int:
    """Just after the parenthesis that closes the one at the start."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[\[\](){},]", text):
        if found[0] != ",":
            depth += 1 if found[0] in "[({" else -1
        elif depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [x.strip() for x in (*parts, text[start:]) if x.strip()]


def _called(attributes: str) -> list[tuple[str, str]]:
    """(attribute, computation) for each that an instruction calls."""
    found = [(key, several or one) for key, several, one in _CALLED.findall(attributes)]
    return [(key, name.strip().lstrip("%")) for key, names in found for name in names.split(",")]


def _shape(type_: str) -> list[int]:
    """Dimensions of an array, or of the first one in a tuple."""
    found = _SHAPE.search(type_)
    return [int(x.removeprefix("<=")) for x in found[2].split(",") if x] if found else []


def _bytes(type_: str) -> int:
    """Of all arrays in a type."""
    total = 0
    for kind, dims in _SHAPE.findall(type_):
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        total += -(-bits * math.prod(int(x.removeprefix("<=")) for x in dims.split(",") if x) // 8)
    return total


def _convolution(i: _Instruction, lhs: list[int], rhs: list[int], out: list[int]) -> int:
    """Multiplications of a convolution; those with padding and with a dilation's holes do not count."""
    images, kernel, outputs = re.split(r"_|->", re.search(r"dim_labels=([\w>\-]+)", i.attributes)[1])
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    count = (
        lhs[images.index("b")] // (int(groups[1]) if groups else 1) * rhs[kernel.index("i")] * rhs[kernel.index("o")]
    )
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", i.attributes) or [""])[0]))

    def of(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    for axis in range(len(images) - 2):
        stride, low = int(of("stride", axis, "1")), int(of("pad", axis, "0_0").split("_")[0])
        holes, dilation = int(of("lhs_dilate", axis, "1")), int(of("rhs_dilate", axis, "1"))
        at = np.arange(out[outputs.index(str(axis))])[:, None] * stride - low
        at = at + np.arange(rhs[kernel.index(str(axis))]) * dilation
        size = (lhs[images.index(str(axis))] - 1) * holes
        count *= int(((at >= 0) & (at <= size) & (at % holes == 0)).sum())
    return count
