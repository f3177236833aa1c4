"""What `import rankopt` costs beside `import torch`, and what it loads: python studies/import_time.py"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

CODE = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import rankopt
end = time.perf_counter()
added = sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))
print(middle - start, end - middle, ' '.join(added))
"""


def main() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split(" ", 2)
        for _ in range(5)
    ]
    torch, ours = (median(float(run[i]) for run in runs) for i in (0, 1))
    print(f"import torch {torch:.2f} s, then import rankopt {ours:.2f} s ({ours / torch:.0%} more; median of 5)")
    print(f"packages that torch had not loaded: {runs[0][2].strip()}")


if __name__ == "__main__":
    main()
