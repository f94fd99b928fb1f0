#!/usr/bin/env bash
# Embeds one page with the aarch64 wheel, under qemu-user, and with this machine's cembed, and compares the vectors.
# Needs dist/ of `make wheels`, qemu-user and debootstrap, and downloads Debian's packages and wheels.
#
#     packaging/check_aarch64.sh [PYTHON]      # a Python with cembed in it; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$PWD/build/packages/arm64
root=$folder/root
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -n 1)
platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64)

# Debian's Python for arm64, unpacked and not set up: nothing of it needs to run.
if [ ! -e "$root/usr/bin/python3.11" ]; then
    rm -rf "$folder/stage" "$root"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libstdc++6 bookworm "$folder/stage" "$mirror"
    mkdir -p "$root"
    for package in "$folder"/stage/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi

# What the wheel needs, for that Python.
"$python" -m pip download --quiet --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
    "${platforms[@]}" --dest "$folder/wheels" "$(echo dist/cembed-*_aarch64.whl)"
rm -rf "$folder/site"
for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$folder/site"; done

# ONNX Runtime reads what processor it is on, and must not read of this machine's.
mkdir -p "$root/proc"
printf '%s\n' 'processor : 0' 'CPU implementer : 0x41' 'CPU architecture: 8' 'CPU part : 0xd0b' '' > "$root/proc/cpuinfo"

page=tests/golden/causalqwen2_5/page.png
emulated=("$(command -v qemu-aarch64-static || command -v qemu-aarch64)" -L "$root" -E "PYTHONPATH=$folder/site"
    "$root/usr/bin/python3.11" -B)
compare() { # BUNDLE LIMIT
    "$python" packaging/embed_page.py "$1" "$page" "$folder/here.npy"
    "${emulated[@]}" packaging/embed_page.py "$1" "$page" "$folder/there.npy"
    "$python" packaging/embed_page.py --compare "$folder/here.npy" "$folder/there.npy" "$2"
}

# In float32 both are the same. The sample bundle's activations are rounded to bytes, on x86 without VNNI to seven bits
# (docs/formats.md): there the two differ as that bundle differs from float32, and the cosine is what is looked at.
if [ ! -e "$folder/float" ]; then
    "$python" -m cembed export --backbone qwen2.5-vl --model samples/model --slot-positions continue --out "$folder/float"
fi
compare "$folder/float" 1e-5
compare samples/bundle 0.5
