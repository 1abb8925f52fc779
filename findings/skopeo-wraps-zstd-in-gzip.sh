#!/usr/bin/env bash
# skopeo 1.9.3 puts a zstd layer that begins with a skippable frame into gzip, and destroys the image.
#
# Expected: the manifest says that a layer is `tar+zstd`, and the blob is valid zstd. A zstd stream is any chain of
# frames, and some of them may be skippable (RFC 8878, section 3.1.2). `pzstd` writes a skippable frame before each data
# frame, so its output always begins with one. A plain copy keeps such a layer as it is.
#
# Seen: skopeo looks at the first four bytes of the blob only, does not find the magic number of a data frame, and takes
# the layer for an uncompressed tar. It compresses the zstd stream with gzip and writes `tar+gzip` into the new
# manifest. No message, exit code 0. A runtime that unpacks the result finds zstd where a tar should be. A copy to
# `dir:` leaves the layer alone, so a check by way of `dir:` does not show it.
#
# Consequence: an image with layers from `pzstd`, or with an index in a leading skippable frame, is lost at the first
# copy. An index belongs into a skippable frame at the end.
set -euo pipefail

package=skopeo version=1.9.3+ds1-1+b10
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "$package=$version"
dpkg -x ./skopeo_*.deb root
python3 -m venv venv
venv/bin/pip -q --disable-pip-version-check install zstandard==0.25.0

# An image of one layer, laid out as `pzstd` does it: a skippable frame with the length of the data frame behind it.
venv/bin/python - <<'PYTHON'
import hashlib, io, json, os, struct, tarfile
import zstandard

tar = io.BytesIO()
with tarfile.open(fileobj=tar, mode="w") as archive:
    entry = tarfile.TarInfo("file")
    entry.size = 60_000
    archive.addfile(entry, io.BytesIO(b"contents" * 7500))
tar = tar.getvalue()
frames = [zstandard.ZstdCompressor().compress(part) for part in (tar[:30_000], tar[30_000:])]
layer = b"".join(struct.pack("<III", 0x184D2A50, 4, len(frame)) + frame for frame in frames)
assert zstandard.ZstdDecompressor().stream_reader(io.BytesIO(layer), read_across_frames=True).read() == tar

os.makedirs("image/blobs/sha256")

def put(media_type, blob):
    digest = hashlib.sha256(blob).hexdigest()
    with open("image/blobs/sha256/" + digest, "wb") as file:
        file.write(blob)
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(blob)}

oci = "application/vnd.oci.image."
config = {"architecture": "amd64", "os": "linux",
          "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest()]}}
manifest = {"schemaVersion": 2, "mediaType": oci + "manifest.v1+json",
            "config": put(oci + "config.v1+json", json.dumps(config).encode()),
            "layers": [put(oci + "layer.v1.tar+zstd", layer)]}
entry = put(oci + "manifest.v1+json", json.dumps(manifest).encode())
entry["annotations"] = {"org.opencontainers.image.ref.name": "one"}
with open("image/index.json", "w") as file:
    json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
with open("image/oci-layout", "w") as file:
    file.write('{"imageLayoutVersion":"1.0.0"}')
PYTHON

root/usr/bin/skopeo --insecure-policy copy -q oci:image:one oci:copy:one
seen=$(python3 - <<'PYTHON'
import gzip, json

def blob(descriptor):
    with open("copy/blobs/sha256/" + descriptor["digest"][7:], "rb") as file:
        return file.read()

index = json.load(open("copy/index.json"))
layer = json.loads(blob(index["manifests"][0]))["layers"][0]
print("type", layer["mediaType"].rsplit(".", 1)[1])
print("inside the gzip:", gzip.decompress(blob(layer))[:4].hex() if blob(layer)[:2] == b"\x1f\x8b" else "-")
PYTHON
)

echo "Package:  $package $version (Debian)"
echo "Expected: the copied layer is still tar+zstd, or a gzip of the tar"
echo "Seen:     a gzip of the zstd stream (502a4d18 is the magic number of a skippable frame), labelled tar+gzip"
echo "Output:"
echo "$seen"
echo "Source:   RFC 8878, sections 3.1 and 3.1.2; mended in two other programs by github.com/moby/moby/pull/42862 and"
echo "          github.com/containerd/containerd/pull/6177"
known='type tar+gzip
inside the gzip: 502a4d18'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
