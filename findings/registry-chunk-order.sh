#!/usr/bin/env bash
# docker-registry 2.8.2 takes the chunks of an upload in any order, and appends each, whatever its Content-Range says.
#
# Expected: chunks are uploaded in order, each with its place in `Content-Range`. A chunk that does not begin where the
# last one ended is refused with 416, and changes nothing (distribution-spec 1.1, "Pushing a blob in chunks"). A client
# relies on this when it sends a chunk again because the answer to the first try was lost.
#
# Seen: `Content-Range` is not read at all. A chunk that claims to be bytes 10-13 of an upload of 4 bytes is answered
# with 202 and appended as bytes 4-7; a chunk that was sent before is appended a second time. The `Range` of the answer
# gives it away, and else only the digest at the very end, after the whole blob has been sent.
#
# Consequence: an uploader that resumes must ask for the state of the upload (GET of its address) before it sends a
# chunk again, and must compare the `Range` of each answer with what it sent.
set -euo pipefail

package=docker-registry version=2.8.2+ds1-1
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "$package=$version"
dpkg -x ./docker-registry_*.deb root

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat > registry.yml <<CONFIG
version: 0.1
log: {accesslog: {disabled: true}, level: error}
storage: {filesystem: {rootdirectory: $work/data}}
http: {addr: "127.0.0.1:$port"}
CONFIG
root/usr/bin/docker-registry serve registry.yml > server.log 2>&1 &
server=$!

seen=$(python3 - "$port" <<'PYTHON'
import http.client, sys, time, urllib.parse

def ask(method, address, body=None, headers={}):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
    parts = urllib.parse.urlsplit(address)
    connection.request(method, parts.path + ("?" + parts.query if parts.query else ""), body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer

for _ in range(100):
    try:
        ask("GET", "/v2/")
        break
    except OSError:
        time.sleep(0.1)
place = ask("POST", "/v2/one/blobs/uploads/").headers["Location"]
for given in ("0-3", "10-13", "0-3"):
    headers = {"Content-Range": given, "Content-Type": "application/octet-stream"}
    answer = ask("PATCH", place, b"abcd", headers)
    print(f"PATCH {given}:", answer.status, "Range:", answer.headers["Range"])
    place = answer.headers["Location"] or place
PYTHON
)

echo "Package:  $package $version (Debian)"
echo "Expected: 202 for the first chunk, 416 for both others"
echo "Seen:     all three are appended"
echo "Output:"
echo "$seen"
echo "Source:   github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md, 'Pushing a blob in chunks';"
echo "          github.com/opencontainers/distribution-spec/issues/590 tells the same of the closing PUT"
known='PATCH 0-3: 202 Range: 0-3
PATCH 10-13: 202 Range: 0-7
PATCH 0-3: 202 Range: 0-11'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
