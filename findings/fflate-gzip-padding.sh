#!/usr/bin/env bash
# fflate 0.8.3: `gunzipSync` allocates what the last four bytes of the file say, and gives no more than that.
#
# Expected: the size of a gzip member's contents, modulo 2^32, is in the last four bytes of *the member*. Behind it
# there may be more members (RFC 1952, section 2.2), or zero bytes: tape and disk tools pad a file to whole blocks,
# gzip(1) documents that it ignores them, and Node's own zlib, Python and pigz do too.
#
# Seen: the library reads the size from the end of *the file*, and takes it for the room that the contents need. With
# zero bytes at the end that is 0: an empty answer, no error. Behind a member of 4 bytes it is 4: the first 4 bytes of
# the first member. The maintainer's remedy is the streaming class `Gunzip`, which takes several members, and then
# complains about the zeros.
#
# Consequence: a layer or an index page in a browser-side viewer of registries comes out empty or short, without an
# error. Compare the length with what the descriptor or the archive says.
set -euo pipefail

version=0.8.3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund "fflate@$version" > log

cat > finding.cjs <<'JAVASCRIPT'
const zlib = require("node:zlib");
const fflate = require("fflate");
const member = zlib.gzipSync("a".repeat(1000));
const files = {
  "one member": member,
  "with 512 zero bytes behind it": Buffer.concat([member, Buffer.alloc(512)]),
  "with a member of 4 bytes behind it": Buffer.concat([member, zlib.gzipSync("bbbb")]),
};
for (const [name, file] of Object.entries(files))
  console.log(`${name}: zlib ${zlib.gunzipSync(file).length}, fflate ${fflate.gunzipSync(file).length}`);
JAVASCRIPT
seen=$(node finding.cjs)

echo "Package:  fflate $version (npm)"
echo "Expected: 1000, 1000 and 1004 bytes"
echo "Seen:     1000, 0 and 4"
echo "Output:"
echo "$seen"
echo "Source:   RFC 1952, section 2.2; gzip's manual, 'Using gzip on tapes'; github.com/101arrowz/fflate/issues/207 and"
echo "          pull/287"
known='one member: zlib 1000, fflate 1000
with 512 zero bytes behind it: zlib 1000, fflate 0
with a member of 4 bytes behind it: zlib 1004, fflate 4'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
