from typing import TypedDict

class BuildReport(TypedDict):
    version: str
    compiler: str
    torch_headers: str
    cuda: str | None
    cuda_archs: str

def build_report() -> BuildReport: ...
def cpu_features() -> list[str]: ...
