"""Writes the help texts of the command line into docs/cli.md, between `<!-- help: COMMAND -->` and `<!-- end -->`.

python docs/help.py            writes them
python docs/help.py --check    exits with 1 if they are not the current ones
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().with_name("cli.md")
BLOCK = re.compile(r"(<!-- help: ([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(command: str) -> str:
    script = Path(sys.executable).with_name("cembed")
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    result = subprocess.run(
        [str(script), *command.split()[1:], "--help"], env=environment, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def fill(text: str) -> str:
    return BLOCK.sub(lambda match: f"{match[1]}```\n$ {match[2]} --help\n{help_text(match[2])}\n```\n{match[3]}", text)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    current = fill(text)
    if "--check" in sys.argv:
        raise SystemExit(int(text != current))
    PAGE.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
