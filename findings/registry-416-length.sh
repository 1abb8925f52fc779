#!/usr/bin/env bash
# docker-registry 2.8.2 answers a range behind the end of a blob with a 416 that promises the whole blob as its body.
#
# Expected: a range that begins at the blob's end cannot be satisfied, so the answer is 416 with `Content-Range: bytes
# */LENGTH`, and a `Content-Length` that fits the body, which is short or empty (RFC 9110, sections 8.6 and 15.5.17).
# Clients ask for such a range all the time: to resume a download that is complete already is to ask for
# `bytes=LENGTH-`.
#
# Seen: the registry sets `Content-Length` to the length of the blob before it looks at the range, and the 416 still
# carries it. The body is one line of text, shorter than that, so the server closes the connection. To the client this
# is a transfer that broke off: curl ends with 18 (partial file), Python's http.client raises IncompleteRead.
#
# Consequence: an HTTP client that retries broken transfers retries this one for ever, although the answer is final, and
# the kept connection is gone. Look at the status and `Content-Range` as soon as the headers are there, and do not read
# the body of a 416. An empty blob has no trouble, as its length is 0.
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
import hashlib, http.client, sys, time, urllib.parse

def ask(method, path, body=None, headers={}):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
    connection.request(method, path, body, headers)
    return connection.getresponse()

for _ in range(100):
    try:
        ask("GET", "/v2/").read()
        break
    except OSError:
        time.sleep(0.1)
blob = b"x" * 1000
digest = "sha256:" + hashlib.sha256(blob).hexdigest()
place = ask("POST", "/v2/one/blobs/uploads/").headers["Location"]
place = urllib.parse.urlsplit(place)
put = ask("PUT", f"{place.path}?{place.query}&digest={digest}", blob)
assert put.status == 201, put.status
answer = ask("GET", f"/v2/one/blobs/{digest}", headers={"Range": "bytes=1000-"})
print(answer.status, "Content-Range:", answer.headers["Content-Range"], "Content-Length:", answer.headers["Content-Length"])
try:
    print("body of", len(answer.read()))
except http.client.IncompleteRead as error:
    print("IncompleteRead:", len(error.partial), "bytes read,", error.expected, "more expected")
PYTHON
)

echo "Package:  $package $version (Debian)"
echo "Expected: 416, Content-Range: bytes */1000, and a Content-Length that is the length of the answer's own body"
echo "Seen:     the Content-Length of the blob, and 33 bytes of text"
echo "Output:"
echo "$seen"
echo "Source:   RFC 9110, sections 8.6 (Content-Length) and 15.5.17 (416)"
known='416 Content-Range: bytes */1000 Content-Length: 1000
IncompleteRead: 33 bytes read, 967 more expected'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
