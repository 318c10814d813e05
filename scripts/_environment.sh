# Sourced by the scripts beside it, from bash with `set -euo pipefail`. Changes to the repository root
# and puts an environment with tierstore (editable) and its extras `hf` and `dev` first on PATH: the
# virtual environment that is active, or else `.venv`, made on first use. Quick when nothing changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment="${VIRTUAL_ENV:-$PWD/.venv}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        # A version switcher's stub is found but does not run; some systems ship no ensurepip.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "tierstore needs Python 3.11 or newer with the venv module: install one so that 'python3 -m venv' works" >&2
    return 1
}

has_nvidia_gpu() {
    [[ -e /proc/driver/nvidia/version ]] || { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
}

prepare_environment() {
    local python stamp
    if [[ ! -x $environment/bin/python ]]; then
        python=$(find_python)
        echo "making $environment with $python" >&2
        "$python" -m venv "$environment"
    fi
    stamp="$environment/.tierstore-$(cat pyproject.toml "${BASH_SOURCE[0]}" <(echo "$PWD") | sha256sum | cut -c1-16)"
    if [[ ! -e $stamp ]]; then
        echo "installing tierstore and what it needs (minutes the first time)" >&2
        # Without a GPU a plain `torch` would bring several GB of CUDA libraries.
        if ! has_nvidia_gpu && ! "$environment/bin/python" -c 'import torch' 2>/dev/null; then
            "$environment/bin/python" -m pip install --quiet torch==2.13.0 >&2
        fi
        "$environment/bin/python" -m pip install --quiet --editable '.[hf,dev]' >&2
        touch "$stamp"
    fi
    export PATH="$environment/bin:$PATH"
}

prepare_environment
