"""Look the locked versions up in the index's list of known vulnerabilities, with pip-audit.

Exit status 0: none is known, or nobody could be asked, which a line says; 1: some are known, and are listed. What is
named in ACCEPTED is passed over. Nothing is installed or built: names and versions alone are asked for.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ACCEPTED: dict[str, str] = {}
"""Id of a vulnerability: why it does no harm here."""

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 30


def main(lock_files: list[str]) -> int:
    """Audit the lock files; the exit status."""
    with tempfile.TemporaryDirectory(prefix="blt-audit-") as directory:
        report = Path(directory) / "report.json"
        try:
            done = subprocess.run(_command(lock_files, report), capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return _skipped(f"no answer within {_SECONDS} s")
        if not report.is_file():  # pip-audit ends with 1 for a fault of the network and for a finding alike
            lines = done.stderr.strip().splitlines()
            return _skipped(lines[-1][:200] if lines else f"pip-audit ended with {done.returncode}")
        found = json.loads(report.read_text())["dependencies"]
    asked = [one for one in found if "vulns" in one]
    if not asked:
        return _skipped("it has no list of vulnerabilities")
    findings = [(one, vuln) for one in asked for vuln in one["vulns"] if vuln["id"] not in ACCEPTED]
    for one, vuln in findings:
        fixed = ", ".join(vuln["fix_versions"]) or "no version yet"
        print(f"{one['name']} {one['version']}: {vuln['id']}, fixed in {fixed}: {vuln['description'][:200]}")
    unknown = f" ({len(found) - len(asked)} more are not known to the index)" if len(asked) < len(found) else ""
    print(f"audit: {len(asked)} packages{unknown}, {len(findings)} known vulnerabilities")
    return 1 if findings else 0


def _command(lock_files: list[str], report: Path) -> list[str]:
    files = [part for name in lock_files for part in ("-r", str(ROOT / name))]
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "10"]
    return [sys.executable, "-m", "pip_audit", *options, *files, "--format", "json", "--output", str(report)]


def _skipped(reason: str) -> int:
    print(f"audit: skipped, the index could not be asked ({reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["requirements.lock"]))
