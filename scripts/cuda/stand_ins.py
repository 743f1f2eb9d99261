#!/usr/bin/env python3
"""stand_ins.py CUDARC FOLDER: writes FOLDER/<library>.S for each CUDA library that cudarc (its source in CUDARC) links.

Each file defines every function that the bindings name. The first call of one asks `stand_in_resolve` (stand_ins.c) where the
real one is, keeps the answer in a slot and jumps there; later calls jump at once. A program linked so names no CUDA library
in its header, and starts where there is none.
"""
import pathlib
import re
import sys

LIBRARIES = {"cuda": "driver", "cublas": "cublas", "cublasLt": "cublaslt", "curand": "curand", "nvrtc": "nvrtc", "nccl": "nccl"}
# What a call may carry its arguments in (System V ABI, x86-64).
INTEGER_REGISTERS = ["rax", "rdi", "rsi", "rdx", "rcx", "r8", "r9", "r10"]
VECTOR_REGISTERS = 8


def stand_in(library: str, functions: list[str]) -> str:
    lines = ["\t.text"]
    for i, name in enumerate(functions):
        lines += [
            f"\t.globl {name}",
            f"\t.type {name}, @function",
            f"{name}:\tjmp *.Lslot+{8 * i}(%rip)",
            f".Lfirst{i}:\tpushq ${i}",
            "\tjmp .Lresolve",
        ]
    # On the stack: the caller's return address and the function's number, then 8 registers: a multiple of 16 bytes.
    lines += [".Lresolve:"]
    lines += [f"\tpushq %{r}" for r in INTEGER_REGISTERS]
    lines += [f"\tsubq ${16 * VECTOR_REGISTERS}, %rsp"]
    lines += [f"\tmovups %xmm{i}, {16 * i}(%rsp)" for i in range(VECTOR_REGISTERS)]
    number_at = 16 * VECTOR_REGISTERS + 8 * len(INTEGER_REGISTERS)
    lines += [f"\tmovq {number_at}(%rsp), %rdi", "\tleaq .Llibrary(%rip), %rsi", "\tcall stand_in_resolve", "\tmovq %rax, %r11"]
    lines += [f"\tmovups {16 * i}(%rsp), %xmm{i}" for i in range(VECTOR_REGISTERS)]
    lines += [f"\taddq ${16 * VECTOR_REGISTERS}, %rsp"]
    lines += [f"\tpopq %{r}" for r in reversed(INTEGER_REGISTERS)]
    lines += ["\taddq $8, %rsp", "\tjmp *%r11"]
    lines += ['\t.section .data.rel.local, "aw"', "\t.balign 8", ".Lslot:"]
    lines += [f"\t.quad .Lfirst{i}" for i in range(len(functions))]
    lines += ['\t.section .data.rel.ro.local, "aw"', "\t.balign 8", ".Llibrary:\t.quad .Lname, .Lslot, .Lsymbols", ".Lsymbols:"]
    lines += [f"\t.quad .Lsymbol{i}" for i in range(len(functions))]
    lines += ['\t.section .rodata.str1.1, "aMS", @progbits, 1', f'.Lname:\t.asciz "{library}"']
    lines += [f'.Lsymbol{i}:\t.asciz "{name}"' for i, name in enumerate(functions)]
    lines += ['\t.section .note.GNU-stack, "", @progbits', ""]
    return "\n".join(lines)


def main() -> None:
    bindings, folder = map(pathlib.Path, sys.argv[1:3])
    for library, module in LIBRARIES.items():
        text = (bindings / "src" / module / "sys" / "mod.rs").read_text()
        # `culib` is cudarc's own.
        functions = sorted(set(re.findall(r"\bfn ((?:cu|nvrtc|nccl)\w*)\s*\(", text)) - {"culib"})
        (folder / f"{library}.S").write_text(stand_in(library, functions))


main()
