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

from compress.errors import UserError

Processor = Literal["any", "vnni"]
"""What an export is made for: ``any`` processor, or those that add 8-bit products exactly."""
WIDEST = 64
"""The largest weight whose products by unsigned 8-bit integers never saturate: 2 * 255 * 64 is 32,640."""
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
"""Instructions that add 8-bit products in 32 bits, as Linux names them: those of x86, and Arm's dot products."""


@cache
def read_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the names of the processor's instructions as Linux has them; none on other systems."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0] if found else ())


def adds_exactly() -> bool:
    """Return whether sums of 8-bit products are exact here. Instructions that nothing names count as missing, but for
    those of Apple's processors, which all have dot products."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or bool(EXACT & read_instructions())


def require_exact_sums(subject: str, setting: str) -> None:
    """Raise UserError where the ``subject``, an export that the ``setting`` has for VNNI, would answer wrongly here."""
    if not adds_exactly():
        raise UserError(
            f"{subject} is for processors with VNNI (or Arm's dot products); this processor names none of "
            f"{', '.join(sorted(EXACT))}, without which sums of 8-bit products saturate. Set {setting}=any and export "
            "again, or run it where there is VNNI."
        )
