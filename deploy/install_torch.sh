#!/bin/sh
# Installs a CPU build of torch into a virtual environment: sh deploy/install_torch.sh .venv/bin/python
#
# From 2.11 a plain `pip install torch` brings several GB of CUDA on Linux, aarch64 included. So the
# CPU build is asked for by its local version from PyTorch's own index. Where that index cannot be
# reached, the plain version is taken only if it needs no CUDA packages: a closed network may serve
# the CPU build under that name.
set -eu

python=${1:?usage: install_torch.sh PYTHON}
version=${TORCH_VERSION:-2.13.0}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

if "$python" -c 'import torch' 2>/dev/null; then
    exit 0
fi

pip() {
    "$python" -m pip --disable-pip-version-check "$@"
}

# a 32-bit system may run on a 64-bit kernel
if [ "$("$python" -c 'import struct; print(struct.calcsize("P"))')" != 8 ]; then
    echo "error: $python is a 32-bit program and torch has no build for it; use the 64-bit Raspberry Pi OS" >&2
    exit 1
fi

case $(uname -s)-$(uname -m) in
Linux-x86_64 | Linux-aarch64 | Linux-arm64) ;;
Linux-*)
    echo "error: torch has no build for $(uname -m); use a 64-bit system (64-bit Raspberry Pi OS)" >&2
    exit 1
    ;;
*)
    pip install "torch==$version" # no CUDA build exists elsewhere
    exit 0
    ;;
esac

echo "installing torch $version (CPU) from $index" >&2
if pip --timeout 15 install --quiet --retries 0 "torch==$version+cpu" --extra-index-url "$index"; then
    exit 0
fi

echo "that did not work; asking the default index for a torch $version without CUDA" >&2
report=$(mktemp)
trap 'rm -f "$report"' EXIT
pip install --quiet --dry-run --report "$report" "torch==$version" >&2
if grep -Eq '"name": *"(nvidia|cuda|triton)' "$report"; then
    echo "error: the default index only has torch $version with CUDA, which is several GB;" \
        "make $index reachable, or install a CPU build of torch >= 2.6 with $python yourself" >&2
    exit 1
fi
pip install --quiet "torch==$version"
