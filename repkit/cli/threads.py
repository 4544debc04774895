"""How threads wait for each other in the commands that search."""

import os


def wait_briefly() -> None:
    """Let idle threads of OpenMP sleep after some microseconds instead of milliseconds of spinning.

    FAISS has them meet thousands of times a second: with any other load on the machine, a search by all cores else
    takes many times as long. To be called before the first library that uses OpenMP is imported, since it reads this
    then; networks, whose threads meet less often, are a sixth slower for it where the machine is idle.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
