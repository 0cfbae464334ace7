#!/bin/sh
# Installs the CUDA compiler from its Python wheels: nvcc, the static runtime and CCCL, nothing else.
#   tools/install_cuda_toolkit.sh [PREFIX]      PREFIX: /usr/local/cuda when not given
# Put PREFIX/bin on PATH afterwards. Needs python3 with pip; no driver, no GPU, no package manager.
set -eu

prefix=${1:-/usr/local/cuda}
version=13.0.*
python=${PYTHON:-python3}
site=$prefix/site

mkdir -p "$prefix" "$site"
"$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$site" \
  "nvidia-cuda-nvcc==$version" "nvidia-cuda-runtime==$version" "nvidia-cuda-cccl==$version" \
  "nvidia-nvvm==$version" "nvidia-cuda-crt==$version"

# The wheels unpack into one tree, nvidia/cu13, laid out like a toolkit except for lib64.
tree=$site/nvidia/cu13
test -x "$tree/bin/nvcc" || { echo "install_cuda_toolkit: no nvcc under $tree" >&2; exit 1; }
ln -sfn lib "$tree/lib64"
for part in bin include lib lib64 nvvm; do
  ln -sfn "$tree/$part" "$prefix/$part"
done
"$prefix/bin/nvcc" --version | tail -n 1
