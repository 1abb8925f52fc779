#!/usr/bin/env bash
# oras-go 2.7.0: `oci.Store.GC` deletes every manifest that has no tag, and all that belongs to it, and leaves it in
# index.json.
#
# Expected: in an OCI layout the entries of `index.json` are the roots, and the annotation
# `org.opencontainers.image.ref.name` on them is optional. The documentation of `GC` calls garbage what nothing refers
# to and what is not in the store. The library itself enters each manifest that is pushed to it there, with a tag or
# without, and resolves it by its digest.
#
# Seen: an entry without a name keeps nothing alive. Manifest, configuration and layers are deleted, without an error,
# and `index.json` still names the manifest: a store that is opened afterwards resolves it and cannot fetch it. With a
# name on the entry, all is kept.
#
# Consequence: an image that was built without a tag, or is pinned by its digest, has an entry without a name. A cache
# of such images is empty after it was cleaned with `GC`. Tag each entry, with any name.
set -euo pipefail

version=v2.7.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod init example.com/finding 2> log
cat > main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"path/filepath"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func blobs(folder string) int {
	found, err := filepath.Glob(filepath.Join(folder, "blobs/sha256/*"))
	check(err)
	return len(found)
}

func main() {
	ctx := context.Background()
	for _, tag := range []string{"one", ""} {
		folder := "layout-" + tag
		store, err := oci.New(folder)
		check(err)
		layer, err := oras.PushBytes(ctx, store, v1.MediaTypeImageLayer, []byte("layer"))
		check(err)
		config, err := oras.PushBytes(ctx, store, v1.MediaTypeImageConfig, []byte("{}"))
		check(err)
		manifest, err := oras.PackManifest(ctx, store, oras.PackManifestVersion1_1, v1.MediaTypeImageConfig,
			oras.PackManifestOptions{Layers: []v1.Descriptor{layer}, ConfigDescriptor: &config})
		check(err)
		if tag != "" {
			check(store.Tag(ctx, manifest, tag))
		}
		check(store.SaveIndex())

		again, err := oci.New(folder)
		check(err)
		before := blobs(folder)
		check(again.GC(ctx))
		afterwards, err := oci.New(folder)
		check(err)
		found, resolved := afterwards.Resolve(ctx, manifest.Digest.String())
		_, fetched := content.FetchAll(ctx, afterwards, found)
		fmt.Printf("tag %q: %d blobs before, %d after; the manifest: resolved %t, fetched %t\n",
			tag, before, blobs(folder), resolved == nil, fetched == nil)
	}
}
GO
go get "oras.land/oras-go/v2@$version" 2>> log
go mod tidy 2>> log
seen=$(GOFLAGS=-p=1 go run . 2>> log)
listed=$(python3 -c 'import json; print(len(json.load(open("layout-/index.json"))["manifests"]))')
seen="$seen
entries in index.json after: $listed"

echo "Package:  oras.land/oras-go/v2 $version (Go)"
echo "Expected: 3 blobs after, with and without a tag"
echo "Seen:     none without a tag, and index.json still lists the manifest"
echo "Output:"
echo "$seen"
echo "Source:   github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md, 'index.json file';"
echo "          github.com/oras-project/oras-go/issues/664: manifests in it may or may not have tags"
known='tag "one": 3 blobs before, 3 after; the manifest: resolved true, fetched true
tag "": 3 blobs before, 0 after; the manifest: resolved true, fetched false
entries in index.json after: 1'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
