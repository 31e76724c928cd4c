#!/usr/bin/env bash
# The tests of tests/gpu and the benchmarks for GPUs, on a machine with one GPU and no network.
#
#   bash tests/gpu/run.sh [WHEELS] [OUT]
#
# The machine needs a Python with torch and numpy ($PYTHON, or python3). All else comes from WHEELS,
# a folder that `make gpu-wheels` fills; it is installed into a temporary folder. OUT gets cuda.json
# and log.txt, also of parts that fail. It takes less than 10 minutes. The exit code is 0 if all passed.
set -uo pipefail
root=$(realpath "$(dirname "$0")/../..")
wheels=$(realpath "${1:-$root/.cache/gpu-wheels}")
out=$(realpath -m "${2:-$root/.cache/gpu}")
cd "$root" || exit
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# By name, as the folder may have wheels of other versions of Python.
names=$(cd "$wheels" && ls -- *.whl | cut -d- -f1 | sort -u)
install() {
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --find-links "$wheels" --target "$site" "$@"
}
# If one does not fit this Python, the others may do: the machine may have that one.
# shellcheck disable=SC2086
install $names || for name in $names; do install --upgrade "$name"; done

export PYTHONPATH="$site:$PWD" PATH="$site/bin:$PATH"
export PYTHONSAFEPATH=1  # moe_groups is that of the wheel, not that of this folder
export MOE_GROUPS_TEST_EXTENSIONS=gpu_extensions  # what DeepSpeed compiles for this Python
rm -f .cache/gpu_extensions/*/lock  # of a run that was killed, on which others would wait
mkdir -p "$out"
"$python" -m benchmarks.cuda run "$out"
code=$?
"$python" -m benchmarks.cuda_tables "$out/cuda.json" >> "$out/log.txt" 2>&1
exit $code
