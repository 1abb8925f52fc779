#!/usr/bin/env bash
# qemu-img 7.2: in `qemu-img dd`, `count` is not how many blocks are copied, but where in the input the copy ends.
#
# Expected: `qemu-img dd` is described as a dd(1) for images. With dd, `skip=1 count=5` passes over one block and copies
# the next five. `qemu-img dd --help` says so too: "'count=N' copy only N input blocks", "'skip=N' skip N bs-sized
# blocks at the start of input".
#
# Seen: the skipped blocks are taken off the count. `skip=1 count=5` copies 4 blocks, `skip=3 count=5` copies 2, and
# `skip=5 count=5` an image of size 0; always with exit code 0. Without skip, the two agree.
#
# Consequence: this is the command to cut a partition, a superblock or a range of a qcow2 image out. The result is short
# at its end. Give `count` as skip plus length, or convert to raw and use dd.
set -euo pipefail

package=qemu-utils version=1:7.2+dfsg-7+deb12u18+b3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "$package=$version"
dpkg -x ./qemu-utils_*.deb root

head -c 1M /dev/urandom > disk
seen=$(for skip in 0 1 3 5; do
    rm -f cut
    root/usr/bin/qemu-img dd -f raw -O raw if=disk of=cut bs=4096 skip="$skip" count=5
    dd if=disk of=by-dd bs=4096 skip="$skip" count=5 status=none
    same=$(cmp -n "$(stat -c %s cut)" cut by-dd && echo "the same as far as it goes")
    echo "skip=$skip count=5: qemu-img $(($(stat -c %s cut) / 4096)) blocks, dd $(($(stat -c %s by-dd) / 4096)); $same"
done)

echo "Package:  $package $version (Debian)"
echo "Expected: 5 blocks each time"
echo "Seen:     5 - skip blocks"
echo "Output:"
echo "$seen"
echo "Source:   qemu-img(1), 'dd', and qemu-img --help; POSIX, dd: count is the number of input blocks that are copied"
known='skip=0 count=5: qemu-img 5 blocks, dd 5; the same as far as it goes
skip=1 count=5: qemu-img 4 blocks, dd 5; the same as far as it goes
skip=3 count=5: qemu-img 2 blocks, dd 5; the same as far as it goes
skip=5 count=5: qemu-img 0 blocks, dd 5; the same as far as it goes'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
