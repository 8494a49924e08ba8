#!/bin/sh
# Installs the torch of constraints.txt while the image is built: `install_torch.sh cpu` or `cuda`.
# Where it comes from is pip's affair; $TORCH_INDEX_URL names one more index to look at.
set -eu

torch=$(grep '^torch==' constraints.txt)
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    set -- "$1" --extra-index-url "$TORCH_INDEX_URL"
fi
build=$1
shift

case "$build" in
cpu)
    # Indexes call the build without CUDA +cpu. Without this pip may take one with CUDA, which runs on
    # a CPU as well but brings gigabytes along.
    if pip install "$@" -c constraints.txt "$torch+cpu"; then
        exit 0
    fi
    echo "install_torch.sh: pip finds no $torch+cpu; taking the build that it does find." >&2
    echo "On x86 that one has CUDA in it: give an index that has the CPU build as TORCH_INDEX_URL." >&2
    pip install "$@" -c constraints.txt "$torch"
    ;;
cuda)
    # An index of its own has builds such as +cu130; elsewhere the one without a mark has CUDA.
    if [ $# -gt 0 ]; then
        pip install --index-url "$TORCH_INDEX_URL" -c constraints.txt "$torch"
    else
        pip install "$(echo "$torch" | sed 's/==/===/')"
    fi
    ;;
*)
    echo "install_torch.sh: TORCH is $build, expected cpu or cuda" >&2
    exit 2
    ;;
esac
