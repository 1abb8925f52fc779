#!/usr/bin/env bash
# python-zstandard 0.25.0 takes the length of a leading skippable frame for the size of the contents.
#
# Expected: `ZstdDecompressor().decompress()` decodes one frame, as documented. A skippable frame holds no data and is
# passed over (RFC 8878, section 3.1.2), so of a stream that begins with one, the first data frame is decoded, as by
# libzstd's ZSTD_decompress, zstd(1) and the library's own `stream_reader`. `pzstd` writes such streams.
#
# Seen: the library asks libzstd for the content size of the first frame, and libzstd answers for a skippable one with
# the length of its payload. Then the decoder delivers nothing, and an error follows: "decompressed 0 bytes; expected
# 4". With an empty skippable frame even the sizes agree: the answer is b"", without an error. `get_frame_parameters`
# shows the same number, `frame_content_size` shows 0.
#
# Consequence: a reader of zstd layers or chunks that works with one-shot calls reports damage where there is none, or
# loses a blob silently. Look for the magic numbers 0x184D2A50 to 5F first, or use `stream_reader`.
set -euo pipefail

version=0.25.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q --disable-pip-version-check install "zstandard==$version"

seen=$(venv/bin/python - <<'PYTHON'
import io, struct
import zstandard

frame = zstandard.ZstdCompressor().compress(b"contents")
for payload in (b"four", b""):
    stream = struct.pack("<II", 0x184D2A50, len(payload)) + payload + frame
    assert zstandard.ZstdDecompressor().stream_reader(io.BytesIO(stream)).read() == b"contents"
    size = zstandard.get_frame_parameters(stream).content_size
    try:
        answer = zstandard.ZstdDecompressor().decompress(stream)
    except zstandard.ZstdError as error:
        answer = error
    print(f"skippable frame of {len(payload)}: content_size {size}, decompress: {answer}")
PYTHON
)

echo "Package:  zstandard $version (Python)"
echo "Expected: b'contents' both times"
echo "Seen:     an error and an empty answer"
echo "Output:"
echo "$seen"
echo "Source:   RFC 8878, section 3.1.2; python-zstandard.readthedocs.io, ZstdDecompressor.decompress"
known="skippable frame of 4: content_size 4, decompress: decompression error: decompressed 0 bytes; expected 4
skippable frame of 0: content_size 0, decompress: b''"
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
