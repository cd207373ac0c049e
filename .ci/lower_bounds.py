"""Print the oldest version of each dependency that setup.py allows, as requirements for pip.

torch is left out: its older releases have no CPU build on the package index, so both jobs use the same one.
"""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
section = re.search(r"^INSTALL_REQUIRES = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
if section is None:
    raise SystemExit("setup.py has no INSTALL_REQUIRES")
for name, version in re.findall(r'"([\w-]+)>=([\w.]+)"', section.group(1)):
    if name != "torch":
        print(f"{name}=={version}")  # noqa: T201
