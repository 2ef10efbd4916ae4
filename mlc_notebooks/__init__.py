"""Show, measure and repair what large language models do when a text has several labels."""

__version__ = "0.1.0"

import os

# How long idle threads spin before they sleep. The default of torch's thread library (GNU's) is so
# long that on a busy machine they take the cores from everybody, ourselves included; without any
# spinning they wake up too late. The library reads this once, when torch is loaded, so it cannot
# wait until a run begins. What you have set yourself stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
