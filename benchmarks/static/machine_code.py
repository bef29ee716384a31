"""What the hot loop of a compiled kernel costs: instructions by pipe, barriers, bytes.

NVIDIA's code is SASS from `nvdisasm`, which Triton's wheels bring (without it there is nothing to
count, and `hot_loop` returns None); AMD's is the assembly that Triton keeps. The hot loop is the
one that moves the most bytes. Its main path is the one with the fewest global loads and stores,
since the block inside a row is loaded whole and only that at a row's end once more under a mask;
of several such paths `least` is the shortest and `most` the longest (with a branch that is taken
now and then: a tie, a member of S). AMD's code may branch around either load of a block, and then
the main path has neither: its bytes are a lower bound.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from triton.backends import nvidia

PIPES = ("alu", "fma", "xu", "lsu", "other")
# What a multiprocessor issues and its pipes take in a clock, in threads' instructions (CUDA C++
# programming guide, throughput of native arithmetic instructions).
RATES = {"issue": 128, "alu": 64, "fma": 128, "xu": 16, "lsu": 32}
NVIDIA_PIPES = (
    ("lsu", r"LD|ST[GSL]|ATOM|RED|SHFL|VOTE|MATCH"),
    ("xu", r"MUFU|POPC|FLO|BREV|FRND|I2F(?!P)|F2I|F2F(?!P)"),
    ("fma", r"FADD|FMUL|FFMA|HADD|HMUL|HFMA|IMAD|IDP"),
    ("other", r"U[A-Z]|[RS]2U?R|BRA|BS|BAR|WARPSYNC|CALL|RET|EXIT|DEPBAR|NANOSLEEP"),
    ("alu", r""),
)
AMD_PIPES = (
    ("lsu", r"ds_|global_|buffer_|flat_|scratch_"),
    ("xu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)"),
    ("fma", r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|fmamk|fmaak)_\w*f(16|32|64)|v_mad"),
    ("alu", r"v_"),
    ("other", r""),
)
SKIPPED = re.compile(r"NOP|s_nop|s_waitcnt")


@dataclass(frozen=True)
class Instruction:
    """An instruction, or with `label` alone the place that branches name."""

    text: str
    label: str | None = None

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).partition(" ")[0]

    @property
    def target(self) -> str | None:
        found = re.search(r"\bBRA\b.*`\((\S+?)\)|^s_c?branch\w*\s+(\S+)", self.text)
        return found and (found[1] or found[2])

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow: not after a jump that is always taken."""
        if self.opcode.startswith(("EXIT", "BRA", "RET", "s_branch", "s_endpgm")):
            return self.text.startswith("@") or bool(re.search(r"\bBRA\S* !?U?P", self.text))
        return True

    @property
    def moved(self) -> int:
        """Bytes of global memory that it moves for a thread."""
        if re.match(r"LDG|STG|ATOMG|RED\b", self.opcode):
            width = re.findall(r"\.[US]?(256|128|64|16|8)(?=\.|$)", self.opcode)
            return int(width[-1]) // 8 if width else 4
        kind = r"(?:global|buffer|flat)_(?:load|store|atomic)_\w*?(byte|short|dword)(?:x(\d))?"
        found = re.match(kind, self.opcode)
        return {"byte": 1, "short": 2, "dword": 4}[found[1]] * int(found[2] or 1) if found else 0


@dataclass(frozen=True)
class Loop:
    """The main path of a loop, once around it, for one thread."""

    least: int
    most: int
    pipes: dict[str, int]  # of the shortest path
    barriers: int  # of the longest
    bytes: int

    def an_entry(self, entries: float) -> dict[str, float]:
        """What one of the entries of a row that a thread takes once around costs, and the clocks
        of the busiest pipe of a multiprocessor for it; `barriers` are those of a block."""
        counts = {"least": self.least, "most": self.most, **self.pipes, "bytes": self.bytes}
        found = {name: round(count / entries, 3) for name, count in counts.items()}
        busiest = max(
            found["least" if pipe == "issue" else pipe] / rate for pipe, rate in RATES.items()
        )
        return found | {"clocks": round(busiest, 4), "barriers": self.barriers}


@cache
def disassembler() -> Path | None:
    path = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    return path if path.exists() else None


def sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler()), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(code: str) -> list[Instruction]:
    """SASS as `nvdisasm -c` prints it, or AMD's assembly."""
    found = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            found.append(Instruction("", label[1]))
        elif one := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(Instruction(one[1]))
        elif one := re.match(r"\t([a-z]\w+[^;]*)", line):
            found.append(Instruction(one[1].strip()))
    return [one for one in found if one.label or not SKIPPED.match(one.opcode)]


class Flow:
    """Which instruction follows which; `order` has each after all that it leads to, but for jumps
    back."""

    def __init__(self, code: list[Instruction]) -> None:
        places = {one.label: at for at, one in enumerate(code) if one.label}
        self.code = code
        after = [[at + 1] if one.goes_on else [] for at, one in enumerate(code[:-1])] + [[]]
        self.next = [
            ways + ([places[one.target]] if one.target in places else [])
            for ways, one in zip(after, code, strict=True)
        ]
        self.order, seen = {}, {0}  # place -> when it was left, depth first
        stack = [(0, iter(self.next[0]))]
        while stack:
            at, ways = stack[-1]
            if (way := next((way for way in ways if way not in seen), None)) is None:
                self.order[at] = len(self.order)
                stack.pop()
            else:
                seen.add(way)
                stack.append((way, iter(self.next[way])))

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) of every jump back."""
        back = [(way, at) for at in self.order for way in self.next[at] if way != at]
        return [(way, at) for way, at in back if self.order[way] > self.order[at]]

    def path(self, first: int, last: int, longest: bool) -> list[Instruction]:
        """One way from `first` to `last`, labels left out."""
        sign, after = -1 if longest else 1, self.order[first]
        best = {}  # place -> moves, length, next place
        for at in [at for at, left in self.order.items() if self.order[last] <= left <= after]:
            ways = [w for w in self.next[at] if w in best and self.order[w] < self.order[at]]
            ends = [(*best[way][:2], way) for way in ways] if at != last else [(0, 0, -1)]
            if ends:
                moves, length, way = min(ends, key=lambda end: (end[0], sign * end[1]))
                one = self.code[at]
                best[at] = (moves + (one.moved > 0), length + (not one.label), way)
        path, at = [], first
        while at in best:
            path.append(self.code[at])
            at = best[at][2]
        return [one for one in path if not one.label]


def hot_loop(compiled: object, is_nvidia: bool) -> Loop | None:
    """The hot loop of a compiled kernel; None without one or where nothing can disassemble it."""
    if is_nvidia and disassembler() is None:
        return None
    flow = Flow(parse(sass(compiled.asm["cubin"]) if is_nvidia else compiled.asm["amdgcn"]))
    paths = [[flow.path(*ends, longest) for longest in (False, True)] for ends in flow.loops()]
    if not paths:
        return None
    least, most = max(paths, key=lambda path: (moved_by(path[0]), len(path[1])))
    kinds = NVIDIA_PIPES if is_nvidia else AMD_PIPES
    pipes = Counter(
        next(pipe for pipe, like in kinds if re.match(like, one.opcode)) for one in least
    )
    barriers = sum(bool(re.match(r"BAR\b|s_barrier", one.opcode)) for one in most)
    return Loop(len(least), len(most), {p: pipes[p] for p in PIPES}, barriers, moved_by(least))


def moved_by(path: list[Instruction]) -> int:
    return sum(one.moved for one in path)
