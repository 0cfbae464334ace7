"""Rules that no off-the-shelf linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).name
SHIPPED = [
    path
    for folder in ("python", "triton_kernels", "tools", "bench", "examples", "build_support")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
CXX = [
    p for s in (".h", ".inl", ".cuh", ".cpp", ".cu") for p in sorted((ROOT / "csrc").rglob(f"*{s}"))
]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
UNSAFE_CALLS = {"eval", "exec", "__import__", "builtins.eval", "builtins.exec", "os.system"}
UNSAFE_CALLS |= {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
UNSAFE_CALLS |= {"torch.jit.load", "torch.hub.load", "pandas.read_pickle", "numpy.load"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """Files of the project: what git tracks, or everything in an unpacked source archive."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.split("\0") if name]
    parts = ("csrc", "python", "tests", "docs", "bench", "tools", "cmake", "triton_kernels")
    return [path for part in parts for path in (ROOT / part).rglob("*.*") if path.is_file()]


def unsafe(source: str) -> Iterator[str]:
    """Calls and imports that run code from data, under whatever name a module is imported."""
    tree = ast.parse(source)
    imports = [a for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names = {a.asname: a.name for a in imports if a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in UNSAFE_MODULES:
                yield node.module
            yield from (a.name for a in node.names if f"{node.module}.{a.name}" in UNSAFE_CALLS)
        elif isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            name = ".".join([names.get(first, first), *rest])
            argument = node.args[0] if node.args else None
            if name == "importlib.import_module" and isinstance(argument, ast.Constant):
                if str(argument.value).split(".")[0] in UNSAFE_MODULES:
                    yield name
            elif name in UNSAFE_CALLS:
                yield name
            elif any(k.arg == "allow_pickle" for k in node.keywords):
                yield f"{name}(allow_pickle)"
            elif any(k.arg == "shell" for k in node.keywords):
                yield f"{name}(shell)"


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_no_code_from_data(path: Path) -> None:
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a')",
        "from torch.serialization import load",
        "torch.jit.load('a')",
        "import numpy as np\nnp.load('a')",
        "__import__('os')",
        "importlib.import_module('pickle')",
        "import marshal",
        "import shelve",
        "from torch import load",
        "torch.save(model, 'a')",
        "eval('1')",
        "exec('1')",
        "np.load('a', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert len(list(unsafe(source))) == 1


def test_model_eval_is_not_eval() -> None:
    assert list(unsafe("model.eval()")) == []


@pytest.mark.parametrize("path", CXX, ids=relative)
def test_only_the_stable_abi_is_included(path: Path) -> None:
    """ATen, c10 and torch's C++ front end change from release to release."""
    stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
    for name in INCLUDE.findall(path.read_text()):
        if name.startswith(("torch/", "ATen/", "c10/", "caffe2/")):
            assert name.startswith(stable), f"{relative(path)} includes {name}"


def closure(path: Path) -> Iterator[str]:
    """Everything a file includes, directly or through headers of this project."""
    for name in INCLUDE.findall(path.read_text()):
        yield name
        for folder in (path.parent, ROOT / "csrc"):
            if (folder / name).is_file():
                yield from closure(folder / name)
                break


#: Headers named cpu_*, cuda_* and *_arguments are glue between tensors and kernels.
KERNELS = [
    path
    for path in CXX
    if path.suffix in (".h", ".inl")
    and path.parent.name != "common"
    and not path.name.startswith(("cpu", "cuda"))
    and not path.stem.endswith("_arguments")
]


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernel_headers_know_no_torch(path: Path) -> None:
    """Kernels see pointers and sizes, so that any compiler and sanitizer can have them."""
    assert [name for name in closure(path) if name.startswith(("torch/", "ATen/", "c10/"))] == []


#: Variables of other programs that are read, never those of sapwood.
FOREIGN = {
    "CONDA_PREFIX",
    "LOCALAPPDATA",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
}
READS = re.compile(
    r"""(?: getenv\(\s* | environ\.get\(\s* | environ\[\s* | \$ENV\{ ) ["']? (\w+) """, re.VERBOSE
)


def variables_read() -> set[str]:
    """Names of environment variables that the build and the package read."""
    cmake = [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]
    package = [p for p in SHIPPED if p.relative_to(ROOT).parts[0] not in ("tools", "bench")]
    return {n for path in (*CXX, *cmake, *package) for n in READS.findall(path.read_text())}


def test_environment_variables_are_the_documented_ones() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    documented = set(re.findall(r"^\| `(SAPWOOD_\w+)`", page, re.MULTILINE))
    # `name` is the loop variable in build_support/backend.py over VIRTUAL_ENV and CONDA_PREFIX.
    read = variables_read() - {"name"}
    assert read - FOREIGN == documented


TEXT = {".py", ".pyi", ".md", ".toml", ".cmake", ".txt", ".yml", ".yaml", ".sh", ".h", ".cpp"}
TEXT |= {".inl", ".cu", ".cuh", ".json", ".csv", ".html", ".css", ".cff", ""}
MACHINE_PATH = re.compile(r"(?<![\w.$}{/-])/(?:home|root|Users|opt|mnt|work|workspace)/\w")


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    files = [p for p in tracked_files() if p.suffix in TEXT and p.name != HERE and p.is_file()]
    return [(relative(path), path.read_text(encoding="utf-8")) for path in files]


def test_no_machine_paths(texts: list[tuple[str, str]]) -> None:
    found = [
        f"{name}: {line}"
        for name, t in texts
        for line in t.splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_no_package_index(texts: list[tuple[str, str]]) -> None:
    """Where packages come from is the user's choice."""
    index = re.compile(r"pypi\.org|pythonhosted|download\.pytorch\.org|--(extra-)?index-url")
    assert [name for name, text in texts if index.search(text)] == []


def test_no_notes_to_self(texts: list[tuple[str, str]]) -> None:
    note = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert [name for name, text in texts if note.search(text)] == []


SOURCES = [*CXX, *SHIPPED, *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_one_file_one_idea(path: Path) -> None:
    """A file that outgrows 400 lines holds a second idea."""
    assert len(path.read_text().splitlines()) <= 400
