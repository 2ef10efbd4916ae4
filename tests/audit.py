"""Ask a public database whether releases that were tested with have known vulnerabilities.

    python tests/audit.py constraints.txt

The exit code is 1 where one is found. Where there is no network it says so, and the code is 0.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(".venv-audit")
TOOL = HOME / "bin" / "pip-audit"
NO_NETWORK = re.compile(r"ConnectionError|ConnectTimeout|Max retries|NameResolution|ProxyError")


def installed() -> bool:
    "Whether pip-audit stands in an environment of its own, after trying to put it there."
    if TOOL.exists():
        return True
    subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = subprocess.run([HOME / "bin" / "pip", "install", *quiet, "pip-audit"])
    return pip.returncode == 0


def tell(dependencies: list[dict]) -> int:
    "The exit code, after printing what is known of each release."
    known = [one for one in dependencies if "vulns" in one]
    vulnerable = [one for one in known if one["vulns"]]
    if not known:
        print("audit skipped: the database that can be reached from here knows no release")
        return 0
    for one in vulnerable:
        for vulnerability in one["vulns"]:
            mended = ", ".join(vulnerability["fix_versions"]) or "no release yet"
            print(f"{one['name']} {one['version']}: {vulnerability['id']}, mended in {mended}")
    print(f"{len(known)} of {len(dependencies)} releases audited, {len(vulnerable)} vulnerable")
    return 1 if vulnerable else 0


def main(releases: str) -> int:
    "The exit code."
    if not installed():
        print("audit skipped: pip-audit could not be installed (is there a network?)")
        return 0

    asked = [TOOL, "--requirement", releases, "--no-deps", "--disable-pip", "--format", "json"]
    found = subprocess.run(asked, capture_output=True, text=True)
    if found.stdout:
        return tell(json.loads(found.stdout)["dependencies"])
    if NO_NETWORK.search(found.stderr):
        print("audit skipped: the database of vulnerabilities cannot be reached")
        return 0
    print(found.stderr)
    return found.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
