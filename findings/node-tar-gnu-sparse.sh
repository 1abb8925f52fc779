#!/usr/bin/env bash
# tar 7.5.23 of npm (node-tar) unpacks GNU tar's sparse files as something else, or not at all, without a warning.
#
# Expected: `tar -S` of GNU tar writes sparse files in two forms: in the default format an entry of type `S`, in the pax
# format a plain entry with records `GNU.sparse.*`, whose data begin with the map of the pieces. A reader that does not
# know them can at least say so: the library has `onwarn` for entries that it does not support, and `strict`.
#
# Seen: the old form is left out: the file is missing, `onwarn` is not called, `strict` does not fail. The pax form is
# unpacked as it is stored: under the made-up path `GNUSparseFile.PID/NAME`, with the map as its first block and without
# the holes. GNU tar, libarchive, Python, Go and commons-compress restore both.
#
# Consequence: disk images, databases and `lastlog` are sparse, and tools that pack a root file system call `tar -S`.
# Pack without `-S` what JavaScript reads. (The Rust crate `tar` 0.4.46 does the same with the pax form.)
set -euo pipefail

version=7.5.23
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund "tar@$version" > log

truncate -s 1M disk
printf 'data' | dd of=disk bs=4096 seek=16 conv=notrunc status=none
tar --format=gnu -S -cf old.tar disk
tar --format=posix -S -cf pax.tar disk

cat > finding.cjs <<'JAVASCRIPT'
const tar = require("tar");
const fs = require("node:fs");
const path = require("node:path");
for (const name of ["old", "pax"]) {
  const warnings = [];
  fs.mkdirSync(name);
  tar.x({ file: name + ".tar", cwd: name, sync: true, strict: true, onwarn: (code) => warnings.push(code) });
  const files = fs.readdirSync(name, { recursive: true }).filter((f) => fs.statSync(path.join(name, f)).isFile());
  const whole = (f) => fs.readFileSync(path.join(name, f)).equals(fs.readFileSync("disk"));
  const shown = files.map((f) => `${f.replace(/[0-9]+/, "PID")}, ${whole(f) ? "whole" : "with other contents"}`);
  console.log(`${name}.tar: files [${shown.join(", ")}], warnings [${warnings.join(", ")}]`);
}
JAVASCRIPT
seen=$(node finding.cjs)

echo "Package:  tar $version (npm); archives by $(tar --version | head -n 1)"
echo "Expected: the file 'disk' twice, whole, or a warning"
echo "Seen:     neither"
echo "Output:"
echo "$seen"
echo "Source:   GNU tar's manual, 'Storing Sparse Files'; node-tar's README, 'Warnings and Errors'"
known='old.tar: files [], warnings []
pax.tar: files [GNUSparseFile.PID/disk, with other contents], warnings []'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
