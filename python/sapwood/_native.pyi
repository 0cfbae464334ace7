from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.int32] | NDArray[np.int64]
Flags = NDArray[np.bool_] | None

class BuildReport(TypedDict):
    version: str
    compiler: str
    torch_headers: str
    cuda: str | None
    cuda_archs: str

def build_report() -> BuildReport: ...
def cpu_features() -> list[str]: ...
def count_digits(
    bits: Bits,
    active: Flags,
    kept: Flags,
    absolute: bool,
    any_sign: bool,
    shift: int,
    prefix: int,
    counts: NDArray[np.int64],
) -> None: ...
def switch_off(
    bits: Bits,
    active: Flags,
    kept: Flags,
    absolute: bool,
    any_sign: bool,
    last: int,
    quota: int,
    keep: NDArray[np.bool_],
) -> int: ...
