#!/usr/bin/env python3
"""Writes the table of values in the chart's README from the comments in its values.yaml.

    hack/chart-readme.py            writes it
    hack/chart-readme.py --check    fails if it is not what would be written

A comment belongs to the value below it. A comment that is followed by an empty line belongs to none.
"""

import pathlib
import re
import sys

CHART = pathlib.Path(__file__).resolve().parent.parent / "charts/gemini-batch-operator"
HEADING = "## Values\n"
KEY = re.compile(r"^( *)([A-Za-z]\w*):(.*)$")


def rows(lines):
    """Each value: its path, its default, what is said of it."""
    path, comment, found = [], [], []
    for number, line in enumerate(lines):
        text = line.strip()
        if not text:
            comment = []
        elif text.startswith("#"):
            comment.append(text.lstrip("# "))
        elif key := KEY.match(line):
            depth = len(key[1]) // 2
            path = path[:depth] + [key[2]]
            default = key[3].strip()
            below = lines[number + 1] if number + 1 < len(lines) else ""
            parent = not default and below.startswith(" " * (2 * depth + 1))
            if not parent or comment:
                found.append((".".join(path), "" if parent else default, " ".join(comment)))
            comment = []
        # Else an item of a list that is a default: told with the list.
    return found


def table(found):
    lines = ["| value | default | |", "| --- | --- | --- |"]
    for path, default, text in found:
        shown = f"`{default}`" if default not in ("", '""', "{}", "[]", "null") else ""
        lines.append(f"| `{path}` | {shown} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main():
    readme = CHART / "README.md"
    before = readme.read_text()
    head, found, _ = before.partition(HEADING)
    if not found:
        sys.exit(f"{readme} has no heading {HEADING.strip()!r}")
    after = head + HEADING + "\n" + table(rows((CHART / "values.yaml").read_text().splitlines()))
    if sys.argv[1:] == ["--check"]:
        if after != before:
            sys.exit("the chart's README differs from its values.yaml: run 'make generate' and commit")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        readme.write_text(after)


main()
