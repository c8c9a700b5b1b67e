"""An interpreter for the PTX our kernels become: what NVRTC made of the source, run on a CPU.

A kernel is translated, basic block by basic block, into Python over one thread's registers. A
register holds bits as a Python int, or what the last float operation left there as a NumPy float32;
whoever reads it takes it as it needs it. Every load and store is checked against the allocations
it may touch and against its alignment. An instruction that is not known here is refused when the
text is read, and so is float arithmetic that is fused or flushed: whatever passes was rounded as
IEEE 754 says.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

F = np.float32
MASK = {"8": 0xFF, "16": 0xFFFF, "32": 0xFFFFFFFF, "64": 0xFFFFFFFFFFFFFFFF}
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
SPECIAL = {"%tid.x": "T.tid", "%ctaid.x": "T.x", "%ctaid.y": "T.y", "%ntid.x": "T.threads"}
ROUNDED = {"add.rn.f32": "{1}+{2}", "sub.rn.f32": "{1}-{2}", "mul.rn.f32": "{1}*{2}"}
ROUNDED |= {"sqrt.rn.f32": "np.sqrt({1})", "neg.f32": "-{1}", "abs.f32": "abs({1})"}
ROUNDED |= {"cvt.rmi.f32.f32": "np.floor({1})"}
INTEGER = {"add": "{1}+{2}", "sub": "{1}-{2}", "and": "{1}&{2}", "or": "{1}|{2}", "xor": "{1}^{2}"}
INTEGER |= {"mul.lo": "{1}*{2}", "mad.lo": "{1}*{2}+{3}", "not": "~{1}", "neg": "-{1}"}
INTEGER |= {"shl": "{1}<<min({2},64)"}


class PtxError(AssertionError):
    """Something a GPU would not do, or this interpreter does not know."""


def signed(value: int, bits: int) -> int:
    return value - ((value >> (bits - 1) & 1) << bits)


def as_float(value: int | F) -> F:
    if type(value) is F:
        return value
    return F(struct.unpack("<f", struct.pack("<I", value))[0])


def as_bits(value: int | F) -> int:
    return int(value.view(np.uint32)) if type(value) is F else value


class Thread:
    """One thread's place, parameters and memory."""

    def __init__(self, kernels: PtxKernels, parameters: dict[str, bytes]) -> None:
        self.kernels, self.parameters = kernels, parameters
        self.tid = self.x = self.y = self.threads = 0
        self.arguments: dict[str, int] = {}

    def parameter(self, name: str, offset: int, size: int) -> int:
        value = self.parameters[name][offset : offset + size]
        if len(value) != size:
            raise PtxError(f"parameter {name} has no {size} bytes at {offset}")
        return int.from_bytes(value, "little")

    def check(self, address: int, size: int) -> None:
        if address % size:
            raise PtxError(f"{size}-byte access at {address:#x} is misaligned")
        start, held = self.kernels.region(address) or (0, 0)
        if not start <= address <= address + size <= start + held:
            raise PtxError(f"{size}-byte access at {address:#x} is outside every allocation")

    def load(self, address: int, size: int, count: int) -> list[int]:
        self.check(address, size * count)
        raw = ctypes.string_at(address, size * count)
        return [int.from_bytes(raw[i * size :][:size], "little") for i in range(count)]

    def store(self, address: int, size: int, values: list[int]) -> None:
        self.check(address, size * len(values))
        raw = b"".join(value.to_bytes(size, "little") for value in values)
        ctypes.memmove(address, raw, len(raw))

    def call(self, function: str) -> None:
        if function != "cudaGraphSetConditional":
            raise PtxError(f"call of {function}")
        self.kernels.conditions[self.arguments["param0"]] = self.arguments["param1"]


