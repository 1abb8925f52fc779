#!/usr/bin/env bash
# nbdkit 1.32.5: its gzip filter serves the first member of a gzip file, and takes that for the whole disk.
#
# Expected: a gzip file is a series of members, and what it holds is their contents one behind the other (RFC 1952,
# section 2.2). bgzip, eStargz and plain `cat a.gz b.gz` make files of many members. gzip(1), Python and Go read them
# all, and so should a filter that is documented as one for gzip files. Its companion for xz does read files of several
# xz streams.
#
# Seen: the exported device ends where the first member ends. No error, no log line: a disk of 2 MiB in two members is a
# disk of 1 MiB.
#
# Consequence: a truncated disk image often still mounts, and fails later and elsewhere. Compare the size of the device
# with the size that the image should have.
set -euo pipefail

version=1.32.5-1 tools=1:7.2+dfsg-7+deb12u18+b3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "nbdkit=$version" "qemu-utils=$tools"
for deb in ./*.deb; do dpkg -x "$deb" root; done
modules=$work/root/usr/lib/x86_64-linux-gnu/nbdkit

head -c 1M /dev/urandom > first
head -c 1M /dev/urandom > second
cat first second > disk
gzip -n < disk > one-member.gz
{ gzip -n < first; gzip -n < second; } > two-members.gz
gzip -dc two-members.gz | cmp - disk

# Reads the whole device through NBD.
size_of() {
    root/usr/bin/nbdkit -U - "$modules/plugins/nbdkit-file-plugin.so" "file=$1" \
        --filter="$modules/filters/nbdkit-gzip-filter.so" \
        --run "'$work/root/usr/bin/qemu-img' convert -f raw -O raw \$uri '$work/copy'"
    stat -c %s copy
}
seen="one member: $(size_of one-member.gz) bytes
two members: $(size_of two-members.gz) bytes"

echo "Package:  nbdkit $version (Debian), read with qemu-img of qemu-utils $tools"
echo "Expected: 2097152 bytes from both files, as gzip -d has it"
echo "Seen:     half of the disk from the file with two members"
echo "Output:"
echo "$seen"
echo "Source:   RFC 1952, section 2.2; nbdkit-gzip-filter(1) states no such limit"
known='one member: 2097152 bytes
two members: 1048576 bytes'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
