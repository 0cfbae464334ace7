#!/bin/sh
# Builds the aarch64 wheel on a machine of another kind, and tests it there under qemu-user.
#   tools/cross_aarch64.sh wheel    a checked wheel in dist/
#   tools/cross_aarch64.sh test     the smoke tests on that wheel, with torch 2.10.0 for the CPU
# make wheel-aarch64 and make test-wheel-aarch64 call it with the Python of the virtual environment
# first on PATH. What it downloads stays in build/aarch64. Compilers and qemu come from Debian's
# packages, which it installs where it may; Python for aarch64 from the same release of Debian.
set -eu
cd "$(dirname "$0")/.."

work=$PWD/build/aarch64
triple=aarch64-linux-gnu
cuda=13.0 # of the static runtime; nvcc must be of the same series
oldest=torch==2.10.0 # the last aarch64 torch of PyPI that is built for the CPU
pip="python -m pip --disable-pip-version-check"
python=python$(python -c 'import sys; print("{}.{}".format(*sys.version_info))')
digits=$(echo "${python#python}" | tr -d .)
mkdir -p "$work" dist

say() { echo "cross_aarch64: $*" >&2; }
die() { say "$*"; exit 1; }

# need COMMAND PACKAGE: a command of the system, installed where it is missing and that is allowed.
need() {
  command -v "$1" >/dev/null && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -q && apt-get install -q -y --no-install-recommends "$2" || true
  fi >"$work/apt-$2.log" 2>&1
  command -v "$1" >/dev/null || die "$1 is needed: install the package $2"
}

# The interpreter of the target, its headers and its libraries, unpacked beside this system.
sysroot() {
  [ -x "$work/sysroot/usr/bin/$python" ] && return
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
  rm -rf "$work/apt" && mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
  : >"$work/apt/status"
  set -- -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 \
    -o "APT::Sandbox::User=$(id -un)" -o "Dir::State::Lists=$work/apt/lists" \
    -o "Dir::State::Status=$work/apt/status" -o "Dir::Cache=$work/apt/cache"
  apt-get "$@" update >"$work/apt.log" 2>&1 || return 1
  apt-get "$@" install -y --download-only --no-install-recommends "$python-minimal" \
    "lib$python-stdlib" "lib$python-dev" libstdc++6 >>"$work/apt.log" 2>&1 || return 1
  rm -rf "$work/sysroot.part"
  for package in "$work"/apt/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$work/sysroot.part" || return 1
  done
  rm -rf "$work/sysroot" "$work/apt" && mv "$work/sysroot.part" "$work/sysroot"
}

# The CUDA runtime of the target, from its wheel.
cudart() {
  [ -f "$work/cudart/libcudart_static.a" ] && return
  rm -rf "$work/cudart.part" && mkdir -p "$work/cudart.part"
  $pip download --quiet --no-deps --only-binary=:all: --platform manylinux2014_aarch64 \
    --dest "$work/cudart.part" "nvidia-cuda-runtime==$cuda.*" >"$work/cudart.log" 2>&1 || return 1
  python -m zipfile -e "$work"/cudart.part/*.whl "$work/cudart.part"
  rm -rf "$work/cudart" && mkdir "$work/cudart"
  find "$work/cudart.part" -name 'libcud*.a' -exec mv {} "$work/cudart/" \;
  rm -rf "$work/cudart.part"
  [ -f "$work/cudart/libcudart_static.a" ]
}

wheel() {
  need $triple-g++ g++-$triple
  torch=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch
  mkdir -p "$work/torch"
  ln -sfn "$torch/include" "$work/torch/include"
  python tools/make_stub.py "$work/torch/lib/libtorch_cpu.so" --compiler $triple-gcc

  set -- -C "build-dir=$work/build" -C "cmake.define.TORCH_DIR=$work/torch" \
    -C "cmake.define.CMAKE_TOOLCHAIN_FILE=$PWD/cmake/$triple.cmake"
  check=
  if sysroot; then
    set -- "$@" -C "cmake.define.Python_INCLUDE_DIR=$work/sysroot/usr/include/$python" \
      -C "cmake.define.PYTHON_MODULE_EXTENSION=.cpython-$digits-$triple.so" \
      -C "cmake.define.CMAKE_CXX_FLAGS=-idirafter $work/sysroot/usr/include"
  else
    say "NO _native IN THIS WHEEL: there are no arm64 packages of $python (see $work/apt.log)"
    set -- "$@" -C cmake.define.SAPWOOD_NATIVE=OFF
    check=--without-native
  fi
  nvcc=${CUDACXX:-$(command -v nvcc || true)}
  if [ "${SAPWOOD_CUDA:-1}" != 0 ] && [ -n "$nvcc" ] && cudart; then
    root=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    # With this host compiler nvcc looks for a toolkit of the target, which is not there.
    export CUDAFLAGS="-isystem $root/include -isystem $root/include/cccl -L$work/cudart"
    export SAPWOOD_CUDA=1 SAPWOOD_CUDA_ARCHS="${SAPWOOD_CUDA_ARCHS:-release}"
  else
    say "NO CUDA IN THIS WHEEL: it is for the CPU only (SAPWOOD_CUDA=0, no nvcc, or no runtime of $cuda)"
    export SAPWOOD_CUDA=0
  fi
  options="$SAPWOOD_CUDA ${SAPWOOD_CUDA_ARCHS:-} $*"
  [ "$(cat "$work/options" 2>/dev/null)" = "$options" ] || rm -rf "$work/build"
  echo "$options" >"$work/options"
  rm -rf "$work/raw"
  _PYTHON_HOST_PLATFORM=linux-aarch64 $pip wheel --quiet --no-deps --no-build-isolation \
    -w "$work/raw" "$@" .
  name=$(cd "$work/raw" && ls ./*.whl | cut -d- -f1-4)
  rm -f "dist/$name"-*_aarch64.whl
  python -m auditwheel repair -w dist "$work"/raw/*.whl --exclude libtorch_cpu.so
  python tools/check_wheel.py $check "dist/$name"-*_aarch64.whl
}

smoke() {
  need qemu-aarch64-static qemu-user-static
  sysroot || die "the tests need the arm64 packages of $python (see $work/apt.log)"
  set -- dist/sapwood-*-"cp$digits"-*_aarch64.whl
  [ -f "$1" ] || die "there is no aarch64 wheel for $python in dist: make wheel-aarch64"
  if [ ! -f "$work/site/complete" ]; then
    $pip install --quiet uv # pip would judge the conditions of dependencies by this machine
    rm -rf "$work/site"
    UV_SYSTEM_CERTS=true uv pip install --quiet --target "$work/site" --only-binary :all: \
      --python-platform aarch64-manylinux_2_28 --python-version "${python#python}" \
      "$oldest" numpy safetensors rich typer pytest pytest-timeout
    touch "$work/site/complete"
  fi
  rm -rf "$work/installed" && python -m zipfile -e "$1" "$work/installed"
  PYTHONPATH=$work/installed:$work/site PYTHONPYCACHEPREFIX=$work/bytecode OMP_NUM_THREADS=1 \
    SAPWOOD_DISPATCH=builtin qemu-aarch64-static -L "$work/sysroot" \
    "$work/sysroot/usr/bin/$python" tools/check_installed.py -q --timeout=120 -k float32
}

case ${1:-} in
  wheel) wheel ;;
  test) smoke ;;
  *) die "say wheel or test" ;;
esac
