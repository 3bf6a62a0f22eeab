#!/usr/bin/env bash
# Fetch into DIR what normplug needs beyond a machine that has only PyTorch's world (torch, torchvision, Triton, numpy,
# scipy, OpenCV, matplotlib, scikit-learn, rich, pytest with timeout and xdist, hypothesis, timm) and no network.
#
# Usage: tools/gpu_wheels.sh DIR          PYTHON_VERSION is that of the machine (3.12), PYTHON that which fetches
#
# Then, over there: python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl; export PYTHONPATH=SITE
set -euo pipefail
if [ $# -ne 1 ] || [[ $1 == -* ]]; then
    echo "gpu_wheels: the folder for the wheels was expected, got ${*:-nothing}; as in tools/gpu_wheels.sh DIR" >&2
    exit 2
fi
toolkits=(mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 mmaction2==1.2.0)
theirs=(addict yapf platformdirs termcolor pycocotools shapely terminaltables decord importlib_metadata lazy-importer)
peers=(liger-kernel)
# pip takes a wheel for the platforms that it is told, and for no older ones of their kind.
platforms=(--platform any)
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
for old in 2014 2010 1; do
    platforms+=(--platform "manylinux${old}_x86_64")
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$1" "${toolkits[@]}" "${theirs[@]}" "${peers[@]}"
du -ch "$1"/*.whl
