"""A small service: the modules that most services import, one table in memory, an answer in JSON."""
import asyncio, email, email.message, json, os, sqlite3, ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

table = sqlite3.connect(":memory:", check_same_thread=False)
table.execute("create table numbers (n integer)")
table.executemany("insert into numbers values (?)", [(n,) for n in range(100)])
note = email.message.EmailMessage()
note["Subject"] = "ready"


async def total():
    return table.execute("select sum(n) from numbers").fetchone()[0]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({
            "sum": asyncio.run(total()), "subject": note["Subject"], "tls": ssl.OPENSSL_VERSION.split()[0],
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
