#!/usr/bin/env bash
# tar-split 0.12.3 puts a layer with a sparse file together again as another tar, and does not notice.
#
# Expected: tar-split exists to keep what is not file data of a tar, so that the very same bytes, and so the same
# digest, can be produced from the unpacked files later. Docker's layer store and containers/storage push images that
# way. Its README admits that it cannot do so for sparse files, and that this should be detected: an error, then.
#
# Seen: taking apart and putting together both succeed. The data of the sparse file come back with its holes filled with
# zeros, behind a header and a map that describe the packed form. That is not only another digest, but a tar that
# readers cannot go through, because the next header is not where the old one says: the files behind it are lost.
#
# Consequence: a layer that was packed with `tar -S` is pulled and runs well, and cannot be pushed or saved. Compare the
# digest of what was put together before anything else is done with it.
set -euo pipefail

version=v0.12.3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
truncate -s 1M disk
printf 'data' | dd of=disk bs=4096 seek=16 conv=notrunc status=none
echo after > after
tar --format=gnu -S -cf sparse.tar disk after
tar --format=gnu -cf plain.tar disk after

go mod init example.com/finding 2> log
cat > main.go <<'GO'
package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

func main() {
	for _, name := range []string{"plain.tar", "sparse.tar"} {
		original, err := os.ReadFile(name)
		if err != nil {
			panic(err)
		}
		var metadata bytes.Buffer
		files := storage.NewBufferFileGetPutter()
		parts, err := asm.NewInputTarStream(bytes.NewReader(original), storage.NewJSONPacker(&metadata), files)
		if err != nil {
			panic(err)
		}
		_, apart := io.Copy(io.Discard, parts)
		whole, together := io.ReadAll(asm.NewOutputTarStream(files, storage.NewJSONUnpacker(&metadata)))
		entries := 0
		for reader := tar.NewReader(bytes.NewReader(whole)); ; entries++ {
			if _, err := reader.Next(); err != nil {
				break
			}
		}
		fmt.Println(name, "errors:", apart, together, "equal:", bytes.Equal(whole, original), "entries that can be read:", entries)
	}
}
GO
go get "github.com/vbatts/tar-split@$version" 2>> log
go mod tidy 2>> log
seen=$(GOFLAGS=-p=1 go run . 2>> log)

echo "Package:  github.com/vbatts/tar-split $version (Go); archives by $(tar --version | head -n 1)"
echo "Expected: equal, or an error"
echo "Seen:     neither for the sparse one"
echo "Output:"
echo "$seen"
echo "Source:   github.com/vbatts/tar-split, README, 'Caveat'"
known='plain.tar errors: <nil> <nil> equal: true entries that can be read: 2
sparse.tar errors: <nil> <nil> equal: false entries that can be read: 1'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
