"""Whether this processor adds products of 8-bit integers exactly.

ONNX Runtime and OpenVINO multiply unsigned activations by signed weights. An x86 processor without VNNI adds these
products in pairs of 16 bits, where a larger sum saturates: 255 * 127 + 255 * 127 is 64,770 and becomes 32,767. Weights
of 7 bits, within :data:`WIDEST`, cannot reach that.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

from compress.cache.digests import read_versions
from compress.errors import UserError

Processor = Literal["any", "vnni"]
"""What an export is made for: ``any`` processor, or those that add 8-bit products exactly."""
WIDEST = 64
"""The largest weight whose products by unsigned 8-bit integers never saturate: 2 * 255 * 64 is 32,640."""
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
"""Instructions that add 8-bit products in 32 bits, as Linux names them: those of x86, and Arm's dot products."""


CPUINFO = Path("/proc/cpuinfo")


@cache
def read_processor(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Return the fields of the first processor by their names in Linux; none on other systems."""
    first = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0] if cpuinfo.is_file() else ""
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def read_instructions(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return the names of the processor's instructions as Linux has them; none on other systems."""
    fields = read_processor(cpuinfo)
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def describe_machine() -> dict[str, str]:
    """Return what the times of a model on this machine depend on: its processor, PyTorch's threads, and the versions of
    the other runtimes."""
    import torch

    runtimes = read_versions(("onnxruntime", "openvino"))
    return {"processor": name_processor(), "threads": str(torch.get_num_threads()), **runtimes}


def name_processor() -> str:
    """Return the processor's name, and the widest instructions that PyTorch uses there: ``AMD EPYC (AVX2)``."""
    import torch

    name = read_processor().get("model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def adds_exactly() -> bool:
    """Return whether sums of 8-bit products are exact here. Unnamed instructions count as missing, except on Apple's
    processors, which all have dot products."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or bool(EXACT & read_instructions())


def require_exact_sums(subject: str, setting: str) -> None:
    """Raise UserError if the ``subject``, an export made for VNNI by the ``setting``, would answer wrongly here."""
    if not adds_exactly():
        raise UserError(
            f"{subject} is for processors with VNNI (or Arm's dot products); this processor names none of "
            f"{', '.join(sorted(EXACT))}, without which sums of 8-bit products saturate. Set {setting}=any and export "
            "again, or run it where there is VNNI."
        )
