#!/usr/bin/env bash
# debugfs 1.47.0 reads a small file that lies in its inode as 60 bytes, whatever its size.
#
# Expected: debugfs is the tool to take files out of an ext4 image without mounting it (`cat`, `dump`, `rdump`), and
# what it gives is what the kernel gives. With the feature `inline_data` a file of up to 60 bytes lies in the inode, in
# the field that holds the block map else, and `i_size` still tells its length.
#
# Seen: each of the three commands gives all 60 bytes of the field: the file, and zeros behind it. `stat` in the same
# debugfs shows the right size. Files that need blocks come out right, and so do inline files above 60 bytes.
#
# Consequence: a tree taken out of an image by `rdump` differs from the mounted one in exactly its smallest files:
# version files, one-line configuration. Cut each file to the size that `stat` shows, or mount the image.
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

mkdir tree out
printf 'six by' > tree/small
head -c 100 /dev/zero | tr '\0' 'i' > tree/hundred
head -c 5000 /dev/zero | tr '\0' 'b' > tree/blocks
tool mke2fs -q -t ext4 -b 4096 -O inline_data -d tree image 16M > log 2>&1
tool debugfs -R "rdump / out" image > log 2>&1
tool debugfs -R "cat /small" image > cat-small 2> log
shown=$(tool debugfs -R "stat /small" image 2> log | sed -n 's/.* \(Size: [0-9]*\)$/\1/p' | head -n 1)
seen=$(for file in small hundred blocks; do
    echo "rdump $file: $(stat -c %s "out/$file") bytes of $(stat -c %s "tree/$file")"
done
echo "cat small: $(stat -c %s cat-small) bytes, stat small: $shown"
cmp tree/hundred out/hundred && cmp tree/blocks out/blocks && echo "the other two are equal"
echo "behind the end: $(tail -c +7 out/small | tr -d '\0' | wc -c) bytes that are not zero")

echo "Package:  e2fsprogs and libext2fs2 $version (Debian)"
echo "Expected: 6 bytes of the file 'small'"
echo "Seen:     60 bytes"
echo "Output:"
echo "$seen"
echo "Source:   debugfs(8); docs.kernel.org/filesystems/ext4/dynamic.html, 'Inline Data'"
known='rdump small: 60 bytes of 6
rdump hundred: 100 bytes of 100
rdump blocks: 5000 bytes of 5000
cat small: 60 bytes, stat small: Size: 6
the other two are equal
behind the end: 0 bytes that are not zero'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
