"Prints the lowest versions that pyproject.toml admits, as constraints for pip: `python tests/lowest.py > lowest.txt`."
import re
import sys
import tomllib
from pathlib import Path


def lowest(text):
    "A line `name==version` for every runtime dependency; ValueError for one without a lower bound."
    lines = []
    for d in tomllib.loads(text)["project"]["dependencies"]:
        m = re.fullmatch(r"([\w.-]+)>=([\w.]+)", d)
        if m is None: raise ValueError(f"{d!r} must have a lower bound and nothing else")
        lines.append(f"{m[1]}=={m[2]}")
    return lines


if __name__ == "__main__":
    skipped = set(sys.argv[1:])   # such as torch, where only one build can be had
    found = lowest((Path(__file__).parent.parent/"pyproject.toml").read_text())
    print("\n".join(v for v in found if v.split("==")[0] not in skipped))
