#!/usr/bin/env bash
# tar-stream 3.2.2 (npm) ignores the owner in pax records, so files of large user ids belong to root.
#
# Expected: the octal field of a tar header holds ids up to 2097151. A larger one goes into the pax record `uid`, which
# counts instead of the field (POSIX, pax, "pax Extended Header"). The library reads pax headers: names and sizes from
# them are applied.
#
# Seen: `uid`, `gid` and `mtime` are not. The entry has what the field says, which writers set to zero or to the lowest
# bits when the number does not fit; Go's and Python's write 0. The right number is in `header.pax.uid`, as text.
# `tar-fs`, which unpacks with it, then makes the file root's.
#
# Consequence: the ids that OpenShift gives to containers, and those of user namespaces in Kubernetes, mostly lie above
# that limit. A layer that passes through such a program changes owners to root without a message.
set -euo pipefail

version=3.2.2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund "tar-stream@$version" > log

python3 - <<'PYTHON'
import tarfile

with tarfile.open("layer.tar", "w", format=tarfile.PAX_FORMAT) as archive:
    for uid in (2097151, 2097152, 1000650000):
        entry = tarfile.TarInfo(f"uid-{uid}")
        entry.uid = uid
        archive.addfile(entry)
with tarfile.open("layer.tar") as archive:
    assert [entry.uid for entry in archive] == [2097151, 2097152, 1000650000]
PYTHON

cat > finding.cjs <<'JAVASCRIPT'
const extract = require("tar-stream").extract();
extract.on("entry", (header, stream, next) => {
  console.log(`${header.name}: ${header.uid}, pax record ${header.pax ? header.pax.uid : "none"}`);
  stream.resume();
  stream.on("end", next);
});
require("node:fs").createReadStream("layer.tar").pipe(extract);
JAVASCRIPT
seen=$(node finding.cjs)

echo "Package:  tar-stream $version (npm)"
echo "Expected: 2097151, 2097152 and 1000650000"
echo "Seen:     0 for those above the field's limit"
echo "Output:"
echo "$seen"
echo "Source:   POSIX, pax, 'pax Extended Header Keyword/Value Pairs'; tar-stream's README, 'Headers'"
known='uid-2097151: 2097151, pax record none
uid-2097152: 0, pax record 2097152
uid-1000650000: 0, pax record 1000650000'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
