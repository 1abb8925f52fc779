"""A service that imports large packages, and answers by what they compute."""
import os
import matplotlib
import numpy
import pandas
import scipy.linalg
import sqlalchemy
import tensorflow
from flask import Flask
from sklearn.linear_model import LinearRegression

matplotlib.use("Agg")
app = Flask(__name__)


@app.get("/")
def answer():
    frame = pandas.DataFrame({"x": range(10), "y": [2 * x + 1 for x in range(10)]})
    model = LinearRegression().fit(frame[["x"]].to_numpy(), frame["y"])
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.text("select 41 + 1")).scalar()
    return {
        "slope": round(float(model.coef_[0]), 6),
        "determinant": round(float(scipy.linalg.det(numpy.eye(3) * 2)), 6),
        "rows": rows,
        "tensor": int(tensorflow.reduce_sum(tensorflow.range(10))),
        "backend": matplotlib.get_backend().lower(),
    }


app.run("127.0.0.1", int(os.environ["PORT"]))
