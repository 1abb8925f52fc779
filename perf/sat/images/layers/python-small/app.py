"""A service with few imports, in an image that has many packages."""
import os
from flask import Flask

app = Flask(__name__)


@app.get("/")
def answer():
    return {"sum": sum(range(100))}


app.run("127.0.0.1", int(os.environ["PORT"]))
