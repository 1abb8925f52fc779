#!/usr/bin/env bash
# umoci 0.4.7: `umoci gc` deletes the configuration and the layers of an image whose manifest has Docker's media type.
#
# Expected: garbage collection of an OCI layout removes blobs that nothing refers to. `index.json` may refer to
# manifests of any media type, and OCI's image-spec lists Docker's manifest (`vnd.docker.distribution.manifest.v2+json`)
# as one that is used in place of its own; `crane pull --format=oci` keeps it and so makes such layouts. A collector
# that does not know a type would have to keep what it cannot look into, or to refuse.
#
# Seen: umoci takes a manifest of Docker's type for a leaf. The manifest stays, its configuration and layers are
# deleted, exit code 0. The same layout with OCI's media types is left alone. (umoci 0.6.0 did the same when tried.)
#
# Consequence: a layout is a common place to collect images before they are pushed. One `umoci gc` in it destroys all
# those that were pulled without conversion. Look at the media types in `index.json` first.
set -euo pipefail

package=umoci version=0.4.7+ds-3+b7
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "$package=$version"
dpkg -x ./umoci_*.deb root

# A layout with an image of one layer, in the media types of the given family.
make_layout() {
    python3 - "$1" <<'PYTHON'
import gzip, hashlib, io, json, os, sys, tarfile

family = sys.argv[1]
manifest_type, config_type, layer_type = {
    "oci": ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json",
            "application/vnd.oci.image.layer.v1.tar+gzip"),
    "docker": ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.container.image.v1+json",
               "application/vnd.docker.image.rootfs.diff.tar.gzip"),
}[family]
os.makedirs(family + "/blobs/sha256")

def put(media_type, blob):
    digest = hashlib.sha256(blob).hexdigest()
    with open(f"{family}/blobs/sha256/{digest}", "wb") as file:
        file.write(blob)
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(blob)}

tar = io.BytesIO()
with tarfile.open(fileobj=tar, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("file"))
tar = tar.getvalue()
config = {"architecture": "amd64", "os": "linux",
          "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest()]}}
manifest = {"schemaVersion": 2, "mediaType": manifest_type, "config": put(config_type, json.dumps(config).encode()),
            "layers": [put(layer_type, gzip.compress(tar, mtime=0))]}
entry = put(manifest_type, json.dumps(manifest).encode())
entry["annotations"] = {"org.opencontainers.image.ref.name": "one"}
with open(family + "/index.json", "w") as file:
    json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
with open(family + "/oci-layout", "w") as file:
    file.write('{"imageLayoutVersion":"1.0.0"}')
PYTHON
}

seen=$(for family in oci docker; do
    make_layout "$family"
    before=$(find "$family/blobs/sha256" -type f | wc -l)
    root/usr/bin/umoci gc --layout "$family" > gc.log 2>&1
    echo "$family: $before blobs before, $(find "$family/blobs/sha256" -type f | wc -l) after"
done)

echo "Package:  $package $version (Debian)"
echo "Expected: 3 blobs after, in both"
echo "Seen:     of Docker's manifest only the manifest itself is left"
echo "Output:"
echo "$seen"
echo "Source:   github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md (index.json) and media-types.md"
echo "          (compatibility matrix)"
known='oci: 3 blobs before, 3 after
docker: 3 blobs before, 1 after'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
