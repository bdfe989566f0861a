"""Make README.md from nbs/index.ipynb: `python tests/make_readme.py` (make readme).

nbdev's own command needs quarto, which cannot be had everywhere. Markdown cells are taken over, hidden cells left out, other
code cells become ```python blocks (which a test runs; `#| eval: false` gives ```py, which none runs) followed by their output.
"""
import re
import sys

from tree import NBS, ROOT, directives, read_nb, source

HEADER = "<!-- Made from nbs/index.ipynb by `make readme`; edit that. -->\n\n"


def relink(text):
    "Links as they are seen from nbs/ turned into links as they are seen from the root."
    def up(m):
        target = m[2].removeprefix("./")
        if re.match(r"[a-z]+:|#|/", target): return m[0]
        return m[1] + (target[3:] if target.startswith("../") else f"nbs/{target}") + m[3]
    return re.sub(r"""(\]\(|<img [^>]*?src=["'])([^)"'\s]+)([)"'\s])""", up, text)


def output(o):
    "One stored output as markdown; a picture must be a file that the text links to."
    data = o.get("data", {})
    if any(m.startswith("image/") for m in data): raise ValueError("index.ipynb: link a picture's file, don't store it as an output")
    if "text/markdown" in data: return "".join(data["text/markdown"]).strip()
    text = "".join(o.get("text") or data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def block(cell):
    "One cell as markdown."
    if cell["cell_type"] == "markdown": return relink(source(cell)).strip()
    if directives(cell) & {"hide", "default_exp"} or not source(cell).strip(): return ""
    code = "\n".join(line for line in source(cell).splitlines() if not re.match(r"#\s*\|", line)).strip()
    kind = "py" if "eval" in directives(cell) else "python"
    return "\n\n".join(filter(None, [f"```{kind}\n{code}\n```", *map(output, cell.get("outputs", []))]))


def readme(nb): return HEADER + "\n\n".join(filter(None, map(block, nb["cells"]))) + "\n"


if __name__ == "__main__":
    text = readme(read_nb(NBS/"index.ipynb"))
    sys.stdout.write(f"README.md: {len(text)} characters\n")
    (ROOT/"README.md").write_text(text, encoding="utf-8")
