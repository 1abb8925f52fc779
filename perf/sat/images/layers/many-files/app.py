"""Reads 100,000 small files before it answers."""
import hashlib, os
from http.server import BaseHTTPRequestHandler, HTTPServer

count, hashed = 0, hashlib.sha256()
for folder, folders, files in os.walk("/srv/files"):
    folders.sort()
    for name in sorted(files):
        with open(f"{folder}/{name}", "rb") as file:
            hashed.update(file.read())
        count += 1


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{count} files, {hashed.hexdigest()[:12]}\n".encode())

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
