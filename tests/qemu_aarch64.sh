#!/usr/bin/env bash
# Builds csrc/cpu for ARM and runs tests there, under QEMU, which takes twenty times as long as a processor would:
#   tests/qemu_aarch64.sh FOLDER tests/ops/test_rms_norm.py [more of pytest's arguments]
# As root, after `make build`, on Debian with g++-aarch64-linux-gnu, qemu-user-static and debootstrap. FOLDER takes 2 GB,
# and keeps ARM's Debian and torch for the next time. There is no Triton in it, and no compiler, which torch.compile needs.
set -euo pipefail
folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
root=$folder/root site=$folder/root/opt/site here=$folder/root/opt/memkernels

if [ ! -e "$site" ]; then
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm "$root"
  # The F of the flags has the kernel open QEMU now: it is not within the folder that becomes the root.
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || printf '%s' \
    ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:' \
    '\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' \
    > /proc/sys/fs/binfmt_misc/register
  chroot "$root" /debootstrap/debootstrap --second-stage
  for_arm=(--target "$site.new" --python-version 311 --only-binary=:all:
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64)
  .venv/bin/pip install --no-deps "${for_arm[@]}" torch==2.10.0 # the last on PyPI for a CPU alone
  .venv/bin/pip install "${for_arm[@]}" typing_extensions sympy networkx jinja2 fsspec filelock numpy safetensors tqdm pytest \
    pytest-benchmark hypothesis
  mv "$site.new" "$site"
fi

flags=$(.venv/bin/python -c 'import runpy; s = runpy.run_path("setup.py", run_name="flags")
print(*s["COMMON_FLAGS"], *s["CXX_FLAGS"], *s["ISA_FLAGS"]["baseline"])')
mkdir -p "$folder/objects" "$here"
printf '%s\n' csrc/library.cpp csrc/cpu/*.cpp | xargs -P "$(nproc)" -I{} sh -c \
  'aarch64-linux-gnu-g++ "$@" -c {} -o "$0/$(basename {} .cpp).o"' "$folder/objects" \
  $flags -Icsrc -isystem "$site/torch/include"
git ls-files -z | tar cf - --null -T - | tar xf - -C "$here"
aarch64-linux-gnu-g++ -shared -o "$here/memkernels/_C_cpu.so" "$folder"/objects/*.o \
  -L"$site/torch/lib" -ltorch_cpu -Wl,--unresolved-symbols=ignore-in-shared-libs
mountpoint -q "$root/proc" || mount --bind /proc "$root/proc"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
chroot "$root" env -C /opt/memkernels HOME=/tmp PYTHONPATH=/opt/site:/opt/memkernels PYTHONDONTWRITEBYTECODE=1 \
  python3 -m pytest -q -p no:cacheprovider "$@"
