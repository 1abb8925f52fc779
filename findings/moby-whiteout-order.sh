#!/usr/bin/env bash
# moby/go-archive 0.3.3 lets a whiteout delete a file of its own layer, if the whiteout comes behind the file.
#
# Expected: a whiteout hides what lower layers have. A file in the same layer stays, in whatever order the two lie in
# the tar: "Files that are present in the same layer as a whiteout file can only be hidden by whiteout files in
# subsequent layers."
#
# Seen: `ApplyLayer` and its kin, by which Docker's vfs driver and programs that flatten images unpack, remove the path
# of a plain whiteout at once. With the whiteout first, the new file is there; with the file first, it is gone. Of a
# directory that is replaced this way the whole unpacking fails, as it wants to set the time of a directory that it has
# just removed. (An opaque whiteout is handled in both orders: there the program remembers what it has unpacked.) umoci
# unpacks both orders alike.
#
# Consequence: writers that sort names put `.wh.x` before `x`, and do not notice. A writer that streams a tree and
# appends its deletions makes an image that differs from one unpacker to the next. Write whiteouts first.
set -euo pipefail

version=v0.3.3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod init example.com/finding 2> log
cat > main.go <<'GO'
package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	archive "github.com/moby/go-archive"
)

func layer(names ...string) *bytes.Buffer {
	var blob bytes.Buffer
	writer := tar.NewWriter(&blob)
	for _, name := range names {
		header := &tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg, Uid: os.Getuid(), Gid: os.Getgid()}
		if name[len(name)-1] == '/' {
			header.Typeflag = tar.TypeDir
		}
		if err := writer.WriteHeader(header); err != nil {
			panic(err)
		}
	}
	if err := writer.Close(); err != nil {
		panic(err)
	}
	return &blob
}

func main() {
	for number, upper := range [][]string{{".wh.x", "x"}, {"x", ".wh.x"}, {"d/", "d/x", ".wh.d"}} {
		root := fmt.Sprint("root", number)
		if err := os.Mkdir(root, 0o755); err != nil {
			panic(err)
		}
		_, err := archive.ApplyUncompressedLayer(root, layer("x", "d/", "d/old"), nil)
		if err != nil {
			panic(err)
		}
		_, err = archive.ApplyUncompressedLayer(root, layer(upper...), nil)
		there, _ := filepath.Glob(filepath.Join(root, "x"))
		fmt.Println(upper, "x:", len(there), "error:", err != nil)
	}
}
GO
go get "github.com/moby/go-archive@$version" 2>> log
go mod tidy 2>> log
seen=$(GOFLAGS=-p=1 go run . 2>> log)

echo "Package:  github.com/moby/go-archive $version (Go)"
echo "Expected: x is there each time, and there is no error"
echo "Seen:     it is gone where the whiteout follows, and the replaced directory is an error"
echo "Output:"
echo "$seen"
echo "Source:   github.com/opencontainers/image-spec/blob/v1.1.0/layer.md#whiteouts; the opaque form was mended in"
echo "          github.com/moby/moby/pull/17819"
known='[.wh.x x] x: 1 error: false
[x .wh.x] x: 0 error: false
[d/ d/x .wh.d] x: 1 error: true'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