class PtxKernel:
    """One entry of a PTX text, translated."""

    def __init__(self, text: str, name: str) -> None:
        head, _, rest = text[text.index(f".entry {name}(") :].partition("{")
        self.parameters = re.findall(rf"{name}_param_\d+", head)
        lines = self._statements(rest)
        blocks: dict[str, list[str]] = {"": []}
        order = [""]
        for line in lines:
            if line.endswith(":"):
                order.append(line[:-1])
                blocks[line[:-1]] = []
            else:
                blocks[order[-1]].append(line)
        self.instructions = sum(map(len, blocks.values()))
        self._next = dict(zip(order, [*order[1:], None], strict=True))
        source = "".join(self._block(i, label, blocks[label]) for i, label in enumerate(order))
        space: dict[str, Any] = {
            "np": np, "F": F, "signed": signed, "as_float": as_float, "as_bits": as_bits,
        }  # fmt: skip
        exec(compile(source, f"<{name}>", "exec"), space)
        self._blocks = {label: space[f"block{i}"] for i, label in enumerate(order)}

    def run(self, thread: Thread) -> None:
        registers: dict[str, Any] = {}
        label: str | None = ""
        while label is not None:
            label = self._blocks[label](registers, thread)

    @staticmethod
    def _statements(body: str) -> list[str]:
        """Statements and labels, without comments, declarations and call braces."""
        body = re.sub(r"//[^\n]*", "", body[: body.index("\n}")])
        body = re.sub(r"\n\s*[{}]\s*(?=\n)", "\n", body)
        body = re.sub(r"(\$\w+):", r"\1:;", body)
        statements = (re.sub(r"\s+", " ", one).strip() for one in body.split(";"))
        return [one for one in statements if one and not one.startswith(".")]

    # --- translation ---------------------------------------------------------------------------

    def _block(self, number: int, label: str, lines: list[str]) -> str:
        out = [f"def block{number}(R, T):"]
        for line in lines:
            guard = re.match(r"@(!?)(%p\d+) (.*)", line)
            indent = "    "
            if guard:
                out.append(f"    if {'not ' if guard[1] else ''}R['{guard[2]}']:")
                line, indent = guard[3], "        "
            out.extend(indent + code for code in self._instruction(line))
        out.append(f"    return {self._next[label]!r}")
        return "\n".join(out) + "\n"

    def _instruction(self, line: str) -> list[str]:
        operation, _, rest = line.partition(" ")
        operands = [o.strip() for o in re.split(r",(?![^{(]*[})])", rest)] if rest else []
        if operation in ("bra", "bra.uni"):
            return [f"return {operands[0]!r}"]
        if operation == "ret":
            return ["return None"]
        if operation == "call.uni":
            return [f"T.call({operands[0]!r})"]
        parts = operation.split(".")
        if parts[0] in ("ld", "st"):
            return self._memory(parts, operands)
        if operation == "mov.b64" and operands[0].startswith(
            "{"
        ):  # the halves of a 64-bit register
            halves = [half.strip() for half in operands[0].strip("{}").split(",")]
            return [
                f"R[{half!r}] = {self._bits(operands[1])} >> {32 * i} & {MASK['32']}"
                for i, half in enumerate(halves)
            ]
        target = f"R[{operands[0]!r}]"
        return [f"{target} = {self._value(operation, parts, operands)}"]

    def _memory(self, parts: list[str], operands: list[str]) -> list[str]:
        kind, bits = parts[-1][0], parts[-1][1:]
        count = int(parts[-2][1:]) if parts[-2] in ("v2", "v4") else 1
        reading = parts[0] == "ld"
        names, place = operands if reading else operands[::-1]
        values = [name.strip() for name in names.strip("{}").split(",")]
        base, _, offset = place.strip("[]").partition("+")
        if len(values) != count:
            raise PtxError(f"{parts} of {values}")
        if "param" in parts:
            if not reading:
                return [f"T.arguments[{base!r}] = {self._bits(values[0])}"]
            size, start = BYTES[bits], int(offset or 0)
            code = [
                f"R[{name!r}] = T.parameter({base!r}, {start + i * size}, {size})"
                for i, name in enumerate(values)
            ]
            return code
        address = f"{self._bits(base)} + {int(offset or 0)}"
        if reading:
            code = [f"loaded = T.load({address}, {BYTES[bits]}, {count})"]
            if kind == "s":  # a sign goes through the whole register
                width = 64 if values[0].startswith("%rd") else 32
                change = f"signed(loaded[{{}}], {bits}) & {MASK[str(width)]}"
            else:
                change = "loaded[{}]"
            code += [f"R[{v!r}] = {change.format(i)}" for i, v in enumerate(values)]
            return code
        stored = ", ".join(f"{self._bits(v)} & {MASK[bits]}" for v in values)
        return [f"T.store({address}, {BYTES[bits]}, [{stored}])"]

    def _value(self, operation: str, parts: list[str], operands: list[str]) -> str:
        """The right-hand side of everything that sets one register."""
        names = [self._operand(o) for o in operands]
        head, kind, bits = parts[0], parts[-1][0], parts[-1][1:]
        if operation in ROUNDED:
            return ROUNDED[operation].format(*(f"as_float({name})" for name in names))
        if head in ("mov", "cvta"):
            if not re.fullmatch(r"-?\d+", names[1]):
                return names[1]
            return f"{names[1]} != 0" if bits == "red" else f"{names[1]} & {MASK[bits]}"
        if head == "cvt":
            return self._convert(operation, parts, operands[1])
        if head == "setp":
            return self._compare(parts, operands)
        if head == "selp":
            return f"{names[1]} if {names[3]} else {names[2]}"
        if parts[-1] == "pred":
            words = {"and": "{1} and {2}", "or": "{1} or {2}", "xor": "{1} != {2}"}
            return (words | {"not": "not {1}"})[head].format(*names)
        if kind == "f":
            raise PtxError(f"{operation}: not a rounded operation this interpreter knows")
        names, mask = [self._bits(o) for o in operands], MASK[bits]
        if operation in ("mul.hi.u32", "mul.wide.u32"):
            shift = ">> 32" if parts[1] == "hi" else ""
            return f"({names[1]} & {MASK['32']}) * ({names[2]} & {MASK['32']}) {shift}"
        if operation == "mul.wide.s32":
            return f"(signed({names[1]}, 32) * signed({names[2]}, 32)) & {MASK['64']}"
        if operation in ("div.u32", "rem.u32"):
            return f"{names[1]} {'//' if head == 'div' else '%'} {names[2]}"
        if head == "shr":
            value = f"signed({names[1]}, {bits})" if kind == "s" else names[1]
            return f"({value} >> min({names[2]}, 64)) & {mask}"
        name = ".".join(parts[:-1])
        if name not in INTEGER:
            raise PtxError(f"unknown instruction {operation}")
        return f"({INTEGER[name].format(*names)}) & {mask}"

    def _convert(self, operation: str, parts: list[str], operand: str) -> str:
        target, source = parts[-2], parts[-1]
        value = self._bits(operand)
        if operation in ("cvt.rn.f32.s32", "cvt.rn.f32.u32"):
            return f"F(signed({value}, 32))" if source == "s32" else f"F({value})"
        if operation == "cvt.rni.s32.f32":
            return f"int(np.rint(as_float({self._operand(operand)}))) & {MASK['32']}"
        if "f" in target + source:
            raise PtxError(f"unknown conversion {operation}")
        bits = source[1:]
        inner = f"{value} & {MASK[bits]}"
        if source[0] == "s":
            inner = f"signed({inner}, {bits})"
        return f"({inner}) & {MASK[target[1:]]}"

    def _compare(self, parts: list[str], operands: list[str]) -> str:
        how, kind, bits = parts[1], parts[-1][0], parts[-1][1:]
        if kind == "f":
            one, other = (f"as_float({self._operand(o)})" for o in operands[1:])
            if how in ("nan", "num"):
                return f"bool(np.isnan({one}) or np.isnan({other})) is {how == 'nan'}"
            if how.endswith("u") and how[:-1] in COMPARE:  # true of NaN
                opposite = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<", "eq": "!=", "ne": "=="}
                return f"not bool({one} {opposite[how[:-1]]} {other})"
            if how == "ne":
                return f"bool({one} < {other} or {one} > {other})"
            return f"bool({one} {COMPARE[how]} {other})"
        one, other = (f"{self._bits(o)} & {MASK[bits]}" for o in operands[1:])
        if kind == "s":
            one, other = f"signed({one}, {bits})", f"signed({other}, {bits})"
        return f"({one}) {COMPARE[how]} ({other})"

    def _operand(self, name: str) -> str:
        if name in SPECIAL:
            return SPECIAL[name]
        if name.startswith("%"):
            return f"R[{name!r}]"
        if name.startswith("0f"):
            return f"as_float(0x{name[2:]})"
        return name if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", name) else repr(name)

    def _bits(self, name: str) -> str:
        return f"as_bits({self._operand(name)})" if "%" in name else self._operand(name)


class PtxKernels:
    """Launches kernels through the interpreter; see ``HostKernels``.

    Args:
        texts: PTX of both modules.
        region: the allocation that holds an address.
    """

    def __init__(self, texts: list[str], region: Callable[[int], tuple[int, int] | None]) -> None:
        self.region = region
        self.conditions = [0] * 64
        names = [(t, n) for t in texts for n in re.findall(r"\.entry (\w+)\(", t)]
        self.kernels = {name: PtxKernel(text, name) for text, name in names}
        self.threads_run = 0

    def launch(self, name: str, grid: tuple[int, int], threads: int, parameters: list[bytes]):
        kernel = self.kernels[name]
        thread = Thread(self, dict(zip(kernel.parameters, parameters, strict=True)))
        thread.threads = threads
        with np.errstate(all="ignore"):
            for thread.y in range(grid[1]):
                for thread.x in range(grid[0]):
                    for thread.tid in range(threads):
                        kernel.run(thread)
                        self.threads_run += 1
