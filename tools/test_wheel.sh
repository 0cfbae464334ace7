#!/bin/sh
# Installs the wheel of this machine's Python into a fresh environment and tests it there.
#   tools/test_wheel.sh 2.13.0      the version of torch; make test-wheel calls it
# Which build of torch that is, for the CPU or for CUDA, is decided by pip's own configuration.
set -eu
cd "$(dirname "$0")/.."

version=$1
python=${PYTHON:-python3}
tag=$("$python" -c 'import sys; print("cp{}{}".format(*sys.version_info))')
set -- dist/sapwood-*-"$tag-$tag"-*_"$(uname -m)".whl
[ -f "$1" ] || { echo "test_wheel: there is no wheel for $tag in dist: make wheel" >&2; exit 1; }
for wheel; do :; done # the last one: of the latest version

env=build/wheel-env/torch-$version
rm -rf "$env"
"$python" -m venv "$env"
"$env/bin/python" -m pip --disable-pip-version-check install --quiet "torch==$version" \
  pytest pytest-timeout
"$env/bin/python" -m pip --disable-pip-version-check install --quiet "$wheel"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" SAPWOOD_DISPATCH=builtin
"$env/bin/python" tools/smoke_checks.py --installed-in "$env"
"$env/bin/python" tools/check_installed.py -q
"$env/bin/python" -m sapwood
