"""`make audit`: pip-audit on the environment; where that says nothing, a line says so."""

from __future__ import annotations

import subprocess
import sys

UNREACHABLE = ("ConnectionError", "Max retries", "Connection reset", "ServiceError", "ReadTimeout", "ProxyError", "503")


UNKNOWN = "Dependency not found on PyPI"
"""What pip-audit says of a package that the index does not list. A mirror has packages without their weaknesses."""


def main() -> int:
    """Run it; the exit status is 0 if nothing was found, 1 if something was, 3 if that is not known."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        print("not audited: the index of known weaknesses (pypi.org) cannot be reached from here")
        return 3
    print(done.stdout + done.stderr, end="")
    if skipped := done.stdout.count(UNKNOWN):
        print(f"not audited: {skipped} packages, of which the index that is reached from here knows nothing")
    return done.returncode or (3 if skipped else 0)


if __name__ == "__main__":
    raise SystemExit(main())
