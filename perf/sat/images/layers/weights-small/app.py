"""Maps weights in the safetensors format and touches a page of each tensor in 64 KiB before it answers."""
import json, mmap, os
from http.server import BaseHTTPRequestHandler, HTTPServer

with open("/srv/model.safetensors", "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
start = 8 + int.from_bytes(data[:8], "little")
header = json.loads(data[8:start])
total = 0
for tensor in header.values():
    first, last = tensor["data_offsets"]
    total += sum(data[start + first:start + last:65536])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{len(header)} tensors, {total}\n".encode())

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
