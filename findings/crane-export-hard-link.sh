#!/usr/bin/env bash
# go-containerregistry 0.22.1 (`crane export`): a file gets another file's contents where an upper layer replaced the
# name that its hard link points to.
#
# Expected: layers are applied from the lowest up. A layer that brings `b` anew replaces that name. Another name of the
# old file, made as a hard link, keeps the old contents, as umoci and go-archive unpack it.
#
# Seen: `mutate.Extract`, which `crane export` uses, goes through the layers from the top down and leaves out what was
# seen above. The link of the lower layer is written as it was, and now its target is the new file: `a`, which no upper
# layer touched, shows the contents of the new `b`. The tar also has the link's target in front of it, so nothing fails.
# If the upper layer deletes `b` instead, the link has no target at all, and tar(1) refuses the result.
#
# Consequence: hard links are common in real layers (git, perl, terminfo, time zones), and package upgrades replace one
# of the names. A flattened image can hold files that the image does not. Apply the layers in order, or resolve links
# before flattening.
set -euo pipefail

version=v0.22.1
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
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

type entry struct{ name, link, data string }

func layer(entries ...entry) v1.Layer {
	var blob bytes.Buffer
	writer := tar.NewWriter(&blob)
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Typeflag: tar.TypeReg}
		if e.link != "" {
			header.Typeflag, header.Linkname = tar.TypeLink, e.link
		}
		check(writer.WriteHeader(header))
		_, err := writer.Write([]byte(e.data))
		check(err)
	}
	check(writer.Close())
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob.Bytes())), nil }
	made, err := tarball.LayerFromOpener(open)
	check(err)
	return made
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	lower := layer(entry{name: "b", data: "old"}, entry{name: "a", link: "b"})
	upper := layer(entry{name: "b", data: "new"})
	image, err := mutate.AppendLayers(empty.Image, lower, upper)
	check(err)
	file, err := os.Create("flat.tar")
	check(err)
	_, err = io.Copy(file, mutate.Extract(image))
	check(err)
	check(file.Close())
	fmt.Fprintln(os.Stderr, "done")
}
GO
go get "github.com/google/go-containerregistry@$version" 2>> log
go mod tidy 2>> log
GOFLAGS=-p=1 go run . 2>> log
mkdir root
tar -xf flat.tar -C root
seen=$(for name in a b; do echo "$name: $(cat root/$name)"; done)

echo "Package:  github.com/google/go-containerregistry $version (Go)"
echo "Expected: a: old, b: new"
echo "Seen:     both are new"
echo "Output:"
echo "$seen"
echo "Source:   github.com/opencontainers/image-spec/blob/v1.1.0/layer.md;"
echo "          github.com/google/go-containerregistry/issues/2002 and 977 are open"
known='a: new
b: new'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
