#!/usr/bin/env bash
# The environment of the GPU machines that we measure on, without a GPU: torch 2.11, Triton 3.6 (see the pins below).
#
# Usage: tools/target_env.sh DIR [PYTEST ARGUMENTS ...]
#
# Makes a virtual environment in DIR unless it is there (6 GB), by python3.12 where there is one, else by python3;
# then runs `pytest PYTEST ARGUMENTS` in it: all tests where none are given. The exit code is pytest's; 2: no DIR.
set -euo pipefail
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
    echo "target_env: the folder of the environment was expected, got ${1:-nothing}; as in tools/target_env.sh DIR" >&2
    exit 2
fi
env=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
if [ ! -e "$env/complete" ]; then
    python=$(command -v python3.12 || command -v python3)
    "$python" -m venv "$env"
    # Triton 3.6's interpreter makes Python scalars of arrays of one value, which numpy 2.4 refuses.
    printf '%s\n' torch==2.11.0 torchvision==0.26.0 triton==3.6.0 'numpy<2.4' >"$env/constraints.txt"
    "$env/bin/python" -m pip install --quiet -c "$env/constraints.txt" -e ".[openmmlab,dev]" liger-kernel >&2
    touch "$env/complete"
fi
echo "$("$env/bin/python" -V), $("$env/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|torchvision|triton|numpy) ' |
    tr -s ' \n' ' ,')" >&2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this tree's normplug, whichever tree the environment was made from
export PATH=$env/bin:$PATH                        # tests start programs by their names
exec python -m pytest "$@"
