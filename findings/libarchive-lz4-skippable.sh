#!/usr/bin/env bash
# libarchive 3.6.2 takes an LZ4 stream that begins with a skippable frame for zstd, and fails.
#
# Expected: libarchive tells by the first bytes how a file is compressed, and both formats are documented as recognised
# by themselves. `lz4 -d` reads the same file.
#
# Seen: the magic numbers of skippable frames, 0x184D2A50 to 5F, are the same in LZ4 and zstd by design; such a frame
# says nothing about what follows. libarchive gives it to its zstd filter, which then finds LZ4: "Zstd decompression
# failed: Unknown frame descriptor". Its LZ4 filter only recognises the magic number of a data frame.
#
# Consequence: detection by magic numbers must pass over skippable frames before it decides, in both formats. A writer
# of LZ4 should place metadata in a skippable frame at the end, not at the start.
set -euo pipefail

version=3.6.2-1+deb12u5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "libarchive-tools=$version" "libarchive13=$version"
for deb in ./*.deb; do dpkg -x "$deb" root; done
export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu
python3 -m venv venv
venv/bin/pip -q --disable-pip-version-check install lz4==4.4.5 zstandard==0.25.0

venv/bin/python - <<'PYTHON'
import struct
import lz4.frame, zstandard

skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
text = b"contents\n"
for name, start, frame, end in (
    ("leading.lz4", skippable, lz4.frame.compress(text), b""),
    ("trailing.lz4", b"", lz4.frame.compress(text), skippable),
    ("leading.zst", skippable, zstandard.ZstdCompressor().compress(text), b""),
):
    with open(name, "wb") as file:
        file.write(start + frame + end)
stream = lz4.frame.open("leading.lz4")
assert stream.read() == text
PYTHON

seen=$(for file in trailing.lz4 leading.zst leading.lz4; do
    echo "$file: $(root/usr/bin/bsdcat "$file" 2>&1 | sed 's/^bsdcat: [^:]*: //')"
done)

echo "Package:  libarchive13 and libarchive-tools $version (Debian)"
echo "Expected: 'contents' three times"
echo "Seen:     an error of the zstd filter about the LZ4 file"
echo "Output:"
echo "$seen"
echo "Source:   github.com/lz4/lz4/blob/v1.9.4/doc/lz4_Frame_format.md, 'Skippable Frames'; RFC 8878, section 3.1.2"
known='trailing.lz4: contents
leading.zst: contents
leading.lz4: Zstd decompression failed: Unknown frame descriptor'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
