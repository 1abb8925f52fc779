#!/usr/bin/env bash
# mke2fs 1.47.0 with -d keeps 32 bits of a time: no fractions of a second, and 2149 becomes 2013.
#
# Expected: `mke2fs -d` fills a new ext4 with a tree, so that the image shows the tree. It copies owners, modes, links,
# holes and extended attributes. Inodes of 256 bytes, the default, have nanoseconds and the years 1901 to 2446.
#
# Seen: the fields for both are left at zero. Fractions of a second are gone, and of later times only the lowest 32 bits
# of the seconds are there: a time in 2149 shows as one in 2013, and one in 2040 as one in 1903.
#
# Consequence: an image built this way differs from its tree, and from a layer's tar, in nearly every file, in any
# comparison of times. Programs that take a time for a version (build tools, caches of compiled code) see other ones.
# `debugfs -w` with `sif FILE mtime_extra` can put the rest in afterwards.
set -euo pipefail

version=1.47.0-2+b2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "e2fsprogs=$version" "libext2fs2=$version"
for deb in ./*.deb; do dpkg -x "$deb" root; done
export LD_LIBRARY_PATH=$work/root/lib/x86_64-linux-gnu:$work/root/usr/lib/x86_64-linux-gnu
tool() {
    local name=$1 path
    shift
    path=$(find root -path "*sbin/$name")
    "$path" "$@"
}

mkdir tree
for time in 1700000000.123456789 2210000000 5680000000.5; do
    : > "tree/$time"
    touch -d "@$time" "tree/$time"
    [ "$(stat -c %Y "tree/$time")" = "${time%.*}" ] || { echo "This temporary folder cannot hold $time." >&2; exit 2; }
done
tool mke2fs -q -t ext4 -b 4096 -I 256 -d tree image 16M > log 2>&1
seen=$(for time in 1700000000.123456789 2210000000 5680000000.5; do
    # The low 32 bits in seconds; then two bits of seconds and 30 of nanoseconds, all in hexadecimal.
    echo "$time: $(tool debugfs -R "stat /$time" image 2> log | sed -n 's/^ *mtime: \(0x[0-9a-f]*:[0-9a-f]*\) .*/\1/p')"
done)

echo "Package:  e2fsprogs and libext2fs2 $version (Debian)"
echo "Expected: the second half of each pair is 1d6f3454, 00000001 and 77359401"
echo "Seen:     it is zero: the times read as 1700000000, -2084967296 and 1385032704"
echo "Output:   (seconds, then fraction and the upper bits of the seconds)"
echo "$seen"
echo "Source:   docs.kernel.org/filesystems/ext4/dynamic.html, 'Inode Timestamps'; mke2fs(8), -d"
known='1700000000.123456789: 0x6553f100:00000000
2210000000: 0x83b9ec80:00000000
5680000000.5: 0x528dec00:00000000'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
